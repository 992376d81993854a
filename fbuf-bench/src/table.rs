//! The results of one setting for people: a line for each peer, with medians, spreads and the ratio
//! to fbuf.

use std::io::{self, Write};

use crate::{
    outcome::{Measured, Outcome, Row, Spread},
    peers::Peer,
    terms::name,
};

/// Writes the runs of one setting, a line for each peer, way of waiting and number of slots.
pub(crate) fn write(out: &mut dyn Write, outcomes: &[Outcome]) -> io::Result<()> {
    let Some(first) = outcomes.first() else { return Ok(()) };
    let rate = first.rate_per_s.map_or_else(String::new, |rate| format!(", {rate:.0} messages a second"));
    writeln!(out, "\n{} of {}, {}{rate}", first.workload, bytes(first.size), name(first.mode))?;
    match first.figures {
        Measured::Latency { .. } => writeln!(
            out,
            "  {:<24}{:>9} {:<20}{:>9}{:>9}{:>9}{:>7}{:>8}",
            "peer", "p50", "(spread)", "p99", "p99.9", "max", "CPU", "ratio"
        ),
        Measured::Stream { .. } => writeln!(
            out,
            "  {:<24}{:>11} {:<20}{:>9} {:<18}{:>7}{:>8}",
            "peer", "messages/s", "(spread)", "GB/s", "(spread)", "CPU", "ratio"
        ),
    }?;
    let mut rows: Vec<Row> = Vec::new();
    for row in outcomes.iter().map(Outcome::row) {
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    rows.into_iter().try_for_each(|row| write_row(out, outcomes, row))
}

fn write_row(out: &mut dyn Write, outcomes: &[Outcome], row: Row) -> io::Result<()> {
    let runs: Vec<_> = outcomes.iter().filter(|outcome| outcome.row() == row).collect();
    let of = |figure: fn(&Outcome) -> f64| Spread::of(runs.iter().map(|&run| figure(run)));
    let (Some(first), Some(headline), Some(cpu)) =
        (runs.first(), of(Outcome::headline), of(|run| run.cpu_s / run.seconds))
    else {
        return Ok(());
    };
    let ratio = ratio(outcomes, row).map_or_else(String::new, |ratio| format!("{:.2}", ratio.median));
    let cpu = format!("{:.2}", cpu.median);
    let slots = row.slots.map_or_else(String::new, |slots| format!(", {slots}"));
    let others = if row.others > 1 { format!(", 1:{}", row.others) } else { String::new() };
    let label = format!("{} ({}{slots}{others})", name(row.peer), name(row.wait));
    match first.figures {
        Measured::Latency { .. } => {
            let median = |figure| of(figure).map_or_else(String::new, |spread| nanoseconds(spread.median));
            let spread = format!("({}–{})", nanoseconds(headline.least), nanoseconds(headline.most));
            writeln!(
                out,
                "  {label:<24}{:>9} {spread:<20}{:>9}{:>9}{:>9}{cpu:>7}{ratio:>8}",
                nanoseconds(headline.median),
                median(|run| quantiles(run)[1]),
                median(|run| quantiles(run)[2]),
                median(|run| quantiles(run)[3]),
            )
        }
        Measured::Stream { .. } => {
            let gb = headline.times(first.size as f64 / 1e9);
            writeln!(
                out,
                "  {label:<24}{:>11} {:<20}{:>9.2} {:<18}{cpu:>7}{ratio:>8}",
                rate_of(headline.median),
                format!("({}–{})", rate_of(headline.least), rate_of(headline.most)),
                gb.median,
                format!("({:.2}–{:.2})", gb.least, gb.most),
            )
        }
    }
}

/// What a row's figure is of fbuf's, run by run: of fbuf with the same slots or way of waiting, if there
/// are several.
pub(crate) fn ratio(outcomes: &[Outcome], row: Row) -> Option<Spread> {
    let fbuf = |run| {
        let mut all = outcomes.iter().filter(|outcome| outcome.peer == Peer::Fbuf && outcome.run == run);
        let like = |outcome: &&Outcome| (outcome.wait, outcome.slots) == (row.wait, row.slots);
        all.clone().find(like).or_else(|| all.next())
    };
    Spread::of(
        outcomes
            .iter()
            .filter(|outcome| outcome.row() == row)
            .filter_map(|outcome| Some(outcome.headline() / fbuf(outcome.run)?.headline())),
    )
}

fn quantiles(run: &Outcome) -> [f64; 4] {
    match run.figures {
        Measured::Latency { p50_ns, p99_ns, p999_ns, max_ns } => [p50_ns, p99_ns, p999_ns, max_ns].map(|ns| ns as f64),
        Measured::Stream { .. } => [f64::NAN; 4],
    }
}

/// A time, in three digits.
pub(crate) fn nanoseconds(ns: f64) -> String {
    digits(ns, &[(1e9, " s"), (1e6, " ms"), (1e3, " µs"), (1.0, " ns")])
}

/// A number of messages a second, in three digits.
pub(crate) fn rate_of(rate: f64) -> String {
    digits(rate, &[(1e6, " M"), (1e3, " k"), (1.0, "")])
}

fn digits(value: f64, units: &[(f64, &str)]) -> String {
    let Some(&(unit, name)) = units.iter().find(|(unit, _)| value >= *unit).or(units.last()) else {
        return value.to_string();
    };
    let value = value / unit;
    let places = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.places$}{name}")
}

/// A size, in the unit that it was most likely meant in.
pub(crate) fn bytes(size: usize) -> String {
    match size {
        _ if size >= 1 << 20 && size.is_multiple_of(1 << 20) => format!("{} MiB", size >> 20),
        _ if size >= 1 << 10 && size.is_multiple_of(1 << 10) => format!("{} KiB", size >> 10),
        _ => format!("{size} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        assert_eq!(nanoseconds(115.4), "115 ns");
        assert_eq!(nanoseconds(26_040.0), "26.0 µs");
        assert_eq!(nanoseconds(1_234_567.0), "1.23 ms");
        assert_eq!(rate_of(41_200_000.0), "41.2 M");
        assert_eq!(rate_of(7.0), "7.00");
        assert_eq!(bytes(65536), "64 KiB");
        assert_eq!(bytes(100), "100 B");
    }
}
