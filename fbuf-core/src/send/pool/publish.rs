//! How a message is sent, in one step: a [`Fbuf`] goes in, and its slot is lent over every link that takes it,
//! under a number that no message had before; or the fbuf comes out again. Slot, number and links never leave this
//! crate, so no caller can lend a slot that is being written, or lend one twice.

use std::{io, os::fd::OwnedFd, sync::Arc};

use super::Pool;
use crate::{
    memory::{Address, MemoryError, Sealed},
    points,
    send::{
        fbuf::{Fbuf, Outgoing},
        link::{Offer, Outbound},
        retained::Retained,
        storage::{Unkept, Unpublished},
    },
    slot::{Mark, SlotId},
};

/// A message that was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Its number.
    pub sequence: u64,
    /// How many bytes it has.
    pub length: u32,
    /// How many receivers it was lent to: none, if it was left out for all of them.
    pub receivers: usize,
}

/// An fbuf that was not sent.
#[derive(Debug)]
pub enum Unsent {
    /// It came from another pool.
    OtherPool(Fbuf),
    /// There is no receiver.
    NoReceiver(Fbuf),
    /// It could not be sealed for good: another process can write it, such as a child that was forked, and there is
    /// no memory for a copy.
    NotSealed {
        /// The fbuf.
        fbuf: Fbuf,
        /// What the kernel says.
        error: MemoryError,
    },
    /// It could not be passed to every receiver now, and none was told of it.
    NotPassed {
        /// The fbuf.
        fbuf: Fbuf,
        /// Which limit is in the way. It passes.
        reason: String,
    },
    /// It was to be kept, and cannot be mapped to be read on.
    NotKept {
        /// The fbuf.
        fbuf: Fbuf,
        /// Why not.
        error: MemoryError,
    },
    /// It cannot be had again to be written. The slot is free.
    Lost,
}

impl Pool {
    /// The number of the message that is sent next.
    #[must_use]
    #[inline]
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// Sends an fbuf to the one receiver there is, if that takes nothing but an entry in its lane.
    ///
    /// # Errors
    /// The fbuf, for [`Self::send`]: there is more to do.
    #[inline(always)]
    pub fn send_fast(&mut self, fbuf: Fbuf) -> Result<Published, Fbuf> {
        if !self.owns(&fbuf) {
            return Err(fbuf);
        }
        match &self.links[..] {
            [link] if link.is_simple::<false>() => self.send_simply::<false>(fbuf),
            [link] if link.is_simple::<true>() => self.send_simply::<true>(fbuf),
            _ => Err(fbuf),
        }
    }

    #[inline(always)]
    fn send_simply<const WIDE: bool>(&mut self, fbuf: Fbuf) -> Result<Published, Fbuf> {
        let [link] = &mut self.links[..] else { return Err(fbuf) };
        let length = fbuf.len() as u32;
        let outgoing = fbuf.into_outgoing();
        *self.ledger.at_mut(outgoing.slot.index()) = Mark::of(self.next_sequence);
        points::reach("write: taken");
        // What the call returns fits into a register: what this returns need never be in memory.
        if link.lend::<WIDE>(&outgoing) || self.notify() {
            return Ok(self.published(length, 1));
        }
        // It left before it read this one, and nothing is done to the slots of a simple link.
        *self.ledger.at_mut(outgoing.slot.index()) = Mark::OUT;
        Err(self.fbuf(outgoing))
    }

    /// The one receiver has a message, and sleeps or leaves: whether the message reached it.
    #[cold]
    #[inline(never)]
    fn notify(&mut self) -> bool {
        self.links.first_mut().is_some_and(|link| link.notify(self.next_sequence) == Offer::Lent)
    }

    /// Sends an fbuf to all receivers that take it.
    ///
    /// ```
    /// # use fbuf_core::{send::pool::{Pool, Unsent}, slot::Geometry};
    /// # let wake = nix::sys::eventfd::EventFd::new().unwrap().into();
    /// let mut pool = Pool::new(Geometry::new(64, 1).unwrap(), 1, wake).unwrap();
    /// pool.collect(1);
    /// let mut fbuf = pool.allocate().unwrap();
    /// fbuf.set_len(1).unwrap();
    /// let Err(Unsent::NoReceiver(mut fbuf)) = pool.send(fbuf) else { panic!("there is no receiver") };
    /// fbuf[0] = 1;
    /// ```
    ///
    /// What was given is not written any more:
    ///
    /// ```compile_fail,E0382
    /// # use fbuf_core::{send::pool::{Pool, Unsent}, slot::Geometry};
    /// # let wake = nix::sys::eventfd::EventFd::new().unwrap().into();
    /// let mut pool = Pool::new(Geometry::new(64, 1).unwrap(), 1, wake).unwrap();
    /// pool.collect(1);
    /// let mut fbuf = pool.allocate().unwrap();
    /// fbuf.set_len(1).unwrap();
    /// let _ = pool.send(fbuf);
    /// fbuf[0] = 1;
    /// ```
    ///
    /// # Errors
    /// [`Unsent`], with the fbuf in it.
    pub fn send(&mut self, fbuf: Fbuf) -> Result<Published, Unsent> {
        self.publish(fbuf, false).map(|(published, _)| published)
    }

