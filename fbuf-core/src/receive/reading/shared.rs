//! Messages that are read where they were written, in segments of a sender that is trusted not to change them
//! ([`Trusted`](crate::trust::Trusted)).

use std::{
    io,
    ops::Range,
    os::fd::AsFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    memory::{Map, MemoryError, Pieces, page_bytes},
    process::deferred::{Cause, LARGE, Slow},
    receive::link::Returns,
    slot::Geometry,
    socket::{
        link_message::{LinkEnd, NewSegment},
        wire::Descriptor,
    },
};

/// The segments of a link.
#[derive(Debug, Default)]
pub(crate) struct SharedSegments(Vec<Map>);

impl SharedSegments {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// As [`Reading::add`](super::Reading::add).
    ///
    /// # Errors
    /// [`LinkEnd`]
    pub(crate) fn add(
        &mut self,
        new: &NewSegment,
        geometry: Geometry,
        home: &Returns,
    ) -> Result<Option<Pieces>, LinkEnd> {
        let map = Map::attach(new.memory.as_fd(), geometry.segment_bytes(new.slots))?;
        let map = map.made_by(home.peer().other_user());
        let slots = map.pieces(0..new.slots, geometry.stride(), geometry.slot_bytes());
        home.views().add(map.addresses(), new.memory.clone());
        self.0.push(map);
        Ok(slots)
    }
}

impl Slow for SharedSegments {
    /// None of them may be large, and all of them together so large that it takes long to free them: they may be the last that
    /// anybody has.
    fn cause(&mut self) -> Option<Cause> {
        (self.0.iter().map(|map| map.addresses().len() as u64).sum::<u64>() >= LARGE).then_some(Cause::Memory)
    }
}

/// The memory of segments by address, for views of messages that this process may write for itself.
#[derive(Debug, Default)]
pub(crate) struct Views(Mutex<Vec<(Range<usize>, Descriptor)>>);

impl Views {
    fn lock(&self) -> MutexGuard<'_, Vec<(Range<usize>, Descriptor)>> {
        // A panic while it was locked cannot have left it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, addresses: Range<usize>, memory: Descriptor) {
        self.lock().push((addresses, memory));
    }

    /// A view of so many bytes at an address in a segment, to be written by this process alone: the mapping, and where they begin
    /// in it.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub(crate) fn make_private(&self, address: usize, length: usize) -> Result<(Map, usize), MemoryError> {
        let segments = self.lock();
        let found = segments.iter().find(|(addresses, _)| addresses.contains(&address));
        let Some((addresses, memory)) = found else {
            let source = io::Error::other("the message is in no segment");
            return Err(MemoryError::Refused { call: "mmap", asked: length as u64, error: source });
        };
        let page = page_bytes() as usize;
        let begin = address - addresses.start;
        let (first, end) = (begin / page * page, begin + length);
        Ok((Map::copy_on_write(memory.as_fd(), first as u64, (end - first) as u64)?, begin - first))
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    /// A sender may have several segments, none of which is large, and leave them to its receiver alone.
    #[test]
    fn segments_that_are_large_together_are_unmapped_by_another_thread() {
        let segments = |count| {
            let segment = |_| Map::create("fbuf-test", LARGE / 4).unwrap().0;
            SharedSegments((0..count).map(segment).collect())
        };
        assert_eq!([3, 4].map(|count| segments(count).cause()), [None, Some(Cause::Memory)]);
    }
}
