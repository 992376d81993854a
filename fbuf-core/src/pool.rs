//! A sender's slots (invariant 2): free in its pool, out as a [`Fbuf`], or lent over links. All of it is
//! private memory of one thread, but for the shelf, where fbufs are put that were dropped unsent, on
//! whatever thread.
//!
//! Slots are used in the order of their numbers, round and round, as by the hand of a clock: the bytes
//! that come next were written longest ago, have left the writer's private cache, and cost the reader
//! no fetch of dirty lines. There is no list of free slots: whether a slot has come back is looked up
//! when the hand comes by, and one that somebody keeps for long is passed over, once a round.

use std::{
    io,
    os::fd::OwnedFd,
    ptr::NonNull,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::eventfd::EventFd;

use crate::{
    drafts::Drafts,
    guard::Guard,
    inbound::Peer,
    lease::{LeasedSlots, View},
    limits::MAX_SEGMENTS,
    link::{Gift, NewSegment},
    loan::Fbuf,
    memory::{Address, Leasable, Map, MemoryError, Pages, Pieces},
    outbound::Outbound,
    ring::Ring,
    slot::{Geometry, Mark, SlotId},
    violation::{Unsuitable, Violation},
    wire::Descriptor,
};

/// How many slots one look goes through in search of one that is back.
const SEARCH: u32 = 256;

/// A sender's slots.
#[derive(Debug)]
pub struct Pool {
    geometry: Geometry,
    segments: Vec<Segment>,
    /// Instead of segments, if each slot is memory of its own.
    own: Option<Own>,
    /// Whether there was no memory for a buffer when it was last asked for.
    exhausted: bool,
    /// The hand: the slots that come next, as far as they are known to be free.
    free: Pieces,
    /// The ledger: which message used each slot last. [`Mark::OUT`] for those that are fbufs, or are among
    /// `free` and may become fbufs without a word: some of the former may be on the shelf.
    ledger: Ring<Mark>,
    /// Slots that were sent and whose handle the sender has kept: they are used again when it lets go.
    retained: Vec<SlotId>,
    /// How many slots are in use: all but those of a segment that receivers do not know yet.
    used: u32,
    /// How many slots from the hand on were searched in vain.
    searched: u32,
    shelf: Arc<Shelf>,
    guard: Option<Guard>,
    /// Messages that were sent without being guarded, although they should have been.
    unguarded: u64,
}

/// Slots that are memory of their own.
#[derive(Debug)]
enum Own {
    /// Each is sent once, and given away.
    Shots(Drafts),
    /// Each is read under leases, and comes back.
    Leased(LeasedSlots),
}

impl Own {
    fn slots(&self) -> u32 {
        match self {
            Self::Shots(drafts) => drafts.slots(),
            Self::Leased(slots) => slots.len(),
        }
    }

    fn is_available(&self, slot: SlotId) -> bool {
        match self {
            Self::Shots(_) => true,
            Self::Leased(slots) => slots.is_available(slot),
        }
    }

    fn draft(&mut self, slot: SlotId) -> Result<Option<Pieces>, MemoryError> {
        match self {
            Self::Shots(drafts) => drafts.draft(slot).map(Some),
            Self::Leased(slots) => slots.draft(slot),
        }
    }
}

#[derive(Debug)]
struct Segment {
    map: Map,
    descriptor: Arc<OwnedFd>,
    slots: u32,
    /// The number of its first slot.
    first: u32,
}

/// Where a sender's slots are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// Free in the pool.
    pub free: usize,
    /// Held as fbufs.
    pub held: usize,
    /// Lent to receivers.
    pub lent: usize,
}