    /// As [`Self::send`], but keeps the slot from being used again while the handle is there, through which the
    /// message can be read.
    ///
    /// # Errors
    /// [`Unsent`], with the fbuf in it; [`Unsent::NotKept`] if it cannot be kept: it was not sent.
    pub fn send_and_keep(&mut self, fbuf: Fbuf) -> Result<(Published, Retained), Unsent> {
        let (published, retained) = self.publish(fbuf, true)?;
        Ok((published, retained.ok_or(Unsent::Lost)?))
    }

    fn publish(&mut self, mut fbuf: Fbuf, keep: bool) -> Result<(Published, Option<Retained>), Unsent> {
        if !self.owns(&fbuf) {
            return Err(Unsent::OtherPool(fbuf));
        }
        if self.receivers() == 0 {
            return Err(Unsent::NoReceiver(fbuf));
        }
        // Once it is sealed, there is no way back but a copy.
        if let Some(why) = self.lacks_room_for(1) {
            return Err(Unsent::NotPassed { fbuf, reason: why.to_string() });
        }
        // While its own slot is known to be in use.
        let limit = self.limit();
        let is_lent = self.admit(limit) > 0;
        if self.sends_one_shots() && (is_lent || keep) {
            // Such a message is the beginning of its memory.
            let _ = fbuf.set_headroom(0);
        }
        let outgoing = fbuf.into_outgoing();
        let (slot, message) = (outgoing.slot, Mark::of(self.next_sequence));
        let mut retained = None;
        if keep && !self.sends_one_shots() {
            // While it can be an fbuf once more, whatever there is no memory for.
            match self.retain(&outgoing, self.next_sequence) {
                Ok(kept) => retained = Some(kept),
                Err(Unkept::Stale) => return Err(Unsent::NoReceiver(self.fbuf(outgoing))),
                Err(Unkept::NotMapped(error)) => return Err(Unsent::NotKept { fbuf: self.fbuf(outgoing), error }),
            }
        }
        // From here on, whatever is not sent is recalled, or lost: the ledger has it.
        *self.ledger.at_mut(slot.index()) = message;
        points::reach("write: taken");
        // Before any receiver hears of it.
        let memory = match self.storage.publish(&outgoing, message, is_lent, keep) {
            Ok(memory) => memory.map(Arc::new),
            Err(unpublished) => {
                self.give_up(retained);
                return Err(self.unpublished(outgoing, unpublished));
            }
        };
        if keep && let Some(sealed) = &memory {
            // A message that cannot be kept is sent to no receiver.
            match self.keep_sealed(sealed, &outgoing) {
                Ok(kept) => retained = Some(kept),
                Err(error) => return Err(self.recall(outgoing, memory, |fbuf| Unsent::NotKept { fbuf, error })),
            }
        }
        let passed = memory.as_ref().map_or(Ok(()), |memory| self.pass(memory));
        let receivers = if passed.is_ok() { self.offer(&outgoing) } else { 0 };
        if passed.is_ok() && (receivers > 0 || self.receivers() > 0) {
            self.come_back_to(slot, receivers);
            return Ok((self.published(outgoing.body.length(), receivers), retained));
        }
        self.give_up(retained);
        Err(self.recall(outgoing, memory, |fbuf| match passed {
            Ok(()) => Unsent::NoReceiver(fbuf),
            Err(reason) => Unsent::NotPassed { fbuf, reason },
        }))
    }

