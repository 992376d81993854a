//! The report: one HTML file with plots and tables, and the same as JSON.

use std::{fmt::Write as _, fs, path::Path};

use plotters::prelude::*;
use serde::Serialize;

use crate::{
    Result,
    machine::Machine,
    outcome::{Measured, Once, Outcome, Row, Spread},
    peers::Peer,
    table::{bytes, nanoseconds, rate_of},
    terms::{Mode, name},
};

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report<'a> {
    pub(crate) machine: Machine,
    pub(crate) runs: &'a [Outcome],
    pub(crate) once: &'a [Once],
    /// By peer; empty where there is no valgrind.
    pub(crate) instructions: &'a [(Peer, f64)],
}

/// One curve: its name, and its points.
pub(crate) struct Curve {
    pub(crate) label: String,
    pub(crate) points: Vec<(f64, f64)>,
}

impl Report<'_> {
    /// Writes fbuf-bench.html and fbuf-bench.json.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        fs::write(folder.join("fbuf-bench.json"), serde_json::to_string_pretty(self)?)?;
        fs::write(folder.join("fbuf-bench.html"), self.html()?)?;
        Ok(())
    }

    fn html(&self) -> Result<String> {
        let Machine { processor, processors, caches, kernel, commit } = &self.machine;
        let mut page = String::from(
            "<!DOCTYPE html><meta charset=\"utf-8\"><title>fbuf bench</title>\n<style>body{font:15px/1.5 sans-serif;\
             max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;margin:1em 0}td,th{padding:.15em \
             .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}svg{max-width:\
             100%}</style>\n<h1>fbuf bench</h1>\n",
        );
        writeln!(
            page,
            "<p>{processor}, {processors} processors, {caches}; {kernel}; fbuf {commit}. Two processes, each on a \
             processor of its own; medians of runs made in turn.</p>"
        )?;
        let workloads = ["latency", "stream", "depth", "wakeup", "fan-out", "fan-in"];
        for workload in workloads {
            let runs: Vec<_> = self.runs.iter().filter(|run| run.workload == workload).collect();
            if runs.is_empty() {
                continue;
            }
            writeln!(page, "<h2>{}</h2>", title(workload))?;
            for mode in [Mode::Untouched, Mode::Written, Mode::Touched] {
                let runs: Vec<_> = runs.iter().copied().filter(|run| run.mode == mode).collect();
                page.push_str(&plot(workload, mode, &runs)?);
                page.push_str(&tables(&runs)?);
            }
        }
        if !self.instructions.is_empty() {
            page.push_str("<h2>Instructions for a message of 64 B, both sides together</h2>\n<table>\n");
            for (peer, count) in self.instructions {
                writeln!(page, "<tr><td>{}<td>{count:.1}", name(*peer))?;
            }
            page.push_str("</table>\n");
        }
        page.push_str("<h2>Once</h2>\n<table>\n<tr><th>step<th>median<th>spread\n");
        for Once { step, nanoseconds: Spread { median, least, most } } in self.once {
            let [median, least, most] = [median, least, most].map(|&ns| nanoseconds(ns));
            writeln!(page, "<tr><td>{step}<td>{median}<td>{least}–{most}")?;
        }
        page.push_str("</table>\n");
        Ok(page)
    }
}

fn title(workload: &str) -> &str {
    match workload {
        "latency" => "Latency: half of a round trip, median",
        "stream" => "Stream: one way",
        "depth" => "Depth: a stream over few and many slots",
        "wakeup" => "Wake-up: latency at low rates",
        "fan-out" => "Fan-out: one sender, several receivers on one processor",
        "fan-in" => "Fan-in: several senders on one processor, one receiver",
        other => other,
    }
}

/// The medians of the headline figure, by row.
fn medians(runs: &[&Outcome]) -> Vec<(Row, usize, Spread)> {
    let mut keys: Vec<(Row, usize)> = Vec::new();
    for run in runs {
        if !keys.contains(&(run.row(), run.size)) {
            keys.push((run.row(), run.size));
        }
    }
    let of = |(row, size)| runs.iter().filter(move |run| (run.row(), run.size) == (row, size));
    keys.into_iter()
        .filter_map(|(row, size)| Some((row, size, Spread::of(of((row, size)).map(|run| run.headline()))?)))
        .collect()
}

