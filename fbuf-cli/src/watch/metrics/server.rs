//! Answers that ask for metrics, on a thread of its own. Any process that can connect may ask, and no user is charged for it: so
//! connections are few and end soon, and all that ask within a moment get the same text. The thread that serves clients does
//! nothing for it but to say what there is.

use std::{convert::Infallible, io, net, sync::Arc, time::Duration};

use fbuf_broker::Broker;
use fbuf_core::process::threads;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::CONTENT_TYPE,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Mutex, Semaphore},
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

use super::text;

/// How many connections there are at most; others are closed at once.
const MAX_CONNECTIONS: usize = 16;
/// How long a connection has for its request,
const REQUEST_TIME: Duration = Duration::from_secs(1);
/// and for all, the answer included.
const CONNECTION_TIME: Duration = Duration::from_secs(5);
/// What the kernel keeps of an answer that is not read.
const SEND_BUFFER: usize = 64 << 10;
/// For how long a text is what there is.
const TEXT_TIME: Duration = Duration::from_millis(400);
/// After one that was closed at once the next waits so long, and after an error of accept(2).
const REFUSAL_PAUSE: Duration = Duration::from_millis(1);
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// What is the same for all that ask.
struct Asked {
    broker: Broker,
    places: Arc<Semaphore>,
    /// The last text, and since when there is a next.
    latest: Mutex<Option<(Instant, Bytes)>>,
}

/// Answers at these sockets for as long as the process lives.
///
/// # Errors
/// There is no thread, or there are no descriptors for its runtime.
pub(crate) fn serve(listeners: Vec<net::TcpListener>, broker: Broker) -> io::Result<()> {
    if listeners.is_empty() {
        return Ok(());
    }
    let runtime = fbuf_protocol::runtime::new()?;
    let listeners: Vec<_> = {
        let _context = runtime.enter();
        listeners.into_iter().map(TcpListener::from_std).collect::<io::Result<_>>()?
    };
    let asked = Asked { broker, places: Arc::new(Semaphore::new(MAX_CONNECTIONS)), latest: Mutex::default() };
    let asked = Arc::new(asked);
    threads::spawn("fbuf-metrics", move || {
        runtime.block_on(async {
            for listener in listeners {
                tokio::spawn(asked.clone().listen(listener));
            }
            std::future::pending().await
        })
    })?;
    Ok(())
}

impl Asked {
    async fn listen(self: Arc<Self>, listener: TcpListener) -> Infallible {
        loop {
            let connection = match listener.accept().await {
                Ok((connection, _)) => connection,
                Err(error) => {
                    warn!(%error, "a connection for metrics could not be accepted");
                    sleep(ERROR_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = self.places.clone().try_acquire_owned() else {
                drop(connection);
                sleep(REFUSAL_PAUSE).await;
                continue;
            };
            let this = self.clone();
            tokio::spawn(async move {
                let served = timeout(CONNECTION_TIME, this.serve(connection)).await;
                if let Ok(Err(error)) = served {
                    debug!(%error, "metrics were asked for, and not waited for");
                }
                drop(place);
            });
        }
    }

    async fn serve(&self, connection: TcpStream) -> hyper::Result<()> {
        // Else it would keep megabytes. If this is refused, it does.
        let _ = setsockopt(&connection, sockopt::SndBuf, &SEND_BUFFER);
        let service = service_fn(|request| self.answer(request));
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIME).keep_alive(false);
        server.serve_connection(TokioIo::new(connection), service).await
    }

    async fn answer(&self, request: Request<Incoming>) -> io::Result<Response<Full<Bytes>>> {
        if request.method() != Method::GET || request.uri().path() != "/metrics" {
            let mut nothing = Response::new(Full::from("there is GET /metrics, and nothing else\n"));
            *nothing.status_mut() = StatusCode::NOT_FOUND;
            return Ok(nothing);
        }
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        Response::builder().header(CONTENT_TYPE, kind).body(Full::from(self.text().await?)).map_err(io::Error::other)
    }

    /// The text that is shared by all that ask within a moment: they wait for the one that has it made.
    async fn text(&self) -> io::Result<Bytes> {
        let mut latest = self.latest.lock().await;
        if let Some((until, text)) = &*latest
            && Instant::now() < *until
        {
            return Ok(text.clone());
        }
        let text = Bytes::from(text(&self.broker).await.map_err(io::Error::other)?);
        *latest = Some((Instant::now() + TEXT_TIME, text.clone()));
        Ok(text)
    }
}
