//! `fbuf ls`: everything that is open, once.

use fbuf_client::{EndStatus, EndpointStatus, Report};
use serde_json::{Value, json};

use super::{
    lines::{By, Line, Subject, lines},
    protection, role,
};
use crate::{Failure, Place, standard::print};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to list: each by itself, or all of a channel or of a client together
    #[arg(long, value_enum, value_name = "WHAT", default_value = "endpoint")]
    by: By,
    /// A line of JSON for each
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments, place: &Place) -> Result<(), Failure> {
    let client = place.connect()?;
    let endpoints: Vec<_> = client.status()?.into_iter().map(|endpoint| (endpoint, None)).collect();
    let clients = if arguments.by == By::Client { client.clients()? } else { Vec::new() };
    let lines = lines(arguments.by, &endpoints, &clients);
    print(if arguments.json {
        lines.iter().map(|line| format!("{}\n", to_json(line))).collect()
    } else if lines.is_empty() {
        "no endpoint is open\n".to_owned()
    } else {
        let apart = endpoints.iter().filter_map(|(endpoint, _)| apart(endpoint));
        table(&arguments.by.heads(), lines.iter().map(cells)) + &apart.collect::<String>()
    })
}

fn cells(line: &Line) -> Vec<String> {
    line.cells().into_iter().chain(line.note().map(str::to_owned)).collect()
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

/// With which endpoints of its channel one is not paired, in words.
fn apart(endpoint: &EndpointStatus) -> Option<String> {
    let EndpointStatus { endpoint: known_as, channel, end, unpaired, first_unpaired, .. } = endpoint;
    let more = match unpaired {
        ..=1 => String::new(),
        many => format!(", nor with {} more", many - 1),
    };
    let first = first_unpaired.as_ref()?;
    Some(format!("{} {known_as} of {channel:?} is {first}{more}\n", role(*end)))
}

/// Everything that is known.
fn to_json(line: &Line) -> Value {
    let mut value = match &line.subject {
        Subject::Endpoint(endpoint) => of_endpoint(endpoint),
        Subject::Channel { channel, senders, receivers } => {
            json!({ "channel": channel, "senders": senders, "receivers": receivers })
        }
        Subject::Client { client, channels } => json!({
            "client": client.number, "pid": client.process.pid, "uid": client.process.uid, "gid": client.process.gid,
            "program": client.program.as_str(), "endpoints": client.endpoints, "channels": channels,
        }),
    };
    if let Some(report) = &line.report {
        let Report { links, messages, bytes, left_out, waits, sleeps, violations, slots, held, oldest, .. } = report;
        value["report"] = json!({
            "links": links, "messages": messages, "bytes": bytes, "left_out": left_out, "waits": waits,
            "sleeps": sleeps, "violations": violations, "slots": slots, "held": held,
            "oldest_sequence": oldest.map(|oldest| oldest.sequence), "oldest_behind": oldest.map(|oldest| oldest.behind),
            "oldest_ms": oldest.map(|oldest| oldest.milliseconds), "forgotten": line.is_suspect,
        });
    }
    value
}

fn of_endpoint(endpoint: &EndpointStatus) -> Value {
    let EndpointStatus { number, endpoint: known_as, process, program, label, client, channel, end, .. } = endpoint;
    let EndpointStatus { unpaired, first_unpaired, .. } = endpoint;
    let mut value = json!({
        "number": number, "endpoint": known_as, "channel": channel, "end": role(*end), "client": client,
        "pid": process.pid, "uid": process.uid, "gid": process.gid, "program": program.as_str(),
        "label": label.as_ref().map(|label| label.as_str()),
        "protection": protection(*end),
    });
    if let Some(first) = first_unpaired {
        value["unpaired"] = (*unpaired).into();
        value["first_unpaired"] = json!({
            "endpoint": first.peer.endpoint, "pid": first.peer.process.pid, "uid": first.peer.process.uid,
            "why": first.why.to_string(),
        });
    }
    if let EndStatus::Sender { slot_bytes, max_slots, .. } = end {
        value["slot_bytes"] = (*slot_bytes).into();
        value["max_slots"] = (*max_slots).into();
    }
    value
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
