//! What it costs when there are many: clients, channels, receivers of one sender, senders to one receiver; and
//! beside a client that gives the broker, or a receiver, as much to do as it can. The broker is a process of its own, and so are
//! the others.

mod attach;
mod broker;
mod connection;
mod crowd;
mod fan;
mod figure;
mod flood;
mod hoard;
mod holdings;
mod hostile_links;
mod hostile_sender;
mod idle;
mod neighbour;

use std::{fs, io::Write, path::Path, time::Duration};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use plotters::chart::SeriesLabelPosition;

use self::figure::{Figure, Subject};
use crate::{
    Result,
    machine::Machine,
    options::Common,
    report::{Axes, Curve, draw},
    table,
};

pub(crate) use crowd::be as crowd;
pub(crate) use flood::be as neighbour;

/// Slots of all senders here but those of streams, so that what is measured is not their memory.
const SLOT: usize = 64;
const SLOTS: usize = 4;
/// Longer than anything takes here, also on a machine that is busy.
const SOON: Duration = Duration::from_secs(300);

/// How much of everything.
#[derive(Debug, Clone, Copy)]
struct Extent {
    clients: u32,
    runs: usize,
    time: Duration,
}

impl Extent {
    /// Those of these numbers that are less, and the greatest one.
    fn up_to(numbers: &[u32], most: u32) -> Vec<u32> {
        numbers.iter().copied().filter(|&number| number < most).chain([most]).collect()
    }
}

/// Measures all of it, writes the results to `out`, and writes a report if a folder for it is given.
pub(crate) fn run(clients: u32, common: Common, folder: Option<&Path>, out: &mut dyn Write) -> Result<()> {
    // Each client takes descriptors, here and in processes that are started from here.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let extent = Extent { clients, runs: common.runs, time: common.time()? };
    let mut all = Vec::new();
    for measure in [attach::measure, fan::measure, idle::measure, neighbour::measure, hostile_links::measure] {
        let figures = measure(extent)?;
        if common.json {
            for figure in &figures {
                writeln!(out, "{}", serde_json::to_string(figure)?)?;
            }
        } else {
            write!(out, "{}", figure::tables(&figures))?;
        }
        all.extend(figures);
    }
    if let Some(folder) = folder {
        write(&all, folder)?;
        if !common.json {
            writeln!(out, "\nwritten to {}", folder.join("fbuf-scale.html").display())?;
        }
    }
    Ok(())
}

/// Writes fbuf-scale.html: the tables, and a plot of what grows.
fn write(figures: &[Figure], folder: &Path) -> Result<()> {
    let plot = |subject: Subject, caption, x| {
        let mut curves: Vec<Curve> = Vec::new();
        for figure in figures.iter().filter(|figure| figure.subject == subject && figure.unit == figure::Unit::Ns) {
            let point = (f64::from(figure.count), figure.value.median);
            match curves.iter_mut().find(|curve| curve.label == figure.what) {
                Some(curve) => curve.points.push(point),
                None => curves.push(Curve { label: figure.what.clone(), points: vec![point] }),
            }
        }
        draw(caption, Axes { x, y: table::nanoseconds, legend: SeriesLabelPosition::UpperLeft }, &curves)
    };
    let Machine { processor, processors, kernel, commit, .. } = Machine::here();
    let page = format!(
        "<!DOCTYPE html><meta charset=\"utf-8\"><title>fbuf bench scale</title>\n<style>body{{font:15px/1.5 \
         sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}svg{{max-width:100%}}</style>\n<h1>What it costs \
         when there are many</h1>\n<p>{processor}, {processors} processors; {kernel}; fbuf {commit}.</p>\n{}\n{}\n<pre>{}</pre>\n",
        plot(Subject::Attach, "attaching beside others", "clients that are there")?,
        plot(Subject::FanOut, "one sender, a message of 64 bytes", "receivers")?,
        figure::tables(figures)
    );
    fs::create_dir_all(folder)?;
    Ok(fs::write(folder.join("fbuf-scale.html"), page)?)
}
