//! How a message is sent, in one step: a [`Fbuf`] goes in, and its slot is lent over every link that takes it,
//! under a number that no message had before; or the fbuf comes out again. Slot, number and links never leave this
//! crate, so no caller can lend a slot that is being written, or lend one twice.

use std::{os::fd::OwnedFd, sync::Arc};

use super::{Pool, Storage};
use crate::{
    memory::{Address, MemoryError, Sealed},
    points,
    send::{
        fbuf::{Fbuf, Outgoing},
        link::{Offer, Outbound},
        retained::Retained,
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
    /// It cannot be written again, or, if it was to be kept, not be read on: there is no memory to map it. The slot is
    /// free.
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
        let [link] = &mut self.links[..] else { return Err(fbuf) };
        if !link.is_plain() {
            return Err(fbuf);
        }
        let outgoing = fbuf.into_outgoing();
        *self.ledger.at_mut(outgoing.slot.index()) = Mark::of(self.next_sequence);
        points::reach("write: taken");
        // What the call returns fits into a register: what this returns need never be in memory.
        if link.lend(&outgoing) || self.notify() {
            return Ok(self.published(outgoing.body.length(), 1));
        }
        // It left before it read this one, and nothing is done to the slots of a plain link.
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
    /// [`Unsent`], with the fbuf in it; [`Unsent::Lost`] also of a message that was sealed for good and cannot be kept: it was
    /// not sent.
    pub fn send_and_keep(&mut self, fbuf: Fbuf) -> Result<(Published, Retained), Unsent> {
        let (published, retained) = self.publish(fbuf, true)?;
        Ok((published, retained.ok_or(Unsent::Lost)?))
    }

    fn publish(&mut self, fbuf: Fbuf, keep: bool) -> Result<(Published, Option<Retained>), Unsent> {
        if !self.owns(&fbuf) {
            return Err(Unsent::OtherPool(fbuf));
        }
        if self.receivers() == 0 {
            return Err(Unsent::NoReceiver(fbuf));
        }
        // While its own slot is known to be in use.
        let limit = self.limit();
        let outgoing = fbuf.into_outgoing();
        let (slot, length) = (outgoing.slot, outgoing.body.length());
        let sequence = self.next_sequence;
        *self.ledger.at_mut(slot.index()) = Mark::of(sequence);
        points::reach("write: taken");
        if matches!(self.storage, Storage::OneShots(_)) {
            return self.give_away(outgoing, limit, keep);
        }
        let retained = if keep { Some(self.retain(&outgoing, sequence).ok_or(Unsent::Lost)?) } else { None };
        self.seal(slot, sequence);
        // Before any receiver hears of it. A message that cannot be sent was left out for none of them.
        let sendable = if self.admit(limit) == 0 { !self.is_stale(slot) } else { self.unmap_for_send(&outgoing) };
        if sendable {
            let receivers = self.offer(&outgoing);
            if receivers > 0 || self.receivers() > 0 {
                self.come_back_to(slot, receivers);
                return Ok((self.published(length, receivers), retained));
            }
        }
        if let Some(retained) = retained {
            self.give_up(retained);
        }
        Err(self.recall(outgoing).map_or(Unsent::Lost, Unsent::NoReceiver))
    }

    /// Seals a buffer for good and gives it to every receiver that takes it.
    fn give_away(
        &mut self,
        outgoing: Outgoing,
        limit: usize,
        keep: bool,
    ) -> Result<(Published, Option<Retained>), Unsent> {
        // Once it is sealed, there is no way back but a copy.
        let is_lossy = self.is_lossy();
        if !is_lossy && let Some(why) = self.links.iter().find_map(|link| link.lacks_room(1, &self.links)) {
            let fbuf = self.recall(outgoing).ok_or(Unsent::Lost)?;
            return Err(Unsent::NotPassed { fbuf, reason: why.to_string() });
        }
        if self.admit(limit) == 0 && !keep {
            // It is left out for all, and its memory is as good as before.
            let receivers = self.offer(&outgoing);
            self.come_back_to(outgoing.slot, receivers);
            return Ok((self.published(outgoing.body.length(), receivers), None));
        }
        let outgoing = self.move_to_front(outgoing).ok_or(Unsent::Lost)?;
        let Storage::OneShots(buffers) = &mut self.storage else { return Err(Unsent::Lost) };
        let length = outgoing.body.length();
        let sealed = buffers.seal(outgoing.slot, length);
        points::reach("seal: sealed");
        match sealed {
            Ok(memory) => {
                let memory = Arc::new(memory.ok_or(Unsent::Lost)?);
                // A message that cannot be kept is sent to no receiver.
                let kept = if keep { Some(self.keep_sealed(&memory, &outgoing).ok_or(Unsent::Lost)?) } else { None };
                // To all, before any of them is told of it.
                let sequence = self.next_sequence;
                let passed = self.links.iter_mut().try_for_each(|link| {
                    let passed = link.pass(&memory, sequence);
                    if is_lossy && passed.is_err() {
                        link.forgo();
                        return Ok(());
                    }
                    passed
                });
                let receivers = if passed.is_ok() { self.offer(&outgoing) } else { 0 };
                let sealed = || Sealed::new(Arc::into_inner(memory)?, length as usize).ok();
                if let Err(reason) = passed {
                    let fbuf = sealed().and_then(|sealed| self.copy_back(outgoing, &sealed));
                    return Err(fbuf.map_or(Unsent::Lost, |fbuf| Unsent::NotPassed { fbuf, reason }));
                }
                if receivers == 0 && self.receivers() == 0 {
                    let fbuf = sealed().and_then(|sealed| self.copy_back(outgoing, &sealed));
                    return Err(fbuf.map_or(Unsent::Lost, Unsent::NoReceiver));
                }
                Ok((self.published(length, receivers), kept))
            }
            Err(error) => Err(match self.recall(outgoing) {
                Some(fbuf) => Unsent::NotSealed { fbuf, error },
                None => Unsent::Lost,
            }),
        }
    }

    /// A message that is sealed for good, for its sender to read on.
    fn keep_sealed(&self, memory: &Arc<OwnedFd>, outgoing: &Outgoing) -> Option<Retained> {
        let sealed = Sealed::new(memory.try_clone().ok()?, outgoing.body.length() as usize).ok()?;
        Some(self.retain_sealed(sealed, outgoing.tag))
    }

    /// The message of a one-shot is the beginning of its memory: what lies behind headroom is moved there.
    fn move_to_front(&mut self, outgoing: Outgoing) -> Option<Outgoing> {
        if outgoing.body.offset() == 0 {
            return Some(outgoing);
        }
        let mut fbuf = self.recall(outgoing)?;
        fbuf.set_headroom(0).ok()?;
        let outgoing = fbuf.into_outgoing();
        *self.ledger.at_mut(outgoing.slot.index()) = Mark::of(self.next_sequence);
        Some(outgoing)
    }

    /// A message that was sealed for good and could not be sent, in a buffer that can be.
    fn copy_back(&mut self, outgoing: Outgoing, sealed: &Sealed) -> Option<Fbuf> {
        let mut fbuf = self.recall(outgoing)?;
        fbuf.copy_from_slice(sealed);
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

    /// Before a slot is lent with a message: makes it read-only, in a pool with a guard.
    fn seal(&mut self, slot: SlotId, sequence: u64) {
        let Some(guard) = &self.guard else { return };
        guard.sent(slot, Mark::of(sequence));
        if self.protect(slot, 1, false).is_err() {
            self.unguarded += 1;
        }
        points::reach("seal: guarded");
    }

    /// Gives up the right to write a slot that is about to be sent, in a pool of leased slots: whether it can
    /// be sent. It cannot if it lies in memory of a receiver that has gone.
    fn unmap_for_send(&mut self, outgoing: &Outgoing) -> bool {
        let end = (outgoing.body.offset() + outgoing.body.length()) as usize;
        let vacated = self.storage.leased_mut().is_none_or(|slots| slots.unmap_for_send(outgoing.slot, end).is_ok());
        points::reach("lease: vacated");
        vacated
    }

    /// Whether a slot that is to be sent lies in memory of a receiver that has gone.
    fn is_stale(&self, slot: SlotId) -> bool {
        self.storage.leased().is_some_and(|slots| slots.is_stale(slot))
    }

    /// Takes back what was to be sent, and was lent to no receiver.
    fn recall(&mut self, outgoing: Outgoing) -> Option<Fbuf> {
        let bytes = self.take_back(outgoing.slot)?;
        Some(self.fbuf(Outgoing { bytes, ..outgoing }))
    }

    /// Takes a slot that is lent over no link: where its bytes are.
    pub(super) fn take_back(&mut self, slot: SlotId) -> Option<Address> {
        self.release(slot, 1).ok()?;
        let mut pieces = self.storage.recall(self.geometry, slot).ok()??;
        let (_, bytes) = pieces.next()?;
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
