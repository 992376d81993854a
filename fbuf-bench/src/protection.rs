//! What protection costs: tables after Table 1 of Druschel and Peterson (SOSP 1993), and a plot.

use std::{fmt::Write as _, fs, hint::black_box, path::Path};

use clap::ValueEnum;
use fbuf_core::{
    memory::{HUGE_PAGE, free_huge_pages, has_transparent_pages},
    process::processors::CpuTime,
};
use hdrhistogram::Histogram;
use plotters::chart::SeriesLabelPosition;
use quanta::Clock;

use crate::{
    Result,
    machine::Machine,
    outcome::{Outcome, Spread},
    payload::PAGE,
    peers::Peer,
    report::{Axes, Curve, draw},
    table::{bytes, nanoseconds},
    terms::{Means, Terms, name},
    work::{Figures, Latency, Run},
};

/// Slots of each way. One message at a time is under way.
pub(crate) const SLOTS: u32 = 2;

/// What is measured with messages of this size, and in words what is not.
pub(crate) fn sorts(size: usize) -> (Vec<(Peer, Means)>, Vec<String>) {
    let (mut sorts, mut missing) = (Vec::new(), Vec::new());
    // There and back.
    let pages = size.div_ceil(HUGE_PAGE as usize) as u64 * u64::from(SLOTS) * 2;
    for &means in Means::value_variants() {
        let lacks = match means {
            Means::LeaseTransparent | Means::LeaseHuge if size < HUGE_PAGE as usize => continue,
            Means::LeaseTransparent if !has_transparent_pages() => {
                Some("/sys/kernel/mm/transparent_hugepage/shmem_enabled is `never`".to_owned())
            }
            Means::LeaseHuge if free_huge_pages() < pages => {
                Some(format!("{} of {pages} huge pages are free (vm.nr_hugepages)", free_huge_pages()))
            }
            _ => None,
        };
        match lacks {
            Some(why) => missing.push(format!("{} of {}: {why}", name(means), bytes(size))),
            None => sorts.push((Peer::Fbuf, means)),
        }
    }
    sorts.push((Peer::Pipe, Means::Volatile));
    (sorts, missing)
}

/// How long it takes to copy so many bytes from some buffers to as many others.
pub(crate) fn copy(terms: &Terms) -> Result<Run> {
    let buffers = || (0..SLOTS).map(|_| vec![1u8; terms.size]).collect::<Vec<_>>();
    let (from, mut to) = (buffers(), buffers());
    let (clock, mut times) = (Clock::new(), Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?);
    let (before, start) = (CpuTime::so_far()?, clock.raw());
    let elapsed = || clock.delta_as_nanos(start, clock.raw());
    let mut number = 0;
    while u128::from(elapsed()) < terms.time.as_nanos() || number < 2 * SLOTS as usize {
        let slot = number % SLOTS as usize;
        let begin = clock.raw();
        to[slot].copy_from_slice(black_box(&from[slot]));
        black_box(&mut to[slot]);
        // The first round is to warm up.
        if number >= SLOTS as usize {
            times.saturating_record(clock.delta_as_nanos(begin, clock.raw()).max(1));
        }
        number += 1;
    }
    let spent = CpuTime::so_far()?.since(before);
    let at = |quantile| times.value_at_quantile(quantile);
    let latency = Latency { p50: at(0.5), p99: at(0.99), p999: at(0.999), max: times.max() };
    let seconds = elapsed() as f64 / 1e9;
    let receiver = CpuTime::default();
    Ok(Run { messages: times.len(), seconds, sender: spent, receiver, figures: Figures::Latency(latency) })
}

/// What the paper calls it, and what it had: microseconds a page on a DECstation 5000/200.
fn in_1993(peer: Peer, means: Means) -> (&'static str, Option<f64>) {
    match (peer, means) {
        (Peer::Fbuf, Means::Volatile) => ("cached, volatile", Some(3.0)),
        (Peer::Fbuf, Means::Guarded | Means::Lease | Means::LeaseTransparent | Means::LeaseHuge) => {
            ("cached", Some(29.0))
        }
        (Peer::Fbuf, Means::OneShot) => ("plain", Some(37.0)),
        (Peer::Fbuf, Means::CopyOnWrite) => ("Mach copy-on-write", Some(159.0)),
        (Peer::Fbuf, Means::Copy) | (Peer::Memcpy, _) => ("copy", Some(204.0)),
        _ => ("two copies", None),
    }
}

fn label(peer: Peer, means: Means) -> String {
    match peer {
        Peer::Fbuf => name(means),
        Peer::Memcpy => "one memcpy".to_owned(),
        other => name(other),
    }
}

/// All that was measured in a certain way.
struct Line<'a> {
    peer: Peer,
    means: Means,
    runs: Vec<&'a Outcome>,
}

impl Line<'_> {
    fn cost(&self, size: usize) -> Option<Spread> {
        Spread::of(self.runs.iter().filter(|run| run.size == size).map(|run| run.headline()))
    }

    /// The median of what it is of one memcpy, run by run.
    fn ratio(&self, copies: &Line<'_>, size: usize) -> Option<f64> {
        let copy = |number| copies.runs.iter().find(|run| (run.run, run.size) == (number, size));
        let runs = self.runs.iter().filter(|run| run.size == size);
        Spread::of(runs.filter_map(|run| Some(run.headline() / copy(run.run)?.headline()))).map(|spread| spread.median)
    }
}

