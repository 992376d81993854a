//! How clients come in: they are accepted, admitted or sent away, wait for their turn, and are greeted.
//!
//! What comes before the turn is all that a flood of connections can have done at once, so it is little: the queue of
//! the socket is one for all users, and each connection waits for those before it.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use fbuf_core::{
    limits::{MAX_GROUPS, MAX_PROGRAM},
    peer::Credentials,
    points,
    process::sys,
    socket::{Arrival, PacketSocket, wire},
};
use fbuf_protocol::{
    Greeting, VERSION, Verdict, Wire,
    name::Program,
    runtime::{self, Watched},
};
use nix::{errno::Errno, unistd::geteuid};
use tokio::{
    task::{JoinSet, yield_now},
    time::{MissedTickBehavior, interval},
};
use tracing::{debug, error, warn};

use super::{Broker, Member, lock};
use crate::{
    Listener,
    listener::Standing,
    policy::User,
    state::{Admission, Dismissal, Payer},
};

/// How long to wait for descriptors when there are none left.
const PAUSE: Duration = Duration::from_millis(100);
/// How often to look whether clients still find the socket.
const LOOK: Duration = Duration::from_secs(1);

/// A process that has connected and may become a client.
pub(super) struct PendingClient {
    socket: PacketSocket,
    process: Credentials,
    admission: Admission,
}

impl PendingClient {
    /// The user that pays for what it asks for.
    pub(super) fn payer(&self) -> &Payer {
        self.admission.payer()
    }

    /// Whether it did not wait.
    pub(super) fn has_left(&self) -> bool {
        self.socket.hung_up()
    }
}

/// The program that a process runs, which is not known of one that has ended, that lives in another PID namespace, or that
/// this process may not see. Another may have its id by now: it is no more than a name.
fn program(process: Credentials) -> Program {
    let mut name = [0; MAX_PROGRAM];
    let file = (process.pid > 0).then(|| File::open(format!("/proc/{}/comm", process.pid)));
    match file.map(|file| file.and_then(|mut file| file.read(&mut name))) {
        Some(Ok(length)) => Program::from_bytes(&name[..length]),
        _ => Program::default(),
    }
}

/// Greets back.
fn say(socket: &PacketSocket, verdict: Verdict) -> io::Result<()> {
    socket.send_bytes(&Greeting { version: VERSION, verdict }.to_bytes())
}

impl Broker {
    /// Accepts connections, for ever, and attends to those that are admitted.
    pub(super) async fn accept(&self, listener: &Listener) -> io::Result<()> {
        let mut socket = runtime::watch_listener(listener.socket()?)?;
        let mut clients = JoinSet::new();
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_lost = false;
        loop {
            let mut ready = tokio::select! {
                ready = socket.readable() => ready?,
                _ = looks.tick() => {
                    match listener.look().map_err(io::Error::other)? {
                        Standing::Found => is_lost = false,
                        Standing::MadeAnew => {
                            warn!("the socket file was gone, and was made anew");
                            socket = runtime::watch_listener(listener.socket()?)?;
                            is_lost = false;
                        }
                        Standing::Lost(error) if !is_lost => {
                            error!(%error, "the socket file is gone: no client finds this broker until it can be made anew");
                            is_lost = true;
                        }
                        Standing::Lost(_) => {}
                    }
                    continue;
                }
            };
            match sys::accept(socket.get_ref().as_fd()) {
                Ok(connection) => match self.admit(connection) {
                    Ok(Some(client)) => drop(clients.spawn(self.clone().attend(client))),
                    Ok(None) => {}
                    Err(error) => debug!(%error, "a client could not be admitted"),
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) => {
                    // Out of descriptors, most likely: wait until some are free.
                    warn!(error = sys::said(&error), "a client could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
            while clients.try_join_next().is_some() {}
            // Clients have their turn after each, also while more and more connect.
            yield_now().await;
        }
    }

    /// Charges a connection to its user, or sends it away. Before anything else: connections that are accepted faster
    /// than they are attended to would else take all descriptors, whatever the quota.
    fn admit(&self, connection: OwnedFd) -> io::Result<Option<PendingClient>> {
        points::reach("broker: accepted");
        let socket = PacketSocket::accepted(connection);
        if socket.hung_up() {
            return Ok(None);
        }
        let process = socket.peer()?;
        // Root, and processes of the broker's own user, can stop it anyhow.
        let is_own = process.uid == 0 || process.uid == geteuid().as_raw();
        let socket = socket.with_peer(process.uid, is_own);
        let groups = match socket.peer_groups() {
            Err(error) if sys::os_error(&error) == Some(Errno::ERANGE) => {
                if self.may_log(process.uid) {
                    warn!(
                        pid = process.pid,
                        uid = process.uid,
                        most = MAX_GROUPS,
                        "sent away: it is in too many groups"
                    );
                }
                say(&socket.relayed_if_slow()?, Verdict::NotPermitted)?;
                return Ok(None);
            }
            groups => groups?,
        };
        let user = User::new(process.uid, groups);
        let admitted = lock(&self.0).state.admit(process, user);
        match admitted {
            Ok(admission) => {
                // Its place is taken until what it may have sent is closed.
                let socket = socket.with(admission.charge()).relayed_if_slow()?;
                Ok(Some(PendingClient { socket, process, admission }))
            }
            // Before it has greeted: a connection that is refused need not be waited for.
            Err(dismissal) => {
                if self.may_log(process.uid) {
                    warn!(pid = process.pid, uid = process.uid, ?dismissal, "sent away");
                }
                let socket = socket.relayed_if_slow()?;
                say(&socket, dismissal.verdict())?;
                if let Dismissal::QuotaExceeded(spent) = dismissal {
                    socket.send(&wire::encode(&Wire(spent)).map_err(io::Error::other)?)?;
                }
                Ok(None)
            }
        }
    }

    /// Greets a client, which has to greet first: `Some` if it was admitted.
    pub(super) async fn greet(&self, client: PendingClient) -> io::Result<Option<(Member, Watched<PacketSocket>)>> {
        let payer = client.payer().clone();
        let PendingClient { socket, process, admission } = client;
        let socket = runtime::watch(socket)?;
        let bytes = loop {
            let mut ready = socket.readable().await?;
            match socket.get_ref().receive_bytes::<64>()? {
                Arrival::Message(bytes, _) => break bytes,
                Arrival::Nothing => ready.clear_ready(),
                Arrival::HangUp => return Ok(None),
                Arrival::TooLong | Arrival::NoDescriptors => break Vec::new(),
            }
        };
        let greeting = Greeting::from_bytes(&bytes).map_err(io::Error::other)?;
        let program = program(process);
        let admission = admission.of(program.clone());
        let joined =
            if greeting.version == VERSION { lock(&self.0).state.join(admission) } else { Err(Verdict::OtherVersion) };
        let joined = joined.map(|client| Member { broker: self.clone(), client, process, program, payer });
        points::reach("broker: joined");
        let verdict = joined.as_ref().err().copied().unwrap_or(Verdict::Welcome);
        say(socket.get_ref(), verdict)?;
        points::reach("broker: greeted");
        match joined {
            Ok(member) => Ok(Some((member, socket))),
            Err(verdict) => {
                if self.may_log(process.uid) {
                    warn!(pid = process.pid, uid = process.uid, version = greeting.version, ?verdict, "sent away");
                }
                Ok(None)
            }
        }
    }
}
