//! Messages that are copied when they are taken, since their sender could still change them.
//!
//! They are copied to memory that is as large as their segment. The sender chose how large, and may be hostile: what it announces
//! takes no memory of its receiver, and no time, before it sends.
//!
//! One of the files of this crate that may be `unsafe`.

use std::{ops::Range, os::fd::AsFd};

use super::claim::Claim;
use crate::{
    memory::{Map, MemoryError, Pieces, available, map::can_provide},
    peer::Peer,
    process::deferred::{Cause, LARGE, Slow},
    ring::entry::Body,
    slot::{Geometry, SlotId},
    socket::link_message::{LinkEnd, NewSegment},
    violation::Unsuitable,
};

/// The segments of a link.
#[derive(Debug)]
pub(crate) struct CopiedSegments {
    geometry: Geometry,
    segments: Vec<CopiedSegment>,
}

#[derive(Debug)]
struct CopiedSegment {
    map: Map,
    copies: Copies,
    /// The number of its first slot.
    first: u32,
}

impl CopiedSegments {
    /// None yet.
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self { geometry, segments: Vec::new() }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.segments.len()
    }

    /// As [`Reading::add`](super::Reading::add).
    ///
    /// # Errors
    /// [`LinkEnd`]
    pub(crate) fn add(&mut self, new: &NewSegment, first: u32, sender: Peer) -> Result<Option<Pieces>, LinkEnd> {
        let size = self.geometry.segment_bytes(new.slots);
        let map = Map::attach_unread(new.memory.as_fd(), size)?.made_by(sender.other_user());
        let claim = Claim::of(new.memory.as_fd(), sender)?;
        if self.segments.iter().any(|other| other.copies.of.is_of_memory_of(&claim)) {
            return Err(Unsuitable::Shared.into());
        }
        let copies = Copies::new(size, claim).map_err(|error| LinkEnd::Exhausted(error.to_string()))?;
        let slots = copies.map.pieces(0..new.slots, self.geometry.stride(), self.geometry.slot_bytes());
        self.segments.push(CopiedSegment { map, copies, first });
        Ok(slots)
    }

    /// The place of a slot: the number of its segment, and where it begins there.
    fn place(&self, slot: SlotId) -> Option<(usize, usize)> {
        let segment = self.segments.iter().rposition(|segment| segment.first <= slot.number())?;
        let before = (slot.number() - self.segments[segment].first) as usize;
        Some((segment, before * self.geometry.stride() as usize))
    }

    /// What is copied of a slot: its message, from a word on, since maps are copied by words, and its user header.
    fn parts(&self, body: Body) -> [Range<usize>; 2] {
        let offset = body.offset() as usize;
        [offset / 8 * 8..offset + body.length() as usize, self.geometry.header()]
    }

    /// As [`Reading::provide`](super::Reading::provide).
    ///
    /// # Errors
    /// [`MemoryError`]: there is none.
    pub(crate) fn provide(&mut self, slot: SlotId, body: Body) -> Result<(), MemoryError> {
        let (Some((segment, begin)), parts) = (self.place(slot), self.parts(body)) else { return Ok(()) };
        let CopiedSegment { map, copies, .. } = &mut self.segments[segment];
        let mut parts = parts.into_iter().filter(|part| !part.is_empty());
        parts.try_for_each(|part| copies.provide(map, begin + part.start..begin + part.end))
    }

    /// Copies a message that was just taken, and its user header.
    ///
    /// # Errors
    /// [`LinkEnd`]: there is no copy.
    pub(crate) fn copy(&self, slot: SlotId, body: Body) -> Result<(), LinkEnd> {
        let copied = self.place(slot).is_some_and(|(segment, begin)| {
            let CopiedSegment { map, copies, .. } = &self.segments[segment];
            self.parts(body).into_iter().all(|part| {
                // SAFETY: only this process has the copies, of which this slot's has one reader (invariant 2), which has
                // not read yet: it is here. The other map is not written by this process.
                #[expect(unsafe_code, reason = "only here is it known that the message was just taken")]
                unsafe {
                    copies.map.copy_from(map, begin + part.start, part.len())
                }
            })
        });
        debug_assert!(copied, "slot {slot:?} is known, and lies in no segment");
        if copied { Ok(()) } else { Err(LinkEnd::Exhausted("there is no copy of a message".into())) }
    }
}

impl Slow for CopiedSegments {
    /// None of them may be large, and all of them together so large that it takes long to free them.
    fn cause(&mut self) -> Option<Cause> {
        let bytes =
            |segment: &CopiedSegment| (segment.map.addresses().len() + segment.copies.map.addresses().len()) as u64;
        (self.segments.iter().map(bytes).sum::<u64>() >= LARGE).then_some(Cause::Memory)
    }
}

/// How much exists at a time: enough that asking whether there is memory, and for it, does not count.
const PART: usize = 1 << 20;

/// Memory of this process alone, at the places at which its sender's messages lie in theirs.
#[derive(Debug)]
struct Copies {
    /// What was not [provided](Self::provide) of it is not to be touched.
    map: Map,
    /// The memory of the messages.
    of: Claim,
    /// Which parts exist. If all have from the beginning, there is none.
    parts: Vec<bool>,
}