impl Pool {
    /// A pool with `slots` slots to start with. `wake` is signalled when a fbuf is put back while
    /// the sender waits for one.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn new(geometry: Geometry, slots: u32, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        Self::with(geometry, geometry.slot_bytes(), slots, wake, None, None)
    }

    /// As [`Self::new`], of buffers that are sent once.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn of_one_shots(geometry: Geometry, slots: u32, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        let drafts = Drafts::new(geometry.segment_bytes(1));
        Self::with(geometry, geometry.slot_bytes(), slots, wake, None, Some(Own::Shots(drafts)))
    }

    /// As [`Self::new`], of slots that receivers lease, each in one of these pieces of memory, which belong
    /// to this user, in such pages if they can be had: and in which they lie.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn of_leases(
        geometry: Geometry,
        memory: Vec<OwnedFd>,
        pages: Pages,
        wake: Arc<EventFd>,
    ) -> Result<(Self, Pages), MemoryError> {
        let refused = |error: Unsuitable| MemoryError::Refused {
            call: "what the broker gave",
            asked: geometry.slot_bytes().into(),
            source: io::Error::other(error),
        };
        let given = |memory| Leasable::given(memory, geometry.slot_bytes().into()).map_err(refused);
        let memory: Vec<_> = memory.into_iter().map(given).collect::<Result<_, _>>()?;
        let slots = memory.len() as u32;
        let (leased, pages) = LeasedSlots::own(memory, geometry.slot_bytes(), pages)?;
        let own = Own::Leased(leased);
        Ok((Self::with(geometry, geometry.slot_bytes(), slots, wake, None, Some(own))?, pages))
    }

    /// As [`Self::of_leases`], of slots that a receiver gives when it is linked.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn of_receiver(geometry: Geometry, wake: Arc<EventFd>) -> Result<Self, MemoryError> {
        let slots = geometry.max_slots();
        let own = Own::Leased(LeasedSlots::of_receiver(slots, geometry.slot_bytes()));
        Self::with(geometry, geometry.slot_bytes(), slots, wake, None, Some(own))
    }

    /// As [`Self::new`], with a guard, and with fbufs that hold less than a slot does: slots that are
    /// guarded fill whole pages.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn with_guard(
        geometry: Geometry,
        capacity: u32,
        slots: u32,
        wake: Arc<EventFd>,
        guard: Option<Guard>,
    ) -> Result<Self, MemoryError> {
        Self::with(geometry, capacity, slots, wake, guard, None)
    }

    fn with(
        geometry: Geometry,
        capacity: u32,
        slots: u32,
        wake: Arc<EventFd>,
        guard: Option<Guard>,
        own: Option<Own>,
    ) -> Result<Self, MemoryError> {
        let state = Mutex::new(Stored::Open { slots: Vec::new(), waited_for: false });
        let shelf = Arc::new(Shelf { slot_bytes: capacity.min(geometry.slot_bytes()), state, wake });
        let mut pool = Self {
            geometry,
            segments: Vec::new(),
            own,
            exhausted: false,
            free: Pieces::none(0),
            ledger: Ring::new(geometry.max_slots() as usize, || Mark::NONE),
            retained: Vec::new(),
            used: 0,
            searched: 0,
            shelf,
            guard,
            unguarded: 0,
        };
        pool.add_segment(slots.min(geometry.max_slots()))?;
        pool.use_segment();
        Ok(pool)
    }

    /// How many bytes a fbuf holds.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.shelf.slot_bytes
    }

    /// The guard, if there is one.
    #[must_use]
    pub fn guard(&self) -> Option<&Guard> {
        self.guard.as_ref()
    }

    /// Messages that were sent without being guarded, for lack of mappings, although there is a guard.
    #[must_use]
    pub fn unguarded(&self) -> u64 {
        self.unguarded
    }

    /// The size and number of its slots.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Where its slots are. Goes through all of them.
    #[must_use]
    pub fn places(&self, links: &[Outbound]) -> Places {
        let put_back = self.shelf.slots();
        let lent = self.all().filter(|&slot| self.is_lent(links, slot)).count();
        let idle = self.retained.iter().filter(|slot| !put_back.contains(slot) && !self.is_lent(links, **slot)).count();
        let out = self.count_out() - put_back.iter().filter(|slot| !self.retained.contains(slot)).count();
        Places { free: self.used as usize - out - lent - idle, held: out + idle, lent }
    }

    /// Whether any slot is lent.
    #[must_use]
    pub fn lends(&self, links: &[Outbound]) -> bool {
        // What was sent last is the most likely.
        (0..self.used).rev().any(|ahead| self.is_lent(links, self.ahead(ahead)))
    }

    fn all(&self) -> impl Iterator<Item = SlotId> {
        (0..self.used).map(SlotId::new)
    }

    fn count_out(&self) -> usize {
        self.all().filter(|&slot| self.mark(slot) == Mark::OUT).count() - self.free.len()
    }

    /// The slot that the hand comes to after so many others; less than there are.
    fn ahead(&self, count: u32) -> SlotId {
        // The hand may stand behind the last slot; it is never further.
        let (slot, left) = (self.free.next_number(), self.used - count);
        SlotId::new(if slot < left { slot + count } else { slot - left })
    }

    #[inline]
    fn mark(&self, slot: SlotId) -> Mark {
        *self.ledger.at(slot.index())
    }

    fn is_lent(&self, links: &[Outbound], slot: SlotId) -> bool {
        let mark = self.mark(slot);
        mark != Mark::OUT && links.iter().any(|link| link.has(slot, mark))
    }

    fn is_free(&self, links: &[Outbound], slot: SlotId) -> bool {
        let mark = self.mark(slot);
        mark != Mark::OUT
            && !self.retained.contains(&slot)
            && !links.iter().any(|link| link.has(slot, mark))
            && self.own.as_ref().is_none_or(|own| own.is_available(slot))
    }

    /// How many slots there are now.
    #[must_use]
    pub fn slots(&self) -> u32 {
        match &self.own {
            Some(own) => own.slots(),
            None => self.segments.last().map_or(0, |segment| segment.first + segment.slots),
        }
    }

    /// Whether [`Self::grow`] could add any.
    #[must_use]
    pub fn can_grow(&self) -> bool {
        self.slots() < self.geometry.max_slots() && self.segments.len() < MAX_SEGMENTS
    }

    /// Doubles the number of slots, or reaches the limit. The new slots can be had once every receiver
    /// knows of them and [`Self::use_segment`] was called.
    ///
    /// # Errors
    /// [`MemoryError`], and nothing has changed.
    pub fn grow(&mut self) -> Result<(), MemoryError> {
        let room = self.geometry.max_slots() - self.slots();
        let slots = if self.segments.len() + 1 == MAX_SEGMENTS { room } else { self.slots().min(room) };
        self.add_segment(slots)
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
        }
    }

    fn add_segment(&mut self, slots: u32) -> Result<(), MemoryError> {
        match &mut self.own {
            Some(Own::Shots(drafts)) => {
                drafts.add(slots);
                return Ok(());
            }
            Some(Own::Leased(_)) => return Ok(()),
            None => {}
        }
        let (map, descriptor) = Map::create("fbuf-segment", self.geometry.segment_bytes(slots))?;
        if let Some(guard) = &self.guard {
            guard.add_segment(&map, self.slots());
        }
        self.segments.push(Segment { map, descriptor: Arc::new(descriptor), slots, first: self.slots() });
        Ok(())
    }

    /// The segments there are, but for the first `known`.
    pub fn announce(&self, known: usize) -> impl Iterator<Item = NewSegment> {
        self.segments.iter().skip(known).map(Segment::announce)
    }

    /// Takes the slot whose turn it is, if it is known to be free: its name, and where its bytes are.
    #[inline]
    pub(crate) fn take_free(&mut self) -> Option<(SlotId, Address)> {
        let (number, bytes) = self.free.next()?;
        Some((SlotId::new(number), bytes))
    }

    /// Takes a slot that was to be sent, and was lent to nobody.
    pub(crate) fn take_back(&mut self, slot: SlotId) -> Option<Address> {
        self.release(slot, 1).ok()?;
        let mut pieces = match &mut self.own {
            Some(Own::Shots(drafts)) => drafts.draft(slot).ok()?,
            Some(Own::Leased(slots)) => slots.recall(slot).ok()??,
            None => self.segment_of(slot)?.pieces(self.geometry, slot, 1),
        };
        let (_, bytes) = pieces.next()?;
        *self.ledger.at_mut(slot.index()) = Mark::OUT;
        Some(bytes)
    }

    /// Before a slot is lent with a message: has nobody write it any more, in a pool with a guard.
    pub fn seal(&mut self, slot: SlotId, sequence: u64) {
        let Some(guard) = &self.guard else { return };
        guard.sent(slot, Mark::of(sequence));
        if self.protect(slot, 1, false).is_err() {
            self.unguarded += 1;
        }
    }

    /// Lets the owner write slots of one segment again.
    fn release(&self, first: SlotId, count: u32) -> io::Result<()> {
        let Some(guard) = &self.guard else { return Ok(()) };
        self.protect(first, count, true)?;
        (first.number()..first.number() + count).for_each(|slot| guard.sent(SlotId::new(slot), Mark::NONE));
        Ok(())
    }

    fn protect(&self, first: SlotId, count: u32, writable: bool) -> io::Result<()> {
        let Some(segment) = self.segment_of(first) else { return Ok(()) };
        let (begin, stride) = ((first.number() - segment.first) as usize, self.geometry.stride() as usize);
        segment.map.protect(begin * stride..(begin + count as usize) * stride, writable)
    }

    /// Where the bytes of a slot are.
    pub(crate) fn address(&self, slot: SlotId) -> Option<Address> {
        self.segment_of(slot)?.pieces(self.geometry, slot, 1).next().map(|(_, bytes)| bytes)
    }

    fn segment_of(&self, slot: SlotId) -> Option<&Segment> {
        self.segments.iter().rfind(|segment| segment.first <= slot.number())
    }

    /// Where fbufs of this pool go that are dropped: the inside of an Arc.
    #[inline]
    pub(crate) fn shelf(&self) -> NonNull<Shelf> {
        NonNull::from(Arc::as_ref(&self.shelf))
    }

    /// Takes a filled fbuf back in order to send it as message number `sequence`: its slot, and how many
    /// bytes are filled.
    ///
    /// # Errors
    /// The fbuf, if it came from another pool.
    #[inline]
    pub fn take(&mut self, fbuf: Fbuf, sequence: u64) -> Result<(SlotId, u32), Fbuf> {
        if fbuf.home() != self.shelf() {
            return Err(fbuf);
        }
        let (slot, length) = fbuf.into_slot();
        *self.ledger.at_mut(slot.index()) = Mark::of(sequence);
        Ok((slot, length))
    }

    /// Whether no slot is known to be free.
    #[must_use]
    #[inline]
    pub fn is_dry(&self) -> bool {
        self.free.is_empty()
    }

    /// Looks which of the slots that come next are free, up to `most`: whether there is one.
    pub fn collect(&mut self, links: &[Outbound], most: u32) -> bool {
        if !self.free.is_empty() {
            return true;
        }
        if !self.retained.is_empty() {
            self.clear_shelf();
        }
        let first = self.ahead(0);
        if self.own.is_some() {
            return self.collect_draft(links, first);
        }
        let Some(segment) = self.segment_of(first) else { return false };
        let end = (segment.first + segment.slots).min(first.number().saturating_add(most));
        let marks = self.ledger.slice(first.index()..end as usize);
        let count = match links {
            [link] if self.retained.is_empty() => link.count_back(first, marks),
            links => {
                (first.number()..).zip(marks).take_while(|&(slot, _)| self.is_free(links, SlotId::new(slot))).count()
            }
        };
        if self.guard.is_some() && count > 0 && self.release(first, count as u32).is_err() {
            // The kernel has no mapping left that this would take; slots come back, and with them mappings.
            return false;
        }
        self.free = segment.pieces(self.geometry, first, count as u32);
        self.ledger.fill(first.index()..first.index() + count, Mark::OUT);
        count > 0
    }

    fn collect_draft(&mut self, links: &[Outbound], slot: SlotId) -> bool {
        if !self.is_free(links, slot) {
            return false;
        }
        let draft = self.own.as_mut().map(|own| own.draft(slot));
        self.exhausted = matches!(draft, Some(Err(_)));
        let Some(Ok(Some(pieces))) = draft else { return false };
        self.free = pieces;
        *self.ledger.at_mut(slot.index()) = Mark::OUT;
        true
    }

    /// Whether the last look found a slot free, but no memory for what is to be written.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    /// Seals the buffer that was taken to be sent, in a pool of buffers that are sent once: its memory.
    ///
    /// # Errors
    /// [`MemoryError`]: somebody else can write it, such as a child that was forked, and there is no memory
    /// for a copy.
    pub fn seal_for_good(&mut self, slot: SlotId) -> Result<Option<OwnedFd>, MemoryError> {
        match &mut self.own {
            Some(Own::Shots(drafts)) => drafts.seal(slot),
            _ => Ok(None),
        }
    }

    /// Whether this is a pool of buffers that are sent once.
    #[must_use]
    pub fn sends_for_good(&self) -> bool {
        matches!(self.own, Some(Own::Shots(_)))
    }

    fn leased(&self) -> Option<&LeasedSlots> {
        match &self.own {
            Some(Own::Leased(slots)) => Some(slots),
            _ => None,
        }
    }

    fn leased_mut(&mut self) -> Option<&mut LeasedSlots> {
        match &mut self.own {
            Some(Own::Leased(slots)) => Some(slots),
            _ => None,
        }
    }

    /// Whether receivers lease what is sent.
    #[must_use]
    pub fn is_leased(&self) -> bool {
        self.leased().is_some()
    }

    /// Whether the slots are those of a receiver, who hands the right to write them back over its socket.
    #[must_use]
    pub fn is_receivers(&self) -> bool {
        self.leased().is_some_and(LeasedSlots::are_given)
    }

    /// Gives up the right to write a slot that was taken to be sent, in a pool whose slots are leased: whether
    /// it can be sent.
    pub fn vacate(&mut self, slot: SlotId, length: u32) -> bool {
        self.leased_mut().is_none_or(|slots| slots.vacate(slot, length as usize).is_ok())
    }

    /// Whether a slot that was to be sent lies in memory of a receiver that has gone.
    #[must_use]
    pub fn is_homeless(&self, slot: SlotId) -> bool {
        self.leased().is_some_and(|slots| slots.is_homeless(slot))
    }

    /// Takes what a receiver gives to a pool of such slots.
    ///
    /// # Errors
    /// [`Violation`]
    pub fn give(&mut self, gift: Gift, giver: Peer) -> Result<(), Violation> {
        let Some(slots) = self.leased_mut() else { return Ok(()) };
        slots.give(gift, giver)
    }

    /// A receiver has gone. What it gave is of no use any more.
    pub fn forget_gifts(&mut self, giver: Peer) {
        if let Some(slots) = self.leased_mut() {
            slots.forget_giver(giver);
        }
    }

    /// Whether a slot that was handed back cannot be had, for a reason that passes without a word.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.leased().is_some_and(LeasedSlots::is_blocked)
    }

    /// A slot that was taken to be sent, to be read on, where that takes another mapping.
    pub(crate) fn view(&self, slot: SlotId) -> Option<View> {
        self.leased()?.view(slot)
    }

    /// Whether a slot is still that which such a view shows.
    pub(crate) fn is_seen(&self, slot: SlotId, view: Option<&View>) -> bool {
        view.is_none_or(|view| self.leased().is_some_and(|slots| slots.is_seen(slot, view)))
    }

    /// Moves the hand; forgets which slots were known to be free.
    fn move_to(&mut self, slot: SlotId) {
        let begin = self.free.next_number() as usize;
        self.ledger.fill(begin..begin + self.free.len(), Mark::NONE);
        self.free = Pieces::none(slot.number());
    }

    /// Whether the slot is free that comes after so many others.
    #[must_use]
    #[inline]
    pub fn is_back(&self, links: &[Outbound], count: u32) -> bool {
        self.is_free(links, self.ahead(count.min(self.used - 1)))
    }

    /// Looks for a slot that is free although it is not its turn: a fbuf that was dropped unsent, or a
    /// slot behind others that receivers keep for long. The hand goes there, and comes by those others
    /// again in the next round. False if none was found; the next look goes on where this one ended.
    pub fn search(&mut self, links: &[Outbound]) -> bool {
        let from = if self.searched < self.used { self.searched } else { 0 };
        self.search_from(from, SEARCH, links)
    }

    /// As [`Self::search`], but looks everywhere.
    pub fn search_all(&mut self, links: &[Outbound]) -> bool {
        self.search_from(0, u32::MAX, links)
    }

    fn search_from(&mut self, from: u32, most: u32, links: &[Outbound]) -> bool {
        self.clear_shelf();
        let end = from.saturating_add(most).min(self.used);
        let found = (0..1).chain(from..end).map(|ahead| self.ahead(ahead)).find(|&slot| self.is_free(links, slot));
        if let Some(slot) = found {
            self.move_to(slot);
            self.searched = 0;
        } else {
            self.searched = end;
        }
        found.is_some()
    }

    fn clear_shelf(&mut self) {
        for slot in self.shelf.clear() {
            match self.retained.iter().position(|&retained| retained == slot) {
                // It was sent, and may still be lent.
                Some(index) => drop(self.retained.swap_remove(index)),
                None => *self.ledger.at_mut(slot.index()) = Mark::NONE,
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

    /// The bytes of a slot that was sent and kept, to be written again: none while any receiver has it.
    pub(crate) fn reclaim(&mut self, links: &[Outbound], slot: SlotId, message: Mark) -> Option<Address> {
        if links.iter().any(|link| link.has(slot, message)) {
            return None;
        }
        let bytes = self.take_back(slot)?;
        self.let_go(slot);
        Some(bytes)
    }

    /// Before the sender sleeps: have [`Fbuf`]s that are dropped from now on wake it. False if some
    /// were dropped already.
    #[must_use]
    pub fn await_fbufs(&self) -> bool {
        match &mut *self.shelf.lock() {
            Stored::Open { slots, waited_for } if slots.is_empty() => {
                *waited_for = true;
                true
            }
            _ => false,
        }
    }
}

impl Segment {
    /// The bytes of so many of its slots.
    fn pieces(&self, geometry: Geometry, first: SlotId, count: u32) -> Pieces {
        let begin = first.number() - self.first;
        let pieces = self.map.pieces(begin..begin + count, geometry.stride(), geometry.slot_bytes());
        pieces.unwrap_or(Pieces::none(begin)).numbered_from(first.number())
    }

    fn announce(&self) -> NewSegment {
        NewSegment { memory: Descriptor::from(self.descriptor.clone()), slots: self.slots }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let out = self.count_out() + self.retained.len();
        let segments = std::mem::take(&mut self.segments);
        let mut state = self.shelf.lock();
        let put_back = if let Stored::Open { slots, .. } = &*state { slots.len() } else { 0 };
        let outstanding = out - put_back;
        if outstanding > 0 {
            let kept = Kept { _shelf: self.shelf.clone(), _segments: segments, _own: self.own.take() };
            *state = Stored::Closed { outstanding, kept };
        }
    }
}

/// Where fbufs go that are dropped unsent. Outlives its pool for as long as fbufs are out.
#[derive(Debug)]
pub struct Shelf {
    slot_bytes: u32,
    state: Mutex<Stored>,
    wake: Arc<EventFd>,
}

#[derive(Debug)]
enum Stored {
    /// The pool takes them from here.
    Open { slots: Vec<SlotId>, waited_for: bool },
    /// The pool is gone; the last fbuf frees what is kept.
    Closed { outstanding: usize, kept: Kept },
    /// The last fbuf is gone too.
    Empty,
}

/// What fbufs need, after their pool is gone. Dropped with the last of them.
#[derive(Debug)]
pub(crate) struct Kept {
    _shelf: Arc<Shelf>,
    _segments: Vec<Segment>,
    _own: Option<Own>,
}

impl Shelf {
    /// The size of the slots that belong here.
    #[inline]
    pub(crate) fn slot_bytes(&self) -> u32 {
        self.slot_bytes
    }

    fn lock(&self) -> MutexGuard<'_, Stored> {
        // A panic while it was locked cannot have left it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a slot here; what to drop afterwards, if this was the last one.
    pub(crate) fn put_back(&self, slot: SlotId) -> Option<Kept> {
        let mut state = self.lock();
        match &mut *state {
            Stored::Open { slots, waited_for } => {
                slots.push(slot);
                if std::mem::take(waited_for) {
                    // A counter that is full wakes as well.
                    let _ = self.wake.write(1);
                }
                None
            }
            Stored::Closed { outstanding: 2.., .. } => {
                if let Stored::Closed { outstanding, .. } = &mut *state {
                    *outstanding -= 1;
                }
                None
            }
            _ => match std::mem::replace(&mut *state, Stored::Empty) {
                Stored::Closed { kept, .. } => Some(kept),
                _ => None,
            },
        }
    }

    fn slots(&self) -> Vec<SlotId> {
        if let Stored::Open { slots, .. } = &*self.lock() { slots.clone() } else { Vec::new() }
    }

    fn clear(&self) -> Vec<SlotId> {
        match &mut *self.lock() {
            Stored::Open { slots, waited_for } => {
                *waited_for = false;
                std::mem::take(slots)
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(pool: &mut Pool) -> Option<Fbuf> {
        pool.allocate().or_else(|| pool.collect(&[], 64).then(|| pool.allocate())?)
    }

    fn pool(slots: u32, limit: u64) -> Pool {
        let wake = Arc::new(EventFd::new().unwrap());
        Pool::new(Geometry::new(100, limit).unwrap(), slots, wake).unwrap()
    }

    #[test]
    fn a_slot_is_in_one_place() {
        let mut pool = pool(3, 3);
        let all: Vec<_> = std::iter::from_fn(|| next(&mut pool)).collect();
        assert_eq!(all.len(), 3);
        assert_eq!(pool.places(&[]), Places { free: 0, held: 3, lent: 0 });
        let mut starts: Vec<_> = all.iter().map(|fbuf| fbuf.as_ptr() as usize).collect();
        starts.sort_unstable();
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= 100), "slots overlap");
        drop(all);
        assert_eq!(pool.places(&[]), Places { free: 3, held: 0, lent: 0 });
        assert!(pool.search(&[]));
        assert_eq!(pool.places(&[]), Places { free: 3, held: 0, lent: 0 });
        assert_eq!(std::iter::from_fn(|| next(&mut pool)).count(), 3);
    }

    #[test]
    fn slots_are_reused_first_in_first_out() {
        let mut pool = pool(4, 4);
        let mut order = Vec::new();
        for sequence in 0..8 {
            let fbuf = next(&mut pool).unwrap();
            order.push(pool.take(fbuf, sequence).unwrap().0.index());
        }
        assert_eq!(order, [0, 1, 2, 3, 0, 1, 2, 3]);
    }

    #[test]
    fn growth_doubles_up_to_the_limit() {
        let mut pool = pool(2, 7);
        pool.grow().unwrap();
        assert!(pool.is_growing());
        assert_eq!(
            pool.places(&[]),
            Places { free: 2, held: 0, lent: 0 },
            "slots are free before receivers know of them"
        );
        pool.use_segment();
        pool.grow().unwrap();
        pool.use_segment();
        assert!(!pool.can_grow() && !pool.is_growing());
        assert_eq!(pool.announce(0).map(|segment| segment.slots).collect::<Vec<_>>(), [2, 2, 3]);
        assert_eq!(std::iter::from_fn(|| next(&mut pool)).count(), 7);
    }

    #[test]
    fn a_fbuf_of_another_pool_is_handed_back() {
        let (mut one, mut other) = (pool(1, 1), pool(1, 1));
        let fbuf = next(&mut one).unwrap();
        let fbuf = other.take(fbuf, 0).unwrap_err();
        assert!(one.take(fbuf, 0).is_ok());
    }

    #[test]
    fn fbufs_outlive_their_pool_and_take_its_memory_with_them() {
        let mut pool = pool(2, 2);
        let shelf = Arc::downgrade(&pool.shelf);
        let (mut one, two) = (next(&mut pool).unwrap(), next(&mut pool).unwrap());
        drop(pool);
        one.resize(100).unwrap();
        one.fill(7);
        assert!(one.iter().all(|&byte| byte == 7));
        std::thread::spawn(move || drop(one)).join().unwrap();
        assert!(shelf.upgrade().is_some(), "the memory went while a fbuf was out");
        drop(two);
        assert!(shelf.upgrade().is_none(), "the memory stayed");
    }

    #[test]
    fn a_dropped_fbuf_wakes_who_waits_for_it() {
        let mut pool = pool(1, 1);
        let fbuf = next(&mut pool).unwrap();
        assert!(pool.await_fbufs());
        drop(fbuf);
        assert_eq!(pool.shelf.wake.read(), Ok(1));
        assert!(!pool.await_fbufs(), "there is one already");
    }

    #[test]
    fn filling_is_bounded_by_the_slot() {
        use bytes::BufMut;
        use std::io::Write;
        let mut pool = pool(1, 1);
        let mut fbuf = next(&mut pool).unwrap();
        assert!(fbuf.is_empty());
        fbuf.put_u16(0x0102);
        fbuf.write_all(b"abc").unwrap();
        assert_eq!(&fbuf[..], b"\x01\x02abc");
        assert_eq!(fbuf.read_from(&mut &[9u8; 200][..]).unwrap(), 95);
        assert_eq!(fbuf.read_from(&mut &[9u8; 200][..]).unwrap(), 0);
        assert_eq!(fbuf.write(b"x").unwrap(), 0);
        assert_eq!(fbuf.remaining_mut(), 0);
        assert!(fbuf.resize(101).is_err());
        fbuf.resize(3).unwrap();
        assert_eq!(&fbuf[..], b"\x01\x02a");
    }
}