/// A plot of what can be plotted: over the size, or over the bytes in flight.
fn plot(workload: &str, mode: Mode, runs: &[&Outcome]) -> Result<String> {
    let medians = medians(runs);
    let mut curves: Vec<Curve> = Vec::new();
    let mut add = |label: String, point| match curves.iter_mut().find(|curve| curve.label == label) {
        Some(curve) => curve.points.push(point),
        None => curves.push(Curve { label, points: vec![point] }),
    };
    for &(row, size, Spread { median, .. }) in &medians {
        let gb = median * size as f64 / 1e9;
        match (workload, row.slots) {
            ("latency", _) => add(name(row.peer), (size as f64, median)),
            ("stream", _) => add(name(row.peer), (size as f64, gb)),
            ("depth", Some(slots)) => {
                add(format!("{}, {}", name(row.peer), bytes(size)), (f64::from(slots) * size as f64, gb));
            }
            _ => {}
        }
    }
    curves.retain(|curve| curve.points.len() > 1);
    if curves.is_empty() {
        return Ok(String::new());
    }
    let gb: fn(f64) -> String = |value| format!("{value} GB/s");
    let axes = match workload {
        "latency" => Axes { x: "size of a message", y: nanoseconds, legend: SeriesLabelPosition::UpperLeft },
        "stream" => Axes { x: "size of a message", y: gb, legend: SeriesLabelPosition::LowerRight },
        _ => Axes { x: "bytes in flight", y: gb, legend: SeriesLabelPosition::LowerRight },
    };
    draw(&format!("{workload}, {}", name(mode)), axes, &curves)
}

/// What stands at the axes, and where the names of the curves stand.
pub(crate) struct Axes {
    pub(crate) x: &'static str,
    pub(crate) y: fn(f64) -> String,
    pub(crate) legend: SeriesLabelPosition,
}

/// Both axes are logarithmic; sizes are told as powers of two.
pub(crate) fn draw(caption: &str, axes: Axes, curves: &[Curve]) -> Result<String> {
    let values = |of: fn(&(f64, f64)) -> f64| curves.iter().flat_map(|curve| curve.points.iter()).map(of);
    let range = |of: fn(&(f64, f64)) -> f64| {
        values(of).fold(f64::INFINITY, f64::min)..values(of).fold(f64::NEG_INFINITY, f64::max)
    };
    let (x, y) = (range(|point| point.0.log2()), range(|point| point.1));
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (900, 420)).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(caption, ("sans-serif", 18))
            .margin(8)
            .x_label_area_size(40)
            .y_label_area_size(70)
            .build_cartesian_2d(x.start - 0.5..x.end + 0.5, (y.start * 0.8..y.end * 1.25).log_scale())?;
        chart
            .configure_mesh()
            .x_desc(axes.x)
            .x_labels((x.end - x.start) as usize + 2)
            .x_label_formatter(&|power| bytes(power.exp2().round() as usize))
            .y_label_formatter(&|value| (axes.y)(*value))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (index, curve) in curves.iter().enumerate() {
            let color = Palette99::pick(index).to_rgba();
            let mut sorted: Vec<_> = curve.points.iter().map(|&(x, y)| (x.log2(), y)).collect();
            sorted.sort_by(|one, other| one.0.total_cmp(&other.0));
            chart
                .draw_series(LineSeries::new(sorted, color.stroke_width(2)).point_size(3))?
                .label(&curve.label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
        }
        chart.configure_series_labels().position(axes.legend).background_style(WHITE.mix(0.8)).draw()?;
        area.present()?;
    }
    Ok(svg)
}

fn tables(runs: &[&Outcome]) -> Result<String> {
    let mut text = String::new();
    if runs.is_empty() {
        return Ok(text);
    }
    text.push_str(
        "<table>\n<tr><th>peer<th>size<th>slots<th>wait<th>others<th>rate/s<th>median<th>spread<th>GB/s<th>CPU\n",
    );
    for (row, size, Spread { median, least, most }) in medians(runs) {
        let Some(one) = runs.iter().find(|run| run.row() == row && run.size == size) else { continue };
        let cpu = Spread::of(
            runs.iter().filter(|run| run.row() == row && run.size == size).map(|run| run.cpu_s / run.seconds),
        );
        let (figure, gb): (fn(f64) -> String, _) = match one.figures {
            Measured::Latency { .. } => (nanoseconds, String::new()),
            Measured::Stream { .. } => (rate_of, format!("{:.2}", median * size as f64 / 1e9)),
        };
        writeln!(
            text,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}–{}<td>{gb}<td>{:.2}",
            name(row.peer),
            bytes(size),
            row.slots.map_or_else(String::new, |slots| slots.to_string()),
            name(row.wait),
            row.others,
            row.rate.map_or_else(String::new, |rate| rate.to_string()),
            figure(median),
            figure(least),
            figure(most),
            cpu.map_or(0.0, |cpu| cpu.median),
        )?;
    }
    text.push_str("</table>\n");
    Ok(text)
}
