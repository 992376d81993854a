//! A broker's metrics, in the format that Prometheus reads, over HTTP: `fbuf broker --metrics 127.0.0.1:9464`.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    fmt, io,
    time::Duration,
};

use fbuf_broker::{
    Broker,
    tally::{Counts, Group, Line, Name},
};
use fbuf_client::Report;
use fbuf_protocol::Resource;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet, text::encode},
    metrics::MetricType,
    registry::Registry,
};
use tokio::net::TcpListener;
use tracing::{debug, warn};

use super::is_suspect;

/// How long somebody who asks has for saying what.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers whoever asks, until it is dropped.
pub(crate) async fn serve(listener: TcpListener, broker: Broker) -> Infallible {
    loop {
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                warn!(%error, "somebody who asks for metrics could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let broker = broker.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(request, &broker));
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(PATIENCE).keep_alive(false);
            if let Err(error) = server.serve_connection(TokioIo::new(connection), service).await {
                debug!(%error, "somebody asked for metrics and did not wait for them");
            }
        });
    }
}

async fn answer(request: Request<Incoming>, broker: &Broker) -> io::Result<Response<Full<Bytes>>> {
    if request.method() != Method::GET || request.uri().path() != "/metrics" {
        let mut nothing = Response::new(Full::from("there is GET /metrics, and nothing else\n"));
        *nothing.status_mut() = StatusCode::NOT_FOUND;
        return Ok(nothing);
    }
    let mut text = String::new();
    let mut registry = Registry::with_prefix("fbuf");
    let (lines, channels, used) = (broker.tally().await, broker.channels(), broker.used());
    registry.register_collector(Box::new(Look { lines, channels, used }));
    encode(&mut text, &registry).map_err(io::Error::other)?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Response::builder().header(CONTENT_TYPE, kind).body(Full::from(text)).map_err(io::Error::other)
}

/// What there was to see at one moment.
#[derive(Debug)]
struct Look {
    lines: Vec<Line>,
    channels: usize,
    used: Vec<(u32, Resource, u64)>,
}

/// What only grows: its name, what it means, and where it is found.
type Counter = (&'static str, &'static str, fn(&Counts) -> u64);

const COUNTERS: [Counter; 6] = [
    ("messages", "Messages sent or received", |counts| counts.messages),
    ("bytes", "Bytes in these messages", |counts| counts.bytes),
    ("left_out", "Messages left out for receivers that asked for it", |counts| counts.left_out),
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
    ("forgotten", "Receivers that may have forgotten one", |line| sum(line, |report| is_suspect(report).into())),
];

fn sum(line: &Line, of: fn(&Report) -> u64) -> u64 {
    line.reports.iter().map(of).fold(0, u64::saturating_add)
}

/// The most users whose resources are series of their own: those with the lowest ids.
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

    fn text(look: Look) -> String {
        let (mut text, mut registry) = (String::new(), Registry::with_prefix("fbuf"));
        registry.register_collector(Box::new(look));
        encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn a_rest_is_told_apart_from_all_that_users_can_name() {
        let program = Program::from_bytes(b"a\"b\\");
        let name = |channel: &str, label: &str| {
            let (channel, label) = (channel.to_owned(), Label::new(label).ok());
            Group::Alike(Name { user: 7, channel, program: program.clone(), label })
        };
        let groups = [name("other", "other"), name("other", ""), Group::RestOf(7), Group::Rest];
        let line = |group| Line { group, sends: true, endpoints: 1, counts: Counts::default(), reports: Vec::new() };
        let text = text(Look { lines: groups.map(line).into(), channels: 1, used: Vec::new() });
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
