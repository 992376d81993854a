//! A sender's slots (invariant 2): in line in its pool, free or lent over links, or out as a [`Fbuf`].
//! All of it is private memory of one thread, but for the shelf, where fbufs are put that were dropped
//! unsent, on whatever thread.
//!
//! Slots are reused first in, first out: the bytes that come next were written longest ago, have
//! left the writer's private cache, and cost the reader no fetch of dirty lines. So there is one line
//! of slots: what is sent goes to its end, and nobody looks whether a slot has come back before its
//! turn comes.

use std::{
    os::fd::OwnedFd,
    ptr::NonNull,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::eventfd::EventFd;

use crate::{
    limits::MAX_SEGMENTS,
    link::NewSegment,
    loan::Fbuf,
    memory::{Address, Map, MemoryError},
    outbound::Outbound,
    ring::Ring,
    slot::{Geometry, SlotId},
    wire::Descriptor,
};

/// How many slots shall be back before a sender that has to wait goes on, if it has several times as
/// many: taking them one by one would take the cache lines in which they are reported to and fro.
const BATCH: usize = 64;
/// How many slots one look goes through in search of one that is back.
const SEARCH: usize = 256;

/// A sender's slots.
#[derive(Debug)]
pub struct Pool {
    geometry: Geometry,
    segments: Vec<Segment>,
    /// The slots that are no fbufs, in the order in which they will be.
    line: Line,
    /// How many slots there are.
    slots: u32,
    /// How many at the head of the line were searched in vain.
    searched: usize,
    /// Whether the last segment is still to be announced, and its slots are not in line yet.
    growing: bool,
    shelf: Arc<Shelf>,
}

#[derive(Debug)]
struct Segment {
    map: Map,
    descriptor: Arc<OwnedFd>,
    slots: u32,
}

/// Slots in line. It has room for all of them, and never grows.
#[derive(Debug)]
struct Line {
    ring: Ring<Place>,
    /// How many were taken off its head, less those that were put there.
    head: usize,
    /// How many were put at its end, less those that were taken there.
    end: usize,
    /// What `head` will be when all have been taken that are known to be free.
    known: usize,
}

/// A slot, and where its bytes are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) slot: SlotId,
    pub(crate) bytes: Address,
}

impl Line {
    /// An empty one with room for so many slots.
    fn new(slots: u32) -> Self {
        let nowhere = Place { slot: SlotId::new(0), bytes: Address::nowhere() };
        Self { ring: Ring::new(slots as usize, || nowhere), head: 0, end: 0, known: 0 }
    }

    fn len(&self) -> usize {
        self.end.wrapping_sub(self.head)
    }

    /// The one that has `index` others before it.
    fn get(&self, index: usize) -> Option<SlotId> {
        (index < self.len()).then(|| self.at(index).slot)
    }

    /// As [`Self::get`], where there is one.
    #[inline]
    fn at(&self, index: usize) -> &Place {
        self.ring.at(self.head.wrapping_add(index))
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = SlotId> {
        (0..self.len()).filter_map(|index| self.get(index))
    }

    /// Takes the first one, if it is known to be free.
    #[inline]
    fn take_free(&mut self) -> Option<Place> {
        if self.head == self.known {
            return None;
        }
        let place = *self.ring.at(self.head);
        self.head = self.head.wrapping_add(1);
        Some(place)
    }

    #[inline]
    fn put_last(&mut self, place: Place) {
        *self.ring.at_mut(self.end) = place;
        self.end = self.end.wrapping_add(1);
    }

    /// Puts one before all others. Whether it is free is to be found out.
    fn put_first(&mut self, place: Place) {
        self.head = self.head.wrapping_sub(1);
        *self.ring.at_mut(self.head) = place;
        self.known = self.head;
    }

    /// How many at its head are known to be free.
    fn free(&self) -> usize {
        self.known.wrapping_sub(self.head)
    }

    /// Takes the one that was put last.
    fn take_last(&mut self) -> Place {
        self.end = self.end.wrapping_sub(1);
        *self.ring.at(self.end)
    }

    /// Puts the first `count` to the end. They are not free.
    fn rotate(&mut self, count: usize) {
        self.known = self.head.wrapping_add(count);
        for _ in 0..count {
            *self.ring.at_mut(self.end) = *self.ring.at(self.head);
            self.head = self.head.wrapping_add(1);
            self.end = self.end.wrapping_add(1);
        }
    }
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
        let shelf = Arc::new(Shelf { state: Mutex::new(Stored::Open { slots: Vec::new(), waited_for: false }), wake });
        let line = Line::new(geometry.max_slots());
        let mut pool = Self { geometry, segments: Vec::new(), line, slots: 0, searched: 0, growing: false, shelf };
        pool.add_segment(slots.min(geometry.max_slots()))?;
        pool.use_segment();
        Ok(pool)
    }

