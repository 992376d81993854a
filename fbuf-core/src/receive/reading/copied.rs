//! Where a receiver copies the messages of a segment to: as large as that, and there as far as it has been used. The sender
//! chose how large, and may be hostile: what it announces takes no memory of its receiver, and no time, before it sends.

use std::ops::Range;

use super::claim::Claim;
use crate::memory::{Map, MemoryError, available, map::can_provide};

/// How much exists at a time: enough that asking whether there is memory, and for it, does not count.
const PART: usize = 1 << 20;

/// Memory of this process alone, at the places at which its sender's messages lie in theirs.
#[derive(Debug)]
pub(crate) struct Copies {
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
    pub(crate) fn new(size: u64, of: Claim) -> Result<Self, MemoryError> {
        let map = Map::private_growing(size)?.unmapped_deferred();
        let parts = if can_provide() { (size as usize).div_ceil(PART) } else { 0 };
        Ok(Self { map, of, parts: vec![false; parts] })
    }

    /// Of which memory the messages are.
    pub(crate) fn of(&self) -> &Claim {
        &self.of
    }

    /// The memory itself, of which what was not [provided](Self::provide) is not to be touched.
    pub(crate) fn map(&self) -> &Map {
        &self.map
    }

    /// Has the memory for these bytes exist, and that of the segment from which they are copied, where pages may lack:
    /// whether both do, but for what is behind the end, is known from then on.
    ///
    /// # Errors
    /// [`MemoryError`]: there is none.
    #[inline]
    pub(crate) fn provide(&mut self, segment: &Map, bytes: Range<usize>) -> Result<(), MemoryError> {
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
            existing(copies.map())
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
