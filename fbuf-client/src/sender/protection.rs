//! By which means a sender protects its messages: what was asked for, what this machine gives, and why.

use std::{fmt, sync::Arc};

use fbuf_core::{
    introduced::Introduced,
    memory::{HUGE_PAGE, MemoryError, Pages, free_huge_pages, has_transparent_pages},
    peer::LinkId,
    protection::{Mechanism, Protection},
    send::{
        link::{Expected, Peer},
        pool::Format,
        pool::Pool,
    },
};
use fbuf_protocol::{Opened, Refusal, Report, Role, Slots, name::Label};

use crate::{
    acceptance::Acceptance,
    client::{Client, OpenError, Registration},
    endpoint::{Brought, LinkSink, NO_ROOM, PendingLinks},
    link_source::LinkSource,
};

/// From how many bytes on messages are leased rather than copied if they lie in huge pages. `fbuf doctor`
/// measures from where on that costs less on a machine.
pub const LEASE_FROM: u64 = HUGE_PAGE;
/// The same in base pages, each of which is mapped and unmapped by itself.
pub const LEASE_BASE_FROM: u64 = 8 << 20;

/// What was asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ProtectionRequest {
    Level(Protection),
    Means(Mechanism),
    /// Out of the receiver's pool.
    FromReceiver,
    /// One-shots, since the channel is confidential.
    Confidential,
}

impl ProtectionRequest {
    /// Whether slots may be leased, of which there are few.
    pub(crate) fn may_lease(self, slot_size: u64) -> bool {
        match self {
            Self::Level(level) => level == Protection::Leased && slot_size >= LEASE_FROM,
            Self::Means(mechanism) => mechanism == Mechanism::Lease,
            Self::FromReceiver => true,
            Self::Confidential => false,
        }
    }
}

/// By which means a sender protects what it sends.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProtectionInfo {
    /// The means.
    pub mechanism: Mechanism,
    /// In which pages its slots lie, if each is memory of its own and of this process.
    pub pages: Option<Pages>,
    /// Why, in words.
    pub reason: String,
}

impl fmt::Display for ProtectionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.mechanism)?;
        if let Some(pages) = self.pages {
            write!(f, " in {pages}")?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// A pool, and the place at the broker to which its receivers come.
pub(crate) struct Place {
    pub pool: Pool,
    pub pending_links: Arc<PendingLinks<NewReceiver>>,
    pub registration: Registration,
    pub protection_info: ProtectionInfo,
}

/// How slots are to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Segments(Mechanism),
    Leased(Pages),
    Receiver,
}

/// What a pool is made of.
pub(crate) struct OpenRequest<'a> {
    pub client: &'a Client,
    pub channel: &'a str,
    pub label: Option<Label>,
    pub wanted: ProtectionRequest,
    pub format: Format,
    /// Slots to start with.
    pub start: u32,
    pub guarded: bool,
    /// In which pages at most slots are leased.
    pub pages: Pages,
    pub acceptance: Acceptance,
}

