//! A broker's metrics, in the format that Prometheus reads, over HTTP: `fbuf broker --metrics 127.0.0.1:9464`.

mod server;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use fbuf_broker::{
    Broker,
    tally::{Counts, Group, Line, Name},
};
use fbuf_protocol::{Report, Resource};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet, text::encode},
    metrics::MetricType,
    registry::Registry,
};

pub(crate) use self::server::serve;
use super::is_suspect;

/// What there is to see now.
async fn text(broker: &Broker) -> Result<String, fmt::Error> {
    let (lines, channels, used) = (broker.tally().await, broker.channels(), broker.used());
    Look { lines, channels, used }.text()
}

/// What there was to see at one moment.
#[derive(Debug)]
struct Look {
    lines: Vec<Line>,
    channels: usize,
    used: Vec<(u32, Resource, u64)>,
}

impl Look {
    fn text(self) -> Result<String, fmt::Error> {
        let (mut text, mut registry) = (String::new(), Registry::with_prefix("fbuf"));
        registry.register_collector(Box::new(self));
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// What only grows: its name, what it means, and where it is found.
type Counter = (&'static str, &'static str, fn(&Counts) -> u64);

const COUNTERS: [Counter; 6] = [
    ("messages", "Messages sent or received", |counts| counts.messages),
    ("bytes", "Bytes in these messages", |counts| counts.bytes),
    ("left_out", "Messages left out for receivers that asked for it, or by lossy senders", |counts| counts.left_out),
    ("waits", "Times that a sender found no free slot", |counts| counts.waits),
    ("sleeps", "Times that an endpoint slept", |counts| counts.sleeps),
    ("violations", "Peers that broke a rule", |counts| counts.violations),
];

/// What is the case now: its name, what it means, and how it is found.
type Gauge = (&'static str, &'static str, fn(&Line) -> u64);

const GAUGES: [Gauge; 6] = [
    ("endpoints", "Endpoints that are open", |line| line.endpoints),
    ("links", "Peers that endpoints are linked with", |line| sum(line, |report| report.links)),
    ("slots", "Slots of senders", |line| sum(line, |report| report.slots)),
    ("held", "Messages that receivers hold", |line| sum(line, |report| report.held)),
    ("oldest_held_milliseconds", "How long a receiver has been seen to hold one", |line| {
        line.reports.iter().filter_map(|report| report.oldest).map(|oldest| oldest.milliseconds).max().unwrap_or(0)
    }),
    ("forgotten", "Receivers that may have forgotten one", |line| {
        sum(line, |report| is_suspect(&(*report).into()).into())
    }),
];

fn sum(line: &Line, of: fn(&Report) -> u64) -> u64 {
    line.reports.iter().map(of).fold(0, u64::saturating_add)
}

/// The resources of at most so many users, those with the lowest ids, are series of their own.
const MAX_USERS: usize = 256;

/// What each user takes up, and what all users together do that have no series of their own.
fn used(all: &[(u32, Resource, u64)]) -> BTreeMap<(Option<u32>, Resource), u64> {
    let users: BTreeSet<_> = all.iter().map(|&(user, ..)| user).collect();
    let last = users.iter().nth(MAX_USERS - 1).copied().unwrap_or(u32::MAX);
    let mut used = BTreeMap::new();
    for &(user, resource, amount) in all {
        let sum: &mut u64 = used.entry((Some(user).filter(|&user| user <= last), resource)).or_default();
        *sum = sum.saturating_add(amount);
    }
    used
}

/// What stands in the place of names in a series of what is summed up.
fn other() -> (&'static str, String) {
    ("other", "true".to_owned())
}

/// What a series is told apart by. No two lines have the same: what is alike has a channel, and the rest has none.
fn labels(line: &Line) -> Vec<(&'static str, String)> {
    let end = ("end", if line.sends { "sender" } else { "receiver" }.to_owned());
    match &line.group {
        Group::Alike(Name { user, channel, program, label }) => {
            let (user, channel) = (("uid", user.to_string()), ("channel", channel.clone()));
            let label = label.as_ref().map(|label| ("label", label.to_string()));
            [end, user, channel, ("program", program.to_string())].into_iter().chain(label).collect()
        }
        Group::RestOf(user) => vec![end, ("uid", user.to_string()), other()],
        Group::Rest => vec![end, other()],
    }
}

impl Collector for Look {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // Those without endpoints as well.
        let clients = self.used.iter().filter(|(_, resource, _)| *resource == Resource::Connections);
        let totals = [
            ("clients", "Processes' connections to the broker", clients.map(|(_, _, used)| used).sum()),
            ("channels", "Channels", self.channels as u64),
        ];
        for (name, help, count) in totals {
            encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&count)?;
        }
        for (name, help, of) in COUNTERS {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for line in &self.lines {
                metric.encode_family(&labels(line))?.encode_counter::<NoLabelSet, u64, u64>(&of(&line.counts), None)?;
            }
        }
        for (name, help, of) in GAUGES {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for line in &self.lines {
                metric.encode_family(&labels(line))?.encode_gauge(&of(line))?;
            }
        }
        let mut metric = encoder.encode_descriptor("used", "What users take up", None, MetricType::Gauge)?;
        for ((user, resource), used) in used(&self.used) {
            let user = user.map_or_else(other, |user| ("uid", user.to_string()));
            metric.encode_family(&[user, ("resource", resource.name().to_owned())])?.encode_gauge(&used)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fbuf_client::{Label, Program};

    #[test]
    fn a_rest_is_told_apart_from_all_that_users_can_name() {
        let program = Program::from_bytes(b"a\"b\\");
        let name = |channel: &str, label: &str| {
            let (channel, label) = (channel.to_owned(), Label::new(label).ok());
            Group::Alike(Name { user: 7, channel, program: program.clone(), label })
        };
        let groups = [name("other", "other"), name("other", ""), Group::RestOf(7), Group::Rest];
        let line = |group| Line { group, sends: true, endpoints: 1, counts: Counts::default(), reports: Vec::new() };
        let text = Look { lines: groups.map(line).into(), channels: 1, used: Vec::new() }.text().unwrap();
        let series: Vec<_> = text.lines().filter(|line| line.starts_with("fbuf_endpoints{")).collect();
        let alike = r#"end="sender",uid="7",channel="other",program="a\"b\\""#;
        assert_eq!(
            series,
            [
                &*format!("fbuf_endpoints{{{alike},label=\"other\"}} 1"),
                &*format!("fbuf_endpoints{{{alike}}} 1"),
                r#"fbuf_endpoints{end="sender",uid="7",other="true"} 1"#,
                r#"fbuf_endpoints{end="sender",other="true"} 1"#,
            ]
        );
    }

    #[test]
    fn many_users_are_one_series_behind_the_first_ones() {
        let all: Vec<_> = (0..1000).map(|user| (user, Resource::Links, 2)).collect();
        let used = used(&all);
        assert_eq!(used.len(), MAX_USERS + 1);
        assert_eq!(used[&(None, Resource::Links)], 2 * (1000 - MAX_USERS as u64));
        assert_eq!(used[&(Some(0), Resource::Links)], 2);
    }
}