impl Copies {
    /// For a segment of so many bytes, in this memory.
    ///
    /// # Errors
    /// [`MemoryError`]: there is less memory than that.
    fn new(size: u64, of: Claim) -> Result<Self, MemoryError> {
        let map = Map::private_growing(size)?.unmapped_deferred();
        let parts = if can_provide() { (size as usize).div_ceil(PART) } else { 0 };
        Ok(Self { map, of, parts: vec![false; parts] })
    }

    /// Has the memory for these bytes exist, and that of the segment from which they are copied, where pages may lack:
    /// whether both do, but for what is behind the end, is known from then on.
    ///
    /// # Errors
    /// [`MemoryError`]: there is none.
    #[inline]
    fn provide(&mut self, segment: &Map, bytes: Range<usize>) -> Result<(), MemoryError> {
        let parts = bytes.start / PART..bytes.end.div_ceil(PART).min(self.parts.len());
        match self.parts.get(parts.clone()) {
            Some(found) if found.contains(&false) => self.make(segment, parts),
            _ => Ok(()),
        }
    }

    #[cold]
    fn make(&mut self, segment: &Map, parts: Range<usize>) -> Result<(), MemoryError> {
        for part in parts {
            if !self.parts[part] {
                // A sender that has hidden pages behind the end of its own memory would have both made here.
                available::check(2 * PART as u64)?;
                let refused = |source| MemoryError::Refused { call: "madvise", asked: PART as u64, error: source };
                let bytes = part * PART..(part + 1) * PART;
                segment.provide(bytes.clone(), false).map_err(refused)?;
                self.map.provide(bytes, true).map_err(refused)?;
                self.parts[part] = true;
            }
        }
        Ok(())
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::memory::{Seals, memfd::with_pages_behind_end};
    use crate::peer::{Credentials, LinkId, Peer};
    use std::{
        fs::File,
        os::{fd::AsFd, unix::fs::FileExt},
    };

    const SIZE: usize = 8 * PART + 4096;

    /// How many bytes of a map exist, in memory or swapped out.
    fn existing(map: &Map) -> usize {
        let (begin, pages) = (map.addresses().start / 4096, map.addresses().len() / 4096);
        let mut words = vec![0; 8 * pages];
        File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut words, 8 * begin as u64).unwrap();
        4096 * words.chunks(8).filter(|word| word[7] & 0b1100_0000 != 0).count()
    }

    fn claim() -> Claim {
        let process = Credentials { pid: 1, uid: 1, gid: 1 };
        let sender = Peer { endpoint: 1, process, same_user: true, trusted: true, link: LinkId::default() };
        Claim::of(Map::create("fbuf-test", 4096).unwrap().1.as_fd(), sender).unwrap()
    }

    #[test]
    fn they_exist_as_far_as_they_were_used() {
        let mut copies = Copies::new(SIZE as u64, claim()).unwrap();
        let (_writer, memory) = Map::create("fbuf-test", SIZE as u64).unwrap();
        let segment = Map::attach_unread(memory.as_fd(), SIZE as u64).unwrap();
        let mut provide = |bytes| {
            copies.provide(&segment, bytes).unwrap();
            existing(&copies.map)
        };
        assert_eq!(provide(0..0), 0);
        assert_eq!(provide(5 * PART..5 * PART + 1), PART);
        assert_eq!(provide(5 * PART + 1..6 * PART), PART);
        assert_eq!(provide(4 * PART - 1..4 * PART + 1), 3 * PART);
        // The last is not whole, and behind it there is nothing.
        assert_eq!(provide(8 * PART..SIZE), 3 * PART + 4096);
        assert_eq!(provide(SIZE + PART..SIZE + 9 * PART), 3 * PART + 4096);
        assert_eq!(provide(0..SIZE), SIZE);
        // The control: other memory exists at once.
        assert_eq!(existing(&Map::private(SIZE as u64).unwrap()), SIZE);
    }

    /// A page that lacks would be made when it is read, or could not be, which ends the process.
    #[test]
    fn what_is_copied_exists_where_it_is_copied_from() {
        let memory = with_pages_behind_end(SIZE as u64, SIZE as u64, Seals::OneWriter);
        let pages = || nix::sys::stat::fstat(&memory).unwrap().st_blocks as usize * 512;
        let segment = Map::attach_unread(memory.as_fd(), SIZE as u64).unwrap();
        let mut copies = Copies::new(SIZE as u64, claim()).unwrap();
        copies.provide(&segment, PART..PART + 1).unwrap();
        assert_eq!(pages(), SIZE + PART);
        copies.provide(&segment, 0..SIZE).unwrap();
        assert_eq!(pages(), 2 * SIZE);
    }

    #[test]
    fn more_than_there_is_is_an_error() {
        assert!(matches!(Copies::new(1 << 50, claim()), Err(MemoryError::NotEnough { asked, .. }) if asked == 1 << 50));
    }
}