fn lines(outcomes: &[Outcome]) -> Vec<Line<'_>> {
    let mut lines: Vec<Line<'_>> = Vec::new();
    for run in outcomes {
        match lines.iter_mut().find(|line| (line.peer, line.means) == (run.peer, run.means)) {
            Some(line) => line.runs.push(run),
            None => lines.push(Line { peer: run.peer, means: run.means, runs: vec![run] }),
        }
    }
    lines
}

fn sizes(outcomes: &[Outcome]) -> Vec<usize> {
    let mut sizes: Vec<_> = outcomes.iter().map(|run| run.size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// What one page more costs, in microseconds: from the greatest size of at most 1 MiB, or else the least,
/// to the greatest of at most 16 MiB.
fn increment(line: &Line<'_>, sizes: &[usize]) -> Option<f64> {
    let has = |size: &&usize| line.cost(**size).is_some();
    let to = *sizes.iter().rev().filter(has).find(|size| **size <= 16 << 20)?;
    let from = *sizes.iter().rev().filter(has).find(|size| **size <= 1 << 20).or(sizes.iter().find(has))?;
    let pages = (to - from) / PAGE;
    (pages > 0).then(|| {
        (line.cost(to).map_or(0.0, |cost| cost.median) - line.cost(from).map_or(0.0, |cost| cost.median))
            / pages as f64
            / 1e3
    })
}

/// A table for each size, and one as in the paper.
pub(crate) fn tables(outcomes: &[Outcome]) -> String {
    let (lines, sizes) = (lines(outcomes), sizes(outcomes));
    let Some(copies) = lines.iter().find(|line| line.peer == Peer::Memcpy) else { return String::new() };
    let mut text = String::new();
    // Writing to a string does not fail.
    for &size in &sizes {
        let _ = writeln!(
            text,
            "\nprotection of {}, a word of each page touched: one message, one way\n  {:<20}{:>10} {:<22}{:>10}{:>10}",
            bytes(size),
            "",
            "median",
            "(spread)",
            "a page",
            "/ memcpy"
        );
        for line in &lines {
            let Some(Spread { median, least, most }) = line.cost(size) else { continue };
            let spread = format!("({}–{})", nanoseconds(least), nanoseconds(most));
            let ratio = line.ratio(copies, size).map_or_else(String::new, |ratio| format!("{ratio:.2}"));
            let _ = writeln!(
                text,
                "  {:<20}{:>10} {spread:<22}{:>10}{ratio:>10}",
                label(line.peer, line.means),
                nanoseconds(median),
                nanoseconds(median / size.div_ceil(PAGE) as f64),
            );
        }
    }
    let _ = writeln!(
        text,
        "\nwhat one page of 4 KiB more costs, beside Table 1 of SOSP 1993 (DECstation 5000/200)\n  {:<20}{:>10}{:>12}   {:<20}{:>10}{:>10}",
        "today", "µs", "Mb/s", "1993", "µs", "Mb/s"
    );
    let megabits =
        |micros: f64| if micros > 0.0 { format!("{:.0}", PAGE as f64 * 8.0 / micros) } else { "-".to_owned() };
    for line in &lines {
        let Some(micros) = increment(line, &sizes) else { continue };
        let (then, cost) = in_1993(line.peer, line.means);
        let (old, rate) = cost.map_or_else(Default::default, |cost| (format!("{cost:.0}"), megabits(cost)));
        let today = label(line.peer, line.means);
        let _ = writeln!(text, "  {today:<20}{micros:>10.3}{:>12}   {then:<20}{old:>10}{rate:>10}", megabits(micros));
    }
    let _ = writeln!(
        text,
        "  {:<20}{:>10}{:>12}   {:<20}{:>10}{:>10}",
        "(none: all recycle)",
        "",
        "",
        "volatile",
        21,
        megabits(21.0)
    );
    text
}

/// Writes fbuf-protection.html: the same, and a plot.
pub(crate) fn write(outcomes: &[Outcome], folder: &Path) -> Result<()> {
    let sizes = sizes(outcomes);
    let curves: Vec<_> = lines(outcomes)
        .iter()
        .map(|line| Curve {
            label: label(line.peer, line.means),
            points: sizes.iter().filter_map(|&size| Some((size as f64, line.cost(size)?.median))).collect(),
        })
        .collect();
    let Machine { processor, kernel, commit, .. } = Machine::here();
    let axes = Axes { x: "size of a message", y: nanoseconds, legend: SeriesLabelPosition::UpperLeft };
    let plot = draw("one message, one way, a word of each page touched", axes, &curves)?;
    let page = format!(
        "<!DOCTYPE html><meta charset=\"utf-8\"><title>fbuf bench protection</title>\n<style>body{{font:15px/1.5 \
         sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}svg{{max-width:100%}}</style>\n<h1>What protection \
         costs</h1>\n<p>{processor}; {kernel}; fbuf {commit}. Two processes, each on a processor of its own.</p>\n{plot}\n<pre>{}</pre>\n",
        tables(outcomes)
    );
    fs::create_dir_all(folder)?;
    Ok(fs::write(folder.join("fbuf-protection.html"), page)?)
}