impl OpenRequest<'_> {
    /// Opens the sender by the best means that can be had of those that were asked for.
    pub(crate) fn open(&self) -> Result<Place, OpenError> {
        let (plan, mut reason) = match self.wanted {
            ProtectionRequest::Level(Protection::Leased) if self.slot_bytes() < LEASE_FROM => {
                let what = format!("slots of {} bytes are copied sooner than leased", self.slot_bytes());
                (Plan::Segments(Mechanism::Copy), what)
            }
            ProtectionRequest::Level(Protection::Leased) | ProtectionRequest::Means(Mechanism::Lease) => {
                return self.lease();
            }
            ProtectionRequest::Level(level @ Protection::Sealed) => {
                (Plan::Segments(Mechanism::Copy), format!("{level} was asked for"))
            }
            ProtectionRequest::Level(level) => (Plan::Segments(Mechanism::Shared), format!("{level} was asked for")),
            ProtectionRequest::Means(mechanism) => (Plan::Segments(mechanism), "asked for".to_owned()),
            ProtectionRequest::FromReceiver => (Plan::Receiver, "the slots are the receiver's".to_owned()),
            ProtectionRequest::Confidential => {
                (Plan::Segments(Mechanism::OneShot), "the channel is confidential".to_owned())
            }
        };
        if self.guarded {
            reason += ", with a guard";
        }
        self.attempt(plan, reason)
    }

    fn slot_bytes(&self) -> u64 {
        self.format.geometry.slot_bytes().into()
    }

    /// By leases, or else by copying.
    fn lease(&self) -> Result<Place, OpenError> {
        let asked = matches!(self.wanted, ProtectionRequest::Means(_));
        let size = self.slot_bytes();
        let geometry = self.format.geometry;
        let needed = geometry.cell_bytes().div_ceil(HUGE_PAGE) * u64::from(geometry.max_slots());
        let mut why = match self.pages {
            Pages::Huge => format!("{} of {needed} huge pages are free (vm.nr_hugepages)", free_huge_pages()),
            pages => format!("no more than {pages} were asked for"),
        };
        if self.pages == Pages::Huge && size >= HUGE_PAGE && free_huge_pages() >= needed {
            match self.attempt(Plan::Leased(Pages::Huge), "huge pages were free".to_owned()) {
                Err(error) => why = reason_to_go_on(error)?,
                place => return place,
            }
        }
        let transparent = self.pages != Pages::Base && has_transparent_pages();
        let pays_in_base = size >= LEASE_BASE_FROM;
        let too_small = || format!("slots of {size} bytes in base pages are copied sooner than leased");
        if !asked && !transparent && !pays_in_base {
            return self.attempt(Plan::Segments(Mechanism::Copy), format!("{}, and {why}", too_small()));
        }
        let pages = if transparent { Pages::Transparent } else { Pages::Base };
        match self.attempt(Plan::Leased(pages), why) {
            Ok(place) if !asked && !pays_in_base && place.protection_info.pages == Some(Pages::Base) => {
                drop(place);
                self.attempt(Plan::Segments(Mechanism::Copy), format!("{}, and no others were had", too_small()))
            }
            Err(error) => {
                let reason = reason_to_go_on(error)?;
                self.attempt(Plan::Segments(Mechanism::Copy), reason)
            }
            place => place,
        }
    }

    fn attempt(&self, plan: Plan, reason: String) -> Result<Place, OpenError> {
        let pending_links = Arc::new(PendingLinks::new()?);
        let (mechanism, slots) = match plan {
            Plan::Segments(mechanism) => (mechanism, Slots::Segments),
            Plan::Leased(pages) => (Mechanism::Lease, Slots::Broker { huge: pages == Pages::Huge }),
            Plan::Receiver => (Mechanism::Lease, Slots::Receiver),
        };
        let (format, wake) = (self.format, pending_links.wake().clone());
        // What needs nothing of the broker comes first: it may not be possible.
        let pool = match plan {
            Plan::Segments(Mechanism::OneShot) => Some(Pool::of_one_shots(format, self.start, wake.clone())?),
            Plan::Segments(_) => Some(match self.guarded {
                true => Pool::with_guard(format, self.start, wake.clone(), self.channel)?,
                false => Pool::new(format, self.start, wake.clone())?,
            }),
            Plan::Receiver => Some(Pool::of_receiver(format, wake.clone())?),
            Plan::Leased(_) => None,
        };
        let role = Role::Sender { geometry: self.format.geometry.terms(), mechanism, slots };
        let users = self.acceptance.users.clone();
        let post =
            Box::new(Receivers { pending_links: LinkSource::new(&pending_links), acceptance: self.acceptance.clone() });
        let (registration, Opened { slots, .. }) =
            self.client.open(self.channel, role, self.label.clone(), users, post)?;
        let (pool, pages) = match pool {
            Some(pool) => (pool, None),
            None => {
                let slots: Result<Vec<_>, _> = slots.into_iter().map(|memory| memory.into_owned()).collect();
                let pages = if let Plan::Leased(pages) = plan { pages } else { Pages::Base };
                let slots = slots?;
                // SAFETY: the broker, which is accepted (`Accepted`), has just made them for this endpoint, and nothing else
                // has had them.
                #[expect(unsafe_code, reason = "only here is it known that the broker has made them")]
                let made = unsafe { Pool::of_leases(format, slots, pages, wake) };
                let (pool, pages) = made?;
                (pool, Some(pages))
            }
        };
        Ok(Place { pool, pending_links, registration, protection_info: ProtectionInfo { mechanism, pages, reason } })
    }
}

/// A receiver that will say hello, or why it cannot.
pub(super) type NewReceiver = Result<Expected, (Peer, String)>;

impl Brought for NewReceiver {
    fn is_void(&self) -> Option<Peer> {
        self.as_ref().ok().filter(|expected| expected.has_hung_up()).map(Expected::peer)
    }
}

/// Where receivers are introduced.
struct Receivers {
    pending_links: LinkSource<NewReceiver>,
    acceptance: Acceptance,
}

impl LinkSink for Receivers {
    fn introduce(&self, introduced: Introduced) {
        let peer = introduced.peer();
        // One that is not accepted, or for which there is no room, sees the socket hang up.
        if !self.acceptance.accepts(&peer) {
            return;
        }
        if self.pending_links.admit(&peer, introduced.descriptors(), 0, 0) {
            self.pending_links.post(peer, Ok(introduced.expect()));
        } else {
            self.pending_links.fail(peer, Some(NO_ROOM.into()));
        }
    }

    fn fail(&self, peer: Peer, reason: String) {
        if self.acceptance.accepts(&peer) {
            self.pending_links.post(peer, Err((peer, reason)));
        }
    }

    fn links(&self) -> Vec<LinkId> {
        self.pending_links.links()
    }

    fn report(&self) -> Report {
        self.pending_links.report()
    }

    fn held(&self) -> Vec<(LinkId, usize, u64)> {
        Vec::new()
    }
}

/// Whether something else can be tried, and in words why.
fn reason_to_go_on(error: OpenError) -> Result<String, OpenError> {
    match error {
        OpenError::Memory(error @ MemoryError::Refused { .. }) => Ok(error.to_string()),
        OpenError::Memory(error @ MemoryError::NotEnough { .. }) => Ok(error.to_string()),
        OpenError::Refused(Refusal::NoSlots { reason }) => Ok(reason),
        other => Err(other),
    }
}
