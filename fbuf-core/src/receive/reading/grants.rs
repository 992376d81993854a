//! The rights to write slots that this process made for a sender, and hands to it: at first, and again whenever a message
//! is let go. A right that cannot be given now, for lack of descriptors or of room, is tried again.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::eventfd::EventFd;

use crate::{
    memory::{CannotReopen, Leasable},
    points,
    slot::SlotId,
    socket::{
        PacketSocket,
        link_message::{self, LinkEnd, LinkMessage, WriteGrant},
        wire::Descriptor,
    },
};

/// The rights that are still to be given over a link.
#[derive(Debug)]
pub(crate) struct Grants {
    pending: Mutex<Pending>,
    /// What wakes the receiver, which tries it again.
    wake: Option<Arc<EventFd>>,
}

#[derive(Debug)]
struct Pending {
    grants: Vec<PendingGrant>,
    /// Why they are not given.
    why: Option<CannotReopen>,
    /// Which reason was told.
    told: Option<CannotReopen>,
}

impl Grants {
    /// Before any of these slots was given.
    pub(crate) fn new(memory: &[Arc<Leasable>]) -> Self {
        let grant = |(slot, memory): (u32, &Arc<Leasable>)| PendingGrant {
            slot: SlotId::new(slot),
            memory: memory.clone(),
            first: true,
        };
        let grants = (0..).zip(memory).map(grant).collect();
        Self { pending: Mutex::new(Pending { grants, why: None, told: None }), wake: None }
    }

    /// Has the receiver woken by this when another thread could not give a right.
    pub(crate) fn wake_by(&mut self, wake: Arc<EventFd>) {
        self.wake = Some(wake);
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        // A panic while it was locked cannot have left it half changed.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the right to write a slot back, of which nothing is read here any more.
    pub(crate) fn give_back(&self, slot: SlotId, memory: &Arc<Leasable>, socket: &PacketSocket) {
        self.lock().grants.push(PendingGrant { slot, memory: memory.clone(), first: false });
        if !self.settle(socket)
            && let Some(wake) = &self.wake
        {
            // The receiver may sleep, and would have no reason to try it again. A counter that is full wakes as well.
            let _ = wake.write(1);
        }
    }

    /// Gives those that can be given now: whether none is left.
    pub(crate) fn settle(&self, socket: &PacketSocket) -> bool {
        let mut pending = self.lock();
        pending.why = PendingGrant::give_all(&mut pending.grants, socket);
        pending.grants.is_empty()
    }

    /// Why they cannot be given, if there is a reason that was not told yet.
    pub(crate) fn withholds_anew(&self) -> Option<CannotReopen> {
        let mut pending = self.lock();
        let is_new = pending.why != pending.told;
        pending.told = pending.why;
        pending.why.filter(|_| is_new)
    }
}

/// The right to write a slot that nobody reads, which its sender has to be given.
#[derive(Debug)]
struct PendingGrant {
    slot: SlotId,
    memory: Arc<Leasable>,
    /// Whether the sender has to be given the slot as well.
    first: bool,
}

impl PendingGrant {
    /// Gives those of these that can be given now, in order. The rest, from the first that cannot on, stays: what keeps that
    /// one, keeps the others too. What that is, if it is anything of this process.
    fn give_all(all: &mut Vec<Self>, socket: &PacketSocket) -> Option<CannotReopen> {
        let mut why = None;
        let is_given = |due: &&Self| due.give(socket).map_err(|reason| why = reason).is_ok();
        let given = all.iter().take_while(is_given).count();
        all.drain(..given);
        why
    }

    /// Gives it. If it cannot now, it is to be tried again: why, if it is known. A sender that is gone needs nothing.
    fn give(&self, socket: &PacketSocket) -> Result<(), Option<CannotReopen>> {
        let cannot = |error: io::Error| CannotReopen::of(&error);
        let writer = Descriptor::from(self.memory.open_writer().map_err(cannot)?);
        // An open file of its own: a lease goes by those.
        let reader = if self.first { Some(Descriptor::from(self.memory.open_reader().map_err(cannot)?)) } else { None };
        points::reach("grant: opened");
        let right = LinkMessage::WriteGrant(WriteGrant { slot: self.slot.number(), writer, reader });
        if let Err(LinkEnd::Exhausted(_)) = link_message::send(socket, &right) {
            return Err(None);
        }
        points::reach("grant: sent");
        Ok(())
    }
}
