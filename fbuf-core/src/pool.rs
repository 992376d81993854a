//! A sender's slots (invariant 2): free in its pool, held as a [`Fbuf`], or lent over links. All of
//! it is private memory of one thread, but for the shelf, where fbufs are put that were dropped
//! unsent, on whatever thread.
//!
//! Slots are reused first in, first out: the bytes that come next were written longest ago, have
//! left the writer's private cache, and cost the reader no fetch of dirty lines.

use std::{
    collections::VecDeque,
    os::fd::OwnedFd,
    ptr::NonNull,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::eventfd::EventFd;

use crate::{
    limits::MAX_SEGMENTS,
    link::NewSegment,
    loan::Fbuf,
    memory::{Map, MemoryError},
    outbound::Outbound,
    slot::{Geometry, SlotId},
    wire::Descriptor,
};

/// How many slots one look at the boards takes back at most.
const BATCH: usize = 64;

/// A sender's slots.
#[derive(Debug)]
pub struct Pool {
    geometry: Geometry,
    segments: Vec<Segment>,
    /// In the order in which they came back.
    free: VecDeque<SlotId>,
    /// In the order in which they were sent, roughly.
    lent: VecDeque<SlotId>,
    /// How many are fbufs now.
    held: usize,
    /// Whether the last segment is still to be announced, and its slots are not free yet.
    growing: bool,
    shelf: Arc<Shelf>,
}

#[derive(Debug)]
struct Segment {
    map: Map,
    descriptor: Arc<OwnedFd>,
    slots: u32,
    /// The index of its first slot among all slots of the sender.
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
        let shelf = Arc::new(Shelf { state: Mutex::new(Stored::Open { slots: Vec::new(), waited_for: false }), wake });
        let (free, lent) = (VecDeque::new(), VecDeque::new());
        let mut pool = Self { geometry, segments: Vec::new(), free, lent, held: 0, growing: false, shelf };
        pool.add_segment(slots.min(geometry.max_slots()))?;
        pool.use_segment();
        Ok(pool)
    }

    /// The size and number of its slots.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Where its slots are. Lent ones that have come back since the last look count as lent.
    #[must_use]
    pub fn places(&self) -> Places {
        let put_back = self.shelf.count();
        Places { free: self.free.len() + put_back, held: self.held - put_back, lent: self.lent.len() }
    }

    /// How many slots there are now.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.segments.last().map_or(0, |segment| segment.first + segment.slots)
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

    /// Frees the slots of the new segment.
    pub fn use_segment(&mut self) {
        if let Some(last) = self.segments.last().filter(|_| self.growing) {
            let segment = (self.segments.len() - 1) as u16;
            self.free.extend((0..last.slots).map(|slot| SlotId { segment, slot }));
            self.growing = false;
        }
    }

    fn add_segment(&mut self, slots: u32) -> Result<(), MemoryError> {
        let (map, descriptor) = Map::create("fbuf-segment", self.geometry.segment_bytes(slots))?;
        let first = self.slots();
        self.segments.push(Segment { map, descriptor: Arc::new(descriptor), slots, first });
        // All slots may be in either; so that neither ever grows while messages flow.
        let all = (first + slots) as usize;
        self.free.reserve(all - self.free.len());
        self.lent.reserve(all - self.lent.len());
        self.growing = true;
        Ok(())
    }

    /// The segments there are, but for the first `known`.
    pub fn announce(&self, known: usize) -> impl Iterator<Item = NewSegment> {
        self.segments.iter().skip(known).map(Segment::announce)
    }

    /// Takes a slot out of the free ones: its name, and where its bytes are.
    #[inline]
    pub(crate) fn take_free(&mut self) -> Option<(SlotId, NonNull<u8>)> {
        let slot = self.free.pop_front()?;
        let segment = self.segments.get(usize::from(slot.segment))?;
        let bytes = segment.map.at(u64::from(slot.slot) * self.geometry.stride(), self.geometry.slot_bytes().into())?;
        self.held += 1;
        Some((slot, bytes))
    }

    /// Where fbufs of this pool go that are dropped: the inside of an Arc.
    #[inline]
    pub(crate) fn shelf(&self) -> NonNull<Shelf> {
        NonNull::from(Arc::as_ref(&self.shelf))
    }

    /// Takes a filled fbuf back in order to send it: its slot, that slot's index, and how many bytes
    /// are filled.
    ///
    /// # Errors
    /// The fbuf, if it came from another pool.
    #[inline]
    pub fn take(&mut self, fbuf: Fbuf) -> Result<(SlotId, u32, u32), Fbuf> {
        if fbuf.home() != self.shelf() {
            return Err(fbuf);
        }
        let (slot, length) = fbuf.into_slot();
        self.held -= 1;
        self.lent.push_back(slot);
        Ok((slot, self.index(slot), length))
    }

    /// The number of a slot among all slots of the sender.
    #[inline]
    fn index(&self, slot: SlotId) -> u32 {
        self.segments[usize::from(slot.segment)].first + slot.slot
    }

    /// Whether a look at the boards could help: the slot that was sent first is back.
    #[must_use]
    #[inline]
    pub fn first_is_back(&self, links: &mut [Outbound]) -> bool {
        self.lent.front().is_some_and(|&slot| !is_lent(links, self.index(slot)))
    }

    /// Takes back what receivers and dropped fbufs have returned, up to a batch of it. Slots that
    /// somebody keeps for long move to the end of the line, so that each costs one look per round.
    /// Returns how many lent slots are back.
    pub fn collect(&mut self, links: &mut [Outbound]) -> usize {
        let put_back = self.shelf.clear();
        self.held -= put_back.len();
        self.free.extend(put_back);
        for link in &mut *links {
            link.notice_leaving();
        }
        let mut taken = 0;
        for _ in 0..self.lent.len() {
            let Some(slot) = self.lent.pop_front() else { break };
            if is_lent(links, self.index(slot)) {
                self.lent.push_back(slot);
                continue;
            }
            self.free.push_back(slot);
            taken += 1;
            if taken == BATCH {
                break;
            }
        }
        taken
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
fn is_lent(links: &mut [Outbound], index: u32) -> bool {
    let mut lent = false;
    for link in links {
        lent |= link.holds(index);
    }
    lent
}

impl Segment {
    fn announce(&self) -> NewSegment {
        NewSegment { memory: Descriptor::from(self.descriptor.clone()), slots: self.slots }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let segments = std::mem::take(&mut self.segments);
        let mut state = self.shelf.lock();
        let put_back = if let Stored::Open { slots, .. } = &*state { slots.len() } else { 0 };
        let outstanding = self.held - put_back;
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
}

impl Shelf {
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

    fn count(&self) -> usize {
        if let Stored::Open { slots, .. } = &*self.lock() { slots.len() } else { 0 }
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

    fn pool(slots: u32, limit: u64) -> Pool {
        let wake = Arc::new(EventFd::new().unwrap());
        Pool::new(Geometry::new(100, limit).unwrap(), slots, wake).unwrap()
    }

    #[test]
    fn a_slot_is_in_one_place() {
        let mut pool = pool(3, 3);
        let all: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(all.len(), 3);
        assert_eq!(pool.places(), Places { free: 0, held: 3, lent: 0 });
        let mut starts: Vec<_> = all.iter().map(|fbuf| fbuf.as_ptr() as usize).collect();
        starts.sort_unstable();
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= 100), "slots overlap");
        drop(all);
        pool.collect(&mut []);
        assert_eq!(pool.places(), Places { free: 3, held: 0, lent: 0 });
    }

    #[test]
    fn slots_are_reused_first_in_first_out() {
        let mut pool = pool(4, 4);
        let mut order = Vec::new();
        for _ in 0..8 {
            let fbuf = pool.allocate().or_else(|| {
                pool.collect(&mut []);
                pool.allocate()
            });
            order.push(pool.take(fbuf.unwrap()).unwrap().1);
        }
        assert_eq!(order, [0, 1, 2, 3, 0, 1, 2, 3]);
    }

    #[test]
    fn growth_doubles_up_to_the_limit() {
        let mut pool = pool(2, 7);
        pool.grow().unwrap();
        assert!(pool.is_growing());
        assert_eq!(pool.places().free, 2, "slots are free before receivers know of them");
        pool.use_segment();
        pool.grow().unwrap();
        pool.use_segment();
        assert!(!pool.can_grow() && !pool.is_growing());
        assert_eq!(pool.announce(0).map(|segment| segment.slots).collect::<Vec<_>>(), [2, 2, 3]);
        assert_eq!(std::iter::from_fn(|| pool.allocate()).count(), 7);
    }

    #[test]
    fn a_fbuf_of_another_pool_is_handed_back() {
        let (mut one, mut other) = (pool(1, 1), pool(1, 1));
        let fbuf = one.allocate().unwrap();
        let fbuf = other.take(fbuf).unwrap_err();
        assert!(one.take(fbuf).is_ok());
    }

    #[test]
    fn fbufs_outlive_their_pool_and_take_its_memory_with_them() {
        let mut pool = pool(2, 2);
        let shelf = Arc::downgrade(&pool.shelf);
        let (mut one, two) = (pool.allocate().unwrap(), pool.allocate().unwrap());
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
        let fbuf = pool.allocate().unwrap();
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
        let mut fbuf = pool.allocate().unwrap();
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
