//! A broker's metrics, in the format that Prometheus reads, over HTTP: `fbuf broker --metrics 127.0.0.1:9464`.

use std::{convert::Infallible, fmt, io, time::Duration};

use fbuf_broker::Broker;
use fbuf_client::{EndpointStatus, Report};
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

use super::{is_suspect, role};

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
    registry.register_collector(Box::new(Look { endpoints: broker.status().await, used: broker.used() }));
    encode(&mut text, &registry).map_err(io::Error::other)?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Response::builder().header(CONTENT_TYPE, kind).body(Full::from(text)).map_err(io::Error::other)
}

/// What there was to see at one moment.
#[derive(Debug)]
struct Look {
    endpoints: Vec<EndpointStatus>,
    used: Vec<(u32, Resource, u64)>,
}

/// A number of each endpoint: its name, what it means, whether it only grows, and where it is found.
type Column = (&'static str, &'static str, MetricType, fn(&Report) -> u64);

const COLUMNS: [Column; 11] = [
    ("links", "Peers that an endpoint is linked with", MetricType::Gauge, |report| report.links),
    ("messages", "Messages sent or received", MetricType::Counter, |report| report.messages),
    ("bytes", "Bytes in these messages", MetricType::Counter, |report| report.bytes),
    ("left_out", "Messages left out for receivers that asked for it", MetricType::Counter, |report| report.left_out),
    ("waits", "Times that a sender found no free slot", MetricType::Counter, |report| report.waits),
    ("sleeps", "Times that an endpoint slept", MetricType::Counter, |report| report.sleeps),
    ("violations", "Peers that broke a rule", MetricType::Counter, |report| report.violations),
    ("slots", "Slots of a sender", MetricType::Gauge, |report| report.slots),
    ("held", "Messages that a receiver holds", MetricType::Gauge, |report| report.held),
    ("oldest_held_milliseconds", "How long a receiver has been seen to hold one", MetricType::Gauge, |report| {
        report.oldest.map_or(0, |oldest| oldest.milliseconds)
    }),
    ("forgotten", "Whether a receiver may have forgotten one", MetricType::Gauge, |report| is_suspect(report).into()),
];

impl Collector for Look {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // Those without endpoints as well.
        let clients = self.used.iter().filter(|(_, resource, _)| *resource == Resource::Connections);
        let channels: std::collections::HashSet<_> = self.endpoints.iter().map(|endpoint| &endpoint.channel).collect();
        let totals = [
            ("clients", "Processes' connections to the broker", clients.map(|(_, _, used)| used).sum()),
            ("channels", "Channels", channels.len() as u64),
            ("endpoints", "Endpoints", self.endpoints.len() as u64),
        ];
        for (name, help, count) in totals {
            encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&count)?;
        }
        for (name, help, kind, of) in COLUMNS {
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            for endpoint in &self.endpoints {
                let Some(report) = &endpoint.report else { continue };
                let labels = [
                    ("channel", endpoint.channel.clone()),
                    ("end", role(endpoint.end).to_owned()),
                    ("pid", endpoint.process.pid.to_string()),
                    ("uid", endpoint.process.uid.to_string()),
                    ("number", endpoint.number.to_string()),
                ];
                let mut one = metric.encode_family(&labels)?;
                match kind {
                    MetricType::Counter => one.encode_counter::<NoLabelSet, u64, u64>(&of(report), None)?,
                    _ => one.encode_gauge(&of(report))?,
                }
            }
        }
        let mut metric = encoder.encode_descriptor("used", "What users take up", None, MetricType::Gauge)?;
        for &(user, resource, used) in &self.used {
            let labels = [("uid", user.to_string()), ("resource", resource.name().to_owned())];
            metric.encode_family(&labels)?.encode_gauge(&used)?;
        }
        Ok(())
    }
}
