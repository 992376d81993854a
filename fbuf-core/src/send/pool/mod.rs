//! A sender's slots (invariant 2): free in its pool, out as a [`Fbuf`](crate::send::fbuf::Fbuf), or lent over links. All of it is
//! private memory of one thread, but for the list where fbufs are put that were dropped unsent, on
//! whatever thread.
//!
//! Slots are used in the order of their numbers, round and round, as a cursor goes: the bytes
//! that come next were written longest ago, have left the writer's private cache, and cost the reader
//! no fetch of dirty lines. There is no list of free slots: whether a slot has come back is looked up
//! when the cursor comes by, and one that somebody keeps for long is passed over, once a round.

mod closed;
mod creation;
mod lack;
mod links;
mod lossy;
mod publish;
mod turns;
mod unsent;

use std::{collections::VecDeque, io, sync::Arc};

pub use self::closed::Looks;
use self::turns::Turns;
pub(crate) use self::unsent::UnsentFbufs;
pub use self::{
    lack::{Lack, Shortage},
    publish::{Published, Unsent},
};
use crate::{
    limits::MAX_SEGMENTS,
    memory::{Address, MemoryError, Pieces, wrapping::WrappingTable},
    peer::{LinkId, Peer},
    points,
    send::{
        guard::Guard,
        link::{NoRoom, Outbound},
        storage::{Storage, Unkept, leased::View, segments::Segments},
    },
    slot::{Geometry, Mark, SlotId},
    socket::{link_message::NewSegment, wire::Descriptor},
};

/// How many slots one look goes through in search of one that is back.
const SEARCH: u32 = 256;

/// A sender's slots.
#[derive(Debug)]
pub struct Pool {
    geometry: Geometry,
    extras: Extras,
    storage: Storage,
    /// What there was not enough of for a buffer when it was last asked for.
    lack: Option<Lack>,
    /// The cursor: the slots that come next, as far as they are known to be free.
    free: Pieces,
    /// The ledger: which message used each slot last. [`Mark::OUT`] for those that are fbufs, or are among
    /// `free` and may become fbufs without a word: some of the former may be among the unsent.
    ledger: WrappingTable<Mark>,
    /// Slots that were sent and kept: they are used again when the sender lets go of their handles.
    retained: Vec<SlotId>,
    /// The links.
    links: Vec<Outbound>,
    turns: Turns,
    /// Links that were ended from this side; their receivers may read on.
    parted: VecDeque<Outbound>,
    /// Those of them that are over, until somebody asks.
    forgotten: Vec<LinkId>,
    /// The number of the next message.
    next_sequence: u64,
    /// How many slots are in use: all but those of a segment that receivers do not know yet.
    used: u32,
    /// How many slots from the cursor on were searched in vain.
    searched: u32,
    unsent: Arc<UnsentFbufs>,
}

/// What goes with messages beside their bytes, in entries of their own. Each link is told when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extras {
    /// Messages may have a [tag](crate::send::fbuf::Fbuf::set_tag).
    pub tags: bool,
    /// Messages have the time at which they were sent.
    pub times: bool,
    /// Messages are left out rather than that the sender waits for a slot, and receivers are told how many.
    pub lossy: bool,
}

/// What a sender's messages are like: how their slots lie, and what goes with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// How slots lie.
    pub geometry: Geometry,
    /// What goes with messages.
    pub extras: Extras,
}

impl From<Geometry> for Format {
    fn from(geometry: Geometry) -> Self {
        Self { geometry, extras: Extras::default() }
    }
}

/// Where a sender's slots are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Places {
    /// Free in the pool.
    pub free: usize,
    /// Held as fbufs.
    pub held: usize,
    /// Lent to receivers.
    pub lent: usize,
}