    /// What could not be [published](Storage::publish), as an fbuf once more.
    fn unpublished(&mut self, outgoing: Outgoing, why: Unpublished) -> Unsent {
        match why {
            Unpublished::Stale => self.recall(outgoing, None, Unsent::NoReceiver),
            Unpublished::NotSealed(error) => self.recall(outgoing, None, |fbuf| Unsent::NotSealed { fbuf, error }),
            Unpublished::NotMoved(error) => self.recall(outgoing, None, |fbuf| {
                let reason =
                    format!("the slot of the receiver that has come since it was allocated cannot be mapped: {error}");
                Unsent::NotPassed { fbuf, reason }
            }),
            Unpublished::Lost => self.lose(outgoing.slot),
        }
    }

    /// Passes the memory of a one-shot to every receiver that gets the message, before any of them is told of it.
    fn pass(&mut self, memory: &Arc<OwnedFd>) -> Result<(), String> {
        let (sequence, is_lossy) = (self.next_sequence, self.is_lossy());
        self.links.iter_mut().try_for_each(|link| match link.pass(memory, sequence) {
            Err(_) if is_lossy => {
                link.forgo();
                Ok(())
            }
            passed => passed,
        })
    }

    /// A message that is sealed for good, for its sender to read on.
    fn keep_sealed(&self, memory: &Arc<OwnedFd>, outgoing: &Outgoing) -> Result<Retained, MemoryError> {
        let length = outgoing.body.length();
        let refused = |call, error| MemoryError::Refused { call, asked: length.into(), error };
        let memory = memory.try_clone().map_err(|error| refused("fcntl", error))?;
        let sealed = Sealed::new(memory, length as usize).map_err(|error| refused("mmap", io::Error::other(error)))?;
        Ok(self.retain_sealed(sealed, outgoing.tag))
    }

    /// A message that was sealed for good and could not be sent, in a buffer that can be.
    fn copy_back(&mut self, outgoing: Outgoing, memory: Arc<OwnedFd>) -> Option<Fbuf> {
        let sealed = Sealed::new(Arc::into_inner(memory)?, outgoing.body.length() as usize).ok()?;
        let mut fbuf = self.take_back_as_fbuf(outgoing)?;
        fbuf.copy_from_slice(&sealed);
        fbuf.header_mut().copy_from_slice(sealed.behind(self.geometry.header()));
        Some(fbuf)
    }

    /// Lends a slot over every link that takes it: to how many receivers.
    fn offer(&mut self, outgoing: &Outgoing) -> usize {
        let sequence = self.next_sequence;
        let offers = self.links.iter_mut().map(|link| link.offer(outgoing, sequence));
        offers.filter(|offer| *offer == Offer::Lent).count()
    }

    /// The next message was sent, over every link that is open.
    #[inline]
    fn published(&mut self, length: u32, receivers: usize) -> Published {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        Published { sequence, length, receivers }
    }

    /// Takes back what was to be sent, and was lent to no receiver: a copy of its memory, if that was sealed for good. What it is as
    /// an fbuf, or [`Unsent::Lost`].
    fn recall(
        &mut self,
        outgoing: Outgoing,
        sealed: Option<Arc<OwnedFd>>,
        unsent: impl FnOnce(Fbuf) -> Unsent,
    ) -> Unsent {
        let fbuf = match sealed {
            Some(memory) => self.copy_back(outgoing, memory),
            None => self.take_back_as_fbuf(outgoing),
        };
        fbuf.map_or_else(|| self.lose(outgoing.slot), unsent)
    }

    fn take_back_as_fbuf(&mut self, outgoing: Outgoing) -> Option<Fbuf> {
        let bytes = self.take_back(outgoing.slot)?;
        Some(self.fbuf(Outgoing { bytes, ..outgoing }))
    }

    /// Frees the slot of a message that was not sent, and cannot be had any more.
    fn lose(&mut self, slot: SlotId) -> Unsent {
        *self.ledger.at_mut(slot.index()) = Mark::NONE;
        Unsent::Lost
    }

    /// Takes a slot that is lent over no link: where its bytes are.
    pub(super) fn take_back(&mut self, slot: SlotId) -> Option<Address> {
        let (_, bytes) = self.storage.reclaim(slot).ok()??.next()?;
        *self.ledger.at_mut(slot.index()) = Mark::OUT;
        Some(bytes)
    }

    /// The bytes of a slot that was sent and kept, to be written again: none while any receiver has it.
    pub(crate) fn reclaim(&mut self, slot: SlotId, message: Mark) -> Option<Address> {
        if self.linked().any(|link: &Outbound| link.has(slot, message)) {
            return None;
        }
        let bytes = self.take_back(slot)?;
        self.let_go(slot);
        Some(bytes)
    }
}
