//! Where the requests of one client are answered.

use std::{
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use fbuf_core::{
    memory::{Leasable, MemoryError},
    peer::Credentials,
    points,
    process::foreign::Foreign,
    slot::Geometry,
    socket::wire::Descriptor,
};
use fbuf_protocol::{
    ClientStatus, Control, EndpointStatus, MAX_PAGE, News, Open, Opened, Page, Refusal, Report, Role, Slots, Unpaired,
    Wire, name::Program,
};
use tarpc::context::Context;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::{Broker, LOOKS, LOOKS_OF_NOTE, lock, mailbox::Mailbox};
use crate::{state::ClientId, tally::Name};

/// How long a client waits for news before it is told that there are none.
const NEWS_TIME: Duration = Duration::from_secs(600);

/// Where the requests of one client are answered.
#[derive(Debug, Clone)]
pub(super) struct Session {
    pub broker: Broker,
    pub client: ClientId,
    pub process: Credentials,
    pub program: Program,
    pub mailbox: Arc<Mailbox>,
}

/// Makes the slots of a sender, each of which its user may lease. They cost nothing before that one uses
/// them.
fn make_slots(geometry: Geometry, huge: bool, owner: u32) -> Result<Vec<Arc<Foreign>>, MemoryError> {
    let make = |_| {
        let slot = Leasable::create("fbuf-slot", geometry.cell_bytes(), huge, owner)?;
        Ok(Arc::new(OwnedFd::from(slot).into()))
    };
    (0..geometry.max_slots()).map(make).collect()
}

impl Session {
    /// Of which user it may see clients and endpoints; none: of all.
    fn sees(&self) -> Option<u32> {
        let own = nix::unistd::geteuid().as_raw();
        Some(self.process.uid).filter(|&user| user != 0 && user != own)
    }

    /// Opens an endpoint, and introduces the first of those that it is paired with.
    pub(super) fn open_here(&self, endpoint: u64, open: Open) -> Result<Opened, Refusal> {
        let (now, user) = (Instant::now(), self.process.uid);
        let mut inner = lock(&self.broker.0);
        let (role, channel, was_open) = (open.role, open.channel.clone(), open.earlier.is_some());
        let name = role.name();
        let label = open.label.as_ref().map(|Wire(label)| label);
        let alike = Name { user, channel: channel.clone(), program: self.program.clone(), label: label.cloned() };
        let opening = inner.state.open(self.client, endpoint, open);
        let looks = inner.state.take_looks();
        inner.state.note_work(self.client, looks / LOOKS, now);
        let logs = inner.log_limit.may_log(user, now);
        let opening = opening.inspect_err(|refusal| {
            if logs {
                warn!(client = ?self.client, channel, role = name, %refusal, "refused");
            }
        })?;
        let mut opened = Opened { endpoint: opening.endpoint, secret: opening.secret, slots: Vec::new() };
        points::reach("broker: opened");
        if let Role::Sender { geometry, slots: Slots::Broker { huge }, .. } = role {
            let geometry = Geometry::try_from(geometry)?;
            match make_slots(geometry, huge, user) {
                Ok(slots) => {
                    points::reach("broker: slots made");
                    opened.slots = slots.iter().cloned().map(Descriptor::from).collect();
                    inner.slots.entry(self.client).or_default().insert(endpoint, slots);
                    if let Some(charge) = inner.state.paid_for_slots(self.client, endpoint) {
                        self.mailbox.note_sent(charge);
                    }
                }
                Err(error) => {
                    inner.close(self.client, endpoint);
                    if logs {
                        warn!(client = ?self.client, channel, %error, "no slots to be leased");
                    }
                    return Err(Refusal::NoSlots { reason: error.to_string() });
                }
            }
        }
        if logs {
            info!(client = ?self.client, channel, role = name, links = opening.pairs.len(), "opened");
        }
        inner.tally.open((self.client, endpoint), alike, matches!(role, Role::Sender { .. }), was_open, now);
        inner.introduce(&opening, user);
        Ok(opened)
    }
}

impl Control for Session {
    async fn open(self, _: Context, endpoint: u64, open: Open) -> Result<Opened, Wire<Refusal>> {
        let opened = self.open_here(endpoint, open).map_err(Wire)?;
        self.broker.pair_now(self.client, self.process.uid).await;
        Ok(opened)
    }

    async fn close(self, _: Context, endpoint: u64, last: Report) {
        debug!(client = ?self.client, endpoint, "closed");
        let mut inner = lock(&self.broker.0);
        inner.tally.note(self.client, endpoint, last);
        inner.close(self.client, endpoint);
    }

    async fn news(self, _: Context, receipt: u64) -> News {
        if self.mailbox.acknowledge(receipt) {
            self.broker.pair_now(self.client, self.process.uid).await;
        }
        timeout(NEWS_TIME, self.mailbox.news()).await.unwrap_or_default()
    }

    async fn report(self, _: Context, reports: Page<(u64, Report)>, last: bool) {
        let mut inner = lock(&self.broker.0);
        inner.state.note_work(self.client, reports.len() * LOOKS_OF_NOTE / LOOKS, Instant::now());
        reports.into_iter().for_each(|(endpoint, report)| inner.tally.note(self.client, endpoint, report));
        if last {
            inner.note_answer(self.client);
        }
    }

    async fn status(self, _: Context, behind: u64) -> Vec<EndpointStatus> {
        let user = self.sees();
        if behind == 0 {
            self.broker.ask_for_reports(user, Some(self.client)).await;
        }
        self.broker.page_of(self.client, user, behind)
    }

    async fn unpaired(self, _: Context, endpoint: u64, behind: u64) -> Vec<(u64, Wire<Unpaired>)> {
        let inner = lock(&self.broker.0);
        let (mut unpaired, looked) = inner.state.unpaired(self.client, endpoint, behind);
        inner.state.note_work(self.client, looked / LOOKS, Instant::now());
        unpaired.truncate(MAX_PAGE);
        unpaired.into_iter().map(|(number, one)| (number, Wire(one))).collect()
    }

    async fn clients(self, _: Context, behind: u64) -> Vec<ClientStatus> {
        lock(&self.broker.0).state.clients(self.sees(), behind).take(MAX_PAGE).collect()
    }
}