impl Pool {
    /// How many bytes an fbuf holds.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.geometry.slot_bytes()
    }

    /// What goes with messages.
    #[must_use]
    pub fn extras(&self) -> Extras {
        self.extras
    }

    /// The guard, if there is one.
    pub(crate) fn guard(&self) -> Option<&Guard> {
        self.storage.guard()
    }

    /// Messages that were sent without being guarded, for lack of mappings, although there is a guard.
    #[must_use]
    pub fn unguarded(&self) -> u64 {
        self.storage.unguarded()
    }

    /// The size and number of its slots.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Where its slots are. Goes through all of them.
    #[must_use]
    pub fn places(&self) -> Places {
        let put_back = self.unsent.slots();
        let is_kept = |slot: &SlotId| self.retained.contains(slot) && !put_back.contains(slot);
        // One look at each slot: it may come back meanwhile, and is not to be counted twice.
        let (lent, rest): (Vec<_>, Vec<_>) = self.all().partition(|&slot| self.is_lent(slot));
        let idle = rest.iter().filter(|slot| is_kept(slot)).count();
        let out = self.count_out() - put_back.iter().filter(|slot| !self.retained.contains(slot)).count();
        Places { free: self.used as usize - out - lent.len() - idle, held: out + idle, lent: lent.len() }
    }

    /// Whether any slot is lent.
    #[must_use]
    pub fn lends(&self) -> bool {
        // What was sent last is the most likely.
        (0..self.used).rev().any(|ahead| self.is_lent(self.ahead(ahead)))
    }

    fn all(&self) -> impl Iterator<Item = SlotId> {
        (0..self.used).map(SlotId::new)
    }

    fn count_out(&self) -> usize {
        self.all().filter(|&slot| self.mark(slot) == Mark::OUT).count() - self.free.len()
    }

    /// The slot that the cursor comes to after so many others; less than there are.
    fn ahead(&self, count: u32) -> SlotId {
        // The cursor may stand behind the last slot; it is never further.
        let (slot, left) = (self.free.next_number(), self.used - count);
        SlotId::new(if slot < left { slot + count } else { slot - left })
    }

    #[inline]
    fn mark(&self, slot: SlotId) -> Mark {
        *self.ledger.at(slot.index())
    }

    fn is_lent(&self, slot: SlotId) -> bool {
        let mark = self.mark(slot);
        mark != Mark::OUT && self.linked().any(|link| link.has(slot, mark))
    }

    fn is_free(&self, slot: SlotId) -> bool {
        let mark = self.mark(slot);
        mark != Mark::OUT
            && !self.retained.contains(&slot)
            && !self.linked().any(|link| link.has(slot, mark))
            && self.storage.is_available(slot)
    }

    /// How many slots there are now.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.storage.slots()
    }

    /// Whether [`Self::grow`] could add any.
    #[must_use]
    pub fn can_grow(&self) -> bool {
        self.slots() < self.geometry.max_slots() && self.storage.count_segments() < MAX_SEGMENTS
    }

    /// Doubles the number of slots, or reaches the limit. The new slots can be had once every receiver
    /// knows of them and [`Self::use_segment`] was called.
    ///
    /// # Errors
    /// [`MemoryError`], and nothing has changed.
    pub fn grow(&mut self) -> Result<(), MemoryError> {
        let room = self.geometry.max_slots() - self.slots();
        let slots = if self.storage.count_segments() + 1 == MAX_SEGMENTS { room } else { self.slots().min(room) };
        self.storage.add(slots)?;
        points::reach("growth: made");
        Ok(())
    }

    /// Whether the last segment is not in use yet.
    #[must_use]
    pub fn is_growing(&self) -> bool {
        self.used < self.slots()
    }

    /// Begins to use the new segment: its slots come next.
    pub fn use_segment(&mut self) {
        if self.is_growing() {
            self.move_to(SlotId::new(self.used));
            (self.used, self.searched) = (self.slots(), 0);
            points::reach("growth: used");
        }
    }

    /// The segments there are, but for the first `known`.
    pub fn announce(&self, known: usize) -> impl Iterator<Item = NewSegment> {
        self.storage.announce(known)
    }

    /// Takes the slot at the cursor, if it is known to be free: its name, and where its bytes are.
    #[inline]
    pub(crate) fn take_free(&mut self) -> Option<(SlotId, Address)> {
        let (number, bytes) = self.free.next()?;
        Some((SlotId::new(number), bytes))
    }

    /// Where fbufs of this pool go that are dropped.
    #[inline]
    pub(crate) fn unsent(&self) -> &Arc<UnsentFbufs> {
        &self.unsent
    }

    /// Whether no slot is known to be free.
    #[must_use]
    #[inline]
    pub fn is_dry(&self) -> bool {
        self.free.is_empty()
    }

    /// Looks which of the slots that come next are free, up to `most`: whether there is one.
    pub fn collect(&mut self, most: u32) -> bool {
        if !self.free.is_empty() {
            return true;
        }
        if !self.retained.is_empty() {
            self.take_unsent();
        }
        let first = self.ahead(0);
        self.lack = None;
        let Some(end) = self.storage.end_of_run(first) else { return false };
        let marks = self.ledger.slice(first.index()..end.min(first.number().saturating_add(most)) as usize);
        let has_one_link = self.retained.is_empty() && self.parted.is_empty() && self.storage.is_available(first);
        let count = match &self.links[..] {
            [link] if has_one_link => link.count_back(first, marks),
            _ => (first.number()..).zip(marks).take_while(|&(slot, _)| self.is_free(SlotId::new(slot))).count(),
        };
        if count == 0 || self.lacks_room().is_some() {
            return false;
        }
        let prepared = self.storage.prepare(first, count as u32);
        let slot = if self.sends_one_shots() { Shortage::ONE_SHOT } else { Shortage::LEASED };
        self.lack = prepared.as_ref().err().map(|error| Lack::behind(error, slot));
        let Ok(Some(pieces)) = prepared else { return false };
        self.free = pieces;
        self.ledger.fill(first.index()..first.index() + count, Mark::OUT);
        true
    }

    /// Of what there was not enough, if the last look found a slot free and it could not be had.
    #[must_use]
    pub fn lack(&self) -> Option<Lack> {
        self.lack
    }

    /// Why there is no room for one message more than there are fbufs, in a pool of buffers that are sent once: a slot that is free is not used before the receiver has read.
    #[must_use]
    pub fn lacks_room(&self) -> Option<NoRoom> {
        if self.sends_one_shots() { self.lacks_room_for(self.count_out() + 1) } else { None }
    }

    /// The same, for so many messages.
    fn lacks_room_for(&self, messages: usize) -> Option<NoRoom> {
        // A lossy pool leaves messages out for such a receiver.
        if !self.sends_one_shots() || self.is_lossy() {
            return None;
        }
        self.links.iter().find_map(|link| link.lacks_room(messages, &self.links))
    }

    /// The receivers for which there is [no room](Self::lacks_room).
    #[must_use]
    pub fn without_room(&self) -> Vec<Peer> {
        let messages = if self.sends_one_shots() { self.count_out() + 1 } else { return Vec::new() };
        let links = self.links.iter().filter(|link| link.lacks_room(messages, &self.links).is_some());
        links.map(Outbound::peer).collect()
    }

    /// Whether this is a pool of buffers that are sent once.
    #[must_use]
    pub(crate) fn sends_one_shots(&self) -> bool {
        self.storage.sends_one_shots()
    }

    /// Whether a message needs nothing but an entry in a lane.
    pub(crate) fn sends_plainly(&self) -> bool {
        self.storage.is_plain()
    }

    /// Whether receivers lease what is sent.
    #[must_use]
    pub fn is_leased(&self) -> bool {
        self.storage.is_leased()
    }

    /// The slots, to be read, if they are memory of this user.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn hand_over(&self) -> io::Result<Vec<Descriptor>> {
        self.storage.hand_over()
    }

    /// Whether the slots are those of a receiver, which hands the right to write them back over its socket.
    #[must_use]
    pub fn is_receivers(&self) -> bool {
        self.storage.is_given()
    }

    /// Whether a slot cannot be had for a reason that passes without a word: a lease that a receiver has, or a receiver
    /// that reads on although its link was ended.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        !self.parted.is_empty() || self.storage.is_blocked()
    }

    /// Where a slot that is sent can be read on here, and through which mapping, if that takes one of its own.
    pub(crate) fn view(&self, slot: SlotId) -> Result<(*const u8, Option<View>), Unkept> {
        self.storage.view(slot)
    }

    /// Whether a slot is still that which such a mapping shows.
    pub(crate) fn is_seen(&self, slot: SlotId, view: Option<&View>) -> bool {
        self.storage.is_seen(slot, view)
    }

    /// Moves the cursor; forgets which slots were known to be free.
    fn move_to(&mut self, slot: SlotId) {
        let begin = self.free.next_number() as usize;
        self.ledger.fill(begin..begin + self.free.len(), Mark::NONE);
        self.free = Pieces::none(slot.number());
    }

    /// Whether the slot is free that comes after so many others.
    #[must_use]
    #[inline]
    pub fn is_back(&self, count: u32) -> bool {
        self.is_free(self.ahead(count.min(self.used - 1)))
    }

    /// Looks for a slot that is free although it is not its turn: an fbuf that was dropped unsent, or a
    /// slot behind others that receivers keep for long. The cursor goes there, and comes by those others
    /// again in the next round. False if none was found; the next look goes on where this one ended.
    pub fn search(&mut self) -> bool {
        let from = if self.searched < self.used { self.searched } else { 0 };
        self.search_from(from, SEARCH)
    }

    /// As [`Self::search`], but looks everywhere.
    pub fn search_all(&mut self) -> bool {
        self.search_from(0, u32::MAX)
    }

    fn search_from(&mut self, from: u32, most: u32) -> bool {
        self.take_unsent();
        self.forget_parted(&mut Looks::of_search());
        if self.lacks_room().is_some() {
            return false;
        }
        let end = from.saturating_add(most).min(self.used);
        let found = (0..1).chain(from..end).map(|ahead| self.ahead(ahead)).find(|&slot| self.is_free(slot));
        if let Some(slot) = found {
            self.move_to(slot);
            self.searched = 0;
        } else {
            self.searched = end;
        }
        found.is_some()
    }

    pub(super) fn take_unsent(&mut self) {
        for slot in self.unsent.clear() {
            match self.retained.iter().position(|&retained| retained == slot) {
                // It was sent, and may still be lent.
                Some(index) => drop(self.retained.swap_remove(index)),
                None => {
                    *self.ledger.at_mut(slot.index()) = Mark::NONE;
                    self.storage.forget(slot);
                }
            }
        }
    }

    /// Keeps a slot from being used again once it is sent, until its handle is dropped.
    pub(crate) fn keep(&mut self, slot: SlotId) {
        self.retained.push(slot);
    }

    /// As if it had never been kept.
    pub(crate) fn let_go(&mut self, slot: SlotId) {
        self.retained.retain(|&retained| retained != slot);
    }

    /// Before the sender sleeps: have [`Fbuf`](crate::send::fbuf::Fbuf)s that are dropped from now on wake it. False if some
    /// were dropped already.
    #[must_use]
    pub fn await_fbufs(&self) -> bool {
        self.unsent.await_next()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let memory = std::mem::replace(&mut self.storage, Storage::Segments(Segments::new(self.geometry)));
        if self.unsent.is_inherited() {
            // Fbufs lie in it that this child may still have, and threads of the parent have to do with it.
            return std::mem::forget((memory, self.unsent.clone()));
        }
        self.unsent.clone().close(self.count_out() + self.retained.len(), memory);
    }
}

#[cfg(test)]
mod tests;
