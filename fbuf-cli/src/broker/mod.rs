//! `fbuf broker`: the broker as a service.

mod handed;
mod log;

use std::{
    env, fs,
    io::{self, stderr},
    net::{SocketAddr, TcpListener},
    os::unix::fs::DirBuilderExt,
    path::PathBuf,
};

use fbuf_broker::{Broker, Listener, Policy, PolicyError};
use fbuf_client::Address;
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::geteuid,
};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;

use self::{
    handed::{Handed, set_nonblocking},
    log::Log,
};
use crate::{
    Failure, Place,
    standard::{has_colours, print},
    user,
    watch::metrics,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What each user may do, as a TOML file, read again on SIGHUP [default: the user that runs the broker may do everything]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["allow", "trust"])]
    policy: Option<PathBuf>,
    /// Say what a policy allows, or what is wrong with it, and end
    #[arg(long, value_name = "FILE", exclusive = true)]
    check_policy: Option<PathBuf>,
    /// Answer GET /metrics over HTTP at this address, for Prometheus; any process that can connect can read them. TCP sockets that a
    /// service manager hands over are served too
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
    /// Serve this user too; what users send to each other is sealed
    #[arg(long, value_name = "USER", value_parser = user)]
    allow: Vec<u32>,
    /// Serve this user too, and let others get its messages volatile or leased, as it sends them
    #[arg(long, value_name = "USER", value_parser = user)]
    trust: Vec<u32>,
}

impl Arguments {
    fn policy(&self) -> Result<Policy, PolicyError> {
        if let Some(path) = &self.policy {
            return Policy::read(path);
        }
        let allowed = self.allow.iter().fold(Policy::own(), |policy, &user| policy.allow(user));
        Ok(self.trust.iter().fold(allowed, |policy, &user| policy.trust(user)))
    }
}

pub(crate) fn run(arguments: Arguments, place: &Place) -> Result<(), Failure> {
    if let Some(path) = &arguments.check_policy {
        return print(Policy::read(path)?);
    }
    // tarpc has a line for each request that expired, and clients choose when that is.
    let asked = env::var(EnvFilter::DEFAULT_ENV).ok().filter(|asked| !asked.is_empty());
    let asked = asked.map(EnvFilter::try_new).transpose();
    let unclear = asked.as_ref().err().map(ToString::to_string);
    let usual = || EnvFilter::new("warn,tarpc=off,fbuf=info,fbuf_broker=info");
    let filter = asked.ok().flatten().unwrap_or_else(usual);
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Log);
    log.with_ansi(has_colours(&stderr())).log_internal_errors(false).init();
    if let Some(error) = unclear {
        warn!(error, "RUST_LOG is not understood, and left aside");
    }
    allow_descriptors();
    let policy = arguments.policy()?;
    name_unknown(&policy);
    let runtime = fbuf_protocol::runtime::new()?;
    // Before there is a socket: the first process of a container does not hear a signal that it does not catch.
    let [mut terminate, mut interrupt, mut reload] = {
        let _context = runtime.enter();
        let [terminate, interrupt, hangup] = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()];
        [signal(terminate)?, signal(interrupt)?, signal(hangup)?]
    };
    let Handed { clients, mut metrics } = Handed::take()?;
    let (listener, name) = match clients {
        Some(listener) => (listener, "the socket that was handed over".to_owned()),
        None => {
            let address = place.address();
            make_folder(&address);
            (Listener::bind(&address)?, address.to_string())
        }
    };
    open_for(&listener, &policy)?;
    let broker = Broker::new(policy);
    runtime.block_on(async {
        if let Some(address) = arguments.metrics {
            metrics.push(listen_for_metrics(address)?);
        }
        let addresses = metrics.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<_>>>()?;
        metrics::serve(metrics, broker.clone())?;
        let until = async {
            // The socket listens and signals are caught: from here on clients are served.
            info!(place = name, "listening");
            addresses.iter().for_each(|address| info!(%address, "metrics"));
            tell(&[NotifyState::Ready]);
            loop {
                tokio::select! {
                    _ = terminate.recv() => break,
                    _ = interrupt.recv() => break,
                    _ = reload.recv() => read_again(&arguments, &broker, &listener),
                }
            }
            tell(&[NotifyState::Stopping]);
            info!("stopping; links that exist go on");
        };
        broker.serve(&listener, until).await
    })?;
    Ok(())
}

/// Opens the socket at which metrics are asked for.
fn listen_for_metrics(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address).map_err(|error| {
        io::Error::other(format!("metrics were to be answered at {address}: {error}; choose another --metrics"))
    })?;
    set_nonblocking(&listener)?;
    Ok(listener)
}

/// Puts the policy in force that is in the file now. One that cannot be used leaves the one before.
fn read_again(arguments: &Arguments, broker: &Broker, listener: &Listener) {
    let reloading = NotifyState::monotonic_usec_now().map(|now| vec![NotifyState::Reloading, now]);
    tell(&reloading.unwrap_or_default());
    let read = arguments.policy().map_err(|error| error.to_string());
    let read = read.and_then(|policy| {
        open_for(listener, &policy).map_err(|error| error.to_string())?;
        name_unknown(&policy);
        broker.set_policy(policy);
        Ok(())
    });
    match read {
        Ok(()) => info!("the policy was read again"),
        Err(error) => error!(error, "the policy was not read again: the one before stays in force"),
    }
    tell(&[NotifyState::Ready]);
}

/// Says which users and groups of the policy this machine does not know: its rules are about the others.
fn name_unknown(policy: &Policy) {
    for (rule, unknown) in policy.unknown() {
        warn!(rule, unknown, "the policy names what this machine does not know, and goes without");
    }
}

/// Lets the users connect that the policy is about.
fn open_for(listener: &Listener, policy: &Policy) -> io::Result<()> {
    if policy.is_about_others_than(geteuid().as_raw()) { listener.open_to_all() } else { Ok(()) }
}

/// Each client takes a descriptor, and each introduction two until both clients have fetched it.
fn allow_descriptors() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        warn!(%error, "the limit on descriptors could not be raised");
    }
}

/// The folder of the default socket is missing on a machine where no broker ever ran.
fn make_folder(address: &Address) {
    if let Address::Path(path) = address
        && let Some(folder) = path.parent()
        && !folder.as_os_str().is_empty()
        && !folder.exists()
    {
        // If it fails, binding says why.
        let _ = fs::DirBuilder::new().mode(0o755).create(folder);
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "the service manager could not be told");
    }
}
