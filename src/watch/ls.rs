//! `fbuf ls`: every endpoint, once.

use fbuf_client::{EndStatus, EndpointStatus, Report};
use serde_json::{Value, json};

use super::{age, is_suspect, protection, role, short, sorted};
use crate::{Failure, Place};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// One line of JSON for each endpoint
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let endpoints = sorted(arguments.place.connect()?.status()?);
    if arguments.json {
        endpoints.iter().for_each(|endpoint| println!("{}", line(endpoint)));
        return Ok(());
    }
    if endpoints.is_empty() {
        println!("no endpoint is open");
        return Ok(());
    }
    let heads = ["channel", "end", "process", "user", "protection", "links", "messages", "bytes", "left out", "waits"];
    let rows = endpoints.iter().map(cells);
    print!("{}", table(&[&heads[..], &["sleeps", "violations", "slots", "held", "oldest"]].concat(), rows));
    Ok(())
}

fn cells(endpoint: &EndpointStatus) -> Vec<String> {
    let EndpointStatus { process, channel, end, report, .. } = endpoint;
    let mut cells =
        vec![channel.clone(), role(*end).into(), process.pid.to_string(), process.uid.to_string(), protection(*end)];
    match report {
        None => cells.push("does not answer".into()),
        Some(report) => {
            let Report { links, messages, bytes, left_out, waits, sleeps, violations, slots, held, oldest } = report;
            let numbers = [links, messages, bytes, left_out, waits, sleeps, violations, slots, held];
            cells.extend(numbers.map(|&number| short(number as f64)));
            cells.push(age(*oldest) + if is_suspect(report) { ", forgotten?" } else { "" });
        }
    }
    cells
}

/// Columns as wide as they need to be, two spaces apart.
fn table(heads: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let rows: Vec<_> = std::iter::once(heads.iter().map(|head| (*head).to_owned()).collect()).chain(rows).collect();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<_> = (0..heads.len()).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// Everything that is known of an endpoint.
fn line(endpoint: &EndpointStatus) -> Value {
    let EndpointStatus { number, endpoint: known_as, process, client, channel, end, report } = endpoint;
    let mut line = json!({
        "number": number, "endpoint": known_as, "channel": channel, "end": role(*end), "client": client,
        "pid": process.pid, "uid": process.uid, "gid": process.gid, "protection": protection(*end),
    });
    if let EndStatus::Sender { slot_bytes, max_slots, .. } = end {
        line["slot_bytes"] = (*slot_bytes).into();
        line["max_slots"] = (*max_slots).into();
    }
    if let Some(report) = report {
        let Report { links, messages, bytes, left_out, waits, sleeps, violations, slots, held, oldest } = report;
        line["report"] = json!({
            "links": links, "messages": messages, "bytes": bytes, "left_out": left_out, "waits": waits,
            "sleeps": sleeps, "violations": violations, "slots": slots, "held": held,
            "oldest_sequence": oldest.map(|oldest| oldest.sequence), "oldest_behind": oldest.map(|oldest| oldest.behind),
            "oldest_ms": oldest.map(|oldest| oldest.milliseconds), "forgotten": is_suspect(report),
        });
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a".to_owned(), "long cell".to_owned()], vec!["much longer".to_owned()]];
        assert_eq!(table(&["x", "y"], rows.into_iter()), "x            y\na            long cell\nmuch longer\n");
    }
}