    /// The size and number of its slots.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Where its slots are. Goes through all of them.
    #[must_use]
    pub fn places(&self, links: &[Outbound]) -> Places {
        let lent = self.line.iter().filter(|&slot| is_lent(links, slot)).count();
        let put_back = self.shelf.count();
        Places { free: self.line.len() - lent + put_back, held: self.out() - put_back, lent }
    }

    /// Whether any slot is lent.
    #[must_use]
    pub fn lends(&self, links: &[Outbound]) -> bool {
        // What was sent last is the most likely.
        self.line.iter().rev().any(|slot| is_lent(links, slot))
    }

    /// How many slots are not in line: fbufs, of which some may be on the shelf.
    fn out(&self) -> usize {
        let unused = self.segments.last().filter(|_| self.growing).map_or(0, |segment| segment.slots as usize);
        self.slots as usize - unused - self.line.len()
    }

    /// How many slots there are now.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
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
        self.growing
    }

    /// Puts the slots of the new segment at the head of the line.
    pub fn use_segment(&mut self) {
        let Some(last) = self.segments.last().filter(|_| self.growing) else { return };
        let first = self.slots - last.slots;
        let pieces = last.map.pieces(last.slots, self.geometry.stride(), self.geometry.slot_bytes());
        let slots = (first..).map(SlotId::new);
        let places: Vec<_> =
            slots.zip(pieces.into_iter().flatten()).map(|(slot, bytes)| Place { slot, bytes }).collect();
        for place in places.into_iter().rev() {
            self.line.put_first(place);
        }
        self.growing = false;
    }

    fn add_segment(&mut self, slots: u32) -> Result<(), MemoryError> {
        let (map, descriptor) = Map::create("fbuf-segment", self.geometry.segment_bytes(slots))?;
        self.segments.push(Segment { map, descriptor: Arc::new(descriptor), slots });
        self.slots += slots;
        self.growing = true;
        Ok(())
    }

    /// The segments there are, but for the first `known`.
    pub fn announce(&self, known: usize) -> impl Iterator<Item = NewSegment> {
        self.segments.iter().skip(known).map(Segment::announce)
    }

    /// Takes the slot whose turn it is out of the line, if it is known to be free.
    #[inline]
    pub(crate) fn take_free(&mut self) -> Option<Place> {
        self.line.take_free()
    }

    /// Takes the slot out of the line that was put there last.
    pub(crate) fn take_last(&mut self) -> Place {
        self.line.take_last()
    }

    /// Where fbufs of this pool go that are dropped: the inside of an Arc.
    #[inline]
    pub(crate) fn shelf(&self) -> NonNull<Shelf> {
        NonNull::from(Arc::as_ref(&self.shelf))
    }

    /// Takes a filled fbuf back in order to send it: its slot, and how many bytes are filled.
    ///
    /// # Errors
    /// The fbuf, if it came from another pool.
    #[inline]
    pub fn take(&mut self, fbuf: Fbuf) -> Result<(SlotId, u32), Fbuf> {
        if fbuf.home() != self.shelf() {
            return Err(fbuf);
        }
        let (place, length) = fbuf.into_place();
        self.line.put_last(place);
        Ok((place.slot, length))
    }

    /// Looks which of the slots that come next are free, up to `most`: whether there is one.
    pub fn collect(&mut self, links: &[Outbound], most: u32) -> bool {
        let (line, known) = (self.line.ring.view(), self.line.known);
        let more = self.line.len().min(most as usize).saturating_sub(self.line.free());
        let next = (0..more).map(|index| line.at(known.wrapping_add(index)).slot);
        self.line.known = known.wrapping_add(match links {
            [link] => link.count_back(next),
            links => next.take_while(|&slot| !is_lent(links, slot)).count(),
        });
        self.line.free() > 0
    }

    /// Whether it is worth while for a sender that waits to go on: a batch of slots is back.
    #[must_use]
    #[inline]
    pub fn has_batch(&self, links: &[Outbound]) -> bool {
        self.line.get(BATCH.min(self.line.len() / 4)).is_some_and(|slot| !is_lent(links, slot))
    }

    /// Looks for a slot that is free although it is not its turn: a fbuf that was dropped unsent, or a
    /// slot behind others that receivers keep for long. Brings it to the head of the line; those
    /// before it go to the end, so that each of them costs one look per round. False if none was
    /// found; the next look goes on where this one ended.
    pub fn search(&mut self, links: &[Outbound]) -> bool {
        self.searched = if self.searched < self.line.len() { self.searched } else { 0 };
        self.search_from(self.searched, SEARCH, links)
    }

    /// As [`Self::search`], but looks everywhere.
    pub fn search_all(&mut self, links: &[Outbound]) -> bool {
        self.search_from(0, usize::MAX, links)
    }

    fn search_from(&mut self, from: usize, most: usize, links: &[Outbound]) -> bool {
        for place in self.shelf.clear() {
            self.line.put_first(place);
        }
        let free = |slot| !is_lent(links, slot);
        let found = if self.line.free() > 0 || self.line.get(0).is_some_and(free) {
            Some(0)
        } else {
            self.line.iter().skip(from).take(most).position(free).map(|index| from + index)
        };
        self.line.rotate(found.unwrap_or(0));
        self.searched = if found.is_some() { 0 } else { from.saturating_add(most) };
        found.is_some()
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

#[inline]
fn is_lent(links: &[Outbound], slot: SlotId) -> bool {
    links.iter().any(|link| link.has(slot))
}

impl Segment {
    fn announce(&self) -> NewSegment {
        NewSegment { memory: Descriptor::from(self.descriptor.clone()), slots: self.slots }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let out = self.out();
        let segments = std::mem::take(&mut self.segments);
        let mut state = self.shelf.lock();
        let put_back = if let Stored::Open { slots, .. } = &*state { slots.len() } else { 0 };
        let outstanding = out - put_back;
        if outstanding > 0 {
            *state = Stored::Closed { outstanding, kept: Kept { _shelf: self.shelf.clone(), _segments: segments } };
        }
    }
}

/// Where fbufs go that are dropped unsent. Outlives its pool for as long as fbufs are out.
#[derive(Debug)]
pub struct Shelf {
    state: Mutex<Stored>,
    wake: Arc<EventFd>,
}

#[derive(Debug)]
enum Stored {
    /// The pool takes them from here.
    Open { slots: Vec<Place>, waited_for: bool },
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
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, Stored> {
        // A panic while it was locked cannot have left it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a slot here; what to drop afterwards, if this was the last one.
    pub(crate) fn put_back(&self, place: Place) -> Option<Kept> {
        let mut state = self.lock();
        match &mut *state {
            Stored::Open { slots, waited_for } => {
                slots.push(place);
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

    fn count(&self) -> usize {
        if let Stored::Open { slots, .. } = &*self.lock() { slots.len() } else { 0 }
    }

    fn clear(&self) -> Vec<Place> {
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
        for _ in 0..8 {
            let fbuf = next(&mut pool).unwrap();
            order.push(pool.take(fbuf).unwrap().0.index());
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
        let fbuf = other.take(fbuf).unwrap_err();
        assert!(one.take(fbuf).is_ok());
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
