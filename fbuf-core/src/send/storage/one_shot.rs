//! Buffers that are sent once: each is a memfd of its own, written, sealed for good and given away. What
//! takes the place of segments in the pool of a sender that sends like this.
//!
//! Most of what a message of this kind costs is its memory: the kernel finds it, clears it and maps it page
//! by page. A [`Stock`] does that in advance, on a thread of its own: in this process and not in the broker,
//! for memory stays charged to the control group that reserved it until its last holder lets go of it
//! ("Memory Ownership" in the kernel's cgroup-v2.rst), and what all rely on must not pay for what one keeps.
//!
//! One of the files of this crate that may be `unsafe`.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError},
    thread::{self, JoinHandle},
};

use super::Unpublished;
use crate::{
    memory::{Map, MemoryError, Pieces, Reserved},
    points,
    process::threads,
    send::fbuf::Outgoing,
    slot::{Geometry, SlotId},
};

/// How many buffers are kept ready, if they are small,
const MOST: u64 = 4;
/// and how many bytes, unless one buffer has more.
const MOST_BYTES: u64 = 64 << 20;

/// The buffers that are being written, by slot. A slot is only a number here: how many of them there are
/// says how many messages may be under way.
#[derive(Debug)]
pub(crate) struct OneShotBuffers {
    geometry: Geometry,
    bytes: u64,
    slots: Vec<Option<Buffer>>,
    stock: Stock,
}

/// Memory of its own, that only this process can write, and no child of it.
#[derive(Debug)]
struct Buffer {
    // In this order: memory can be sealed once it is not mapped any more.
    map: Map,
    memory: Reserved,
}

impl Buffer {
    fn new(bytes: u64) -> Result<Self, MemoryError> {
        Self::of(Reserved::new("fbuf-sealed", bytes)?)
    }

    fn of(memory: Reserved) -> Result<Self, MemoryError> {
        // A child with a mapping to write it would keep it from being sealed; none has one (`Map`).
        Ok(Self { map: Map::writable(&memory)?, memory })
    }

    fn copy(of: &Reserved) -> Result<Self, MemoryError> {
        let memory = Reserved::new("fbuf-sealed", of.size())?;
        Ok(Self { map: Map::writable_copy(&memory, of)?.kept_from_children(), memory })
    }

    /// Seals it with a message of so many bytes, and with its user header. Of what else was written, or before the buffer was
    /// dropped unsent and used again, receivers get nothing.
    fn seal(self, length: usize, geometry: Geometry) -> Result<OwnedFd, (Reserved, MemoryError)> {
        let Self { map, memory } = self;
        let header = match geometry.header() {
            none if none.is_empty() => length..length,
            header => header,
        };
        for unsent in [length..header.start, header.end..usize::MAX] {
            // SAFETY: a buffer is mapped to be written, and the fbuf that wrote it has ended, since it is about to be sealed
            // (invariant 2).
            #[expect(unsafe_code, reason = "only here is it known that the buffer has no fbuf any more")]
            unsafe {
                map.clear(unsent);
            }
        }
        drop(map);
        points::reach("seal: unmapped");
        memory.seal_for_good()
    }
}

impl OneShotBuffers {
    /// Buffers of one such slot each.
    pub(crate) fn new(geometry: Geometry) -> Self {
        let bytes = geometry.segment_bytes(1);
        Self { geometry, bytes, slots: Vec::new(), stock: Stock::new(bytes) }
    }

    /// How many slots there are.
    pub(crate) fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Adds slots.
    pub(crate) fn add(&mut self, slots: u32) {
        self.slots.resize_with(self.slots.len() + slots as usize, || None);
    }

    /// The bytes of the buffer in a slot, to be written. One that was given away is replaced by a fresh one.
    pub(crate) fn prepare(&mut self, slot: SlotId) -> Result<Pieces, MemoryError> {
        let Some(place) = self.slots.get_mut(slot.index()) else { return Ok(Pieces::none(slot.number())) };
        if place.is_none() {
            // It is not waited for.
            *place = Some(self.stock.take().map_or_else(|| Buffer::new(self.bytes), Ok)?);
        }
        Ok(place.as_ref().map_or(Pieces::none(slot.number()), |draft| Pieces::one(&draft.map, slot.number())))
    }

    /// Seals the buffer in a slot for good with its message, and gives it away; or a copy of it, if another process can write it: a
    /// child that was forked before it was [kept](Map::kept_from_children) from children, say.
    ///
    /// # Errors
    /// [`Unpublished::NotSealed`], and the buffer stays, perhaps at another address; [`Unpublished::Lost`], if it cannot be mapped again.
    pub(crate) fn publish(&mut self, outgoing: &Outgoing) -> Result<OwnedFd, Unpublished> {
        let place = self.slots.get_mut(outgoing.slot.index()).ok_or(Unpublished::Stale)?;
        let buffer = place.take().ok_or(Unpublished::Stale)?;
        let sealed = Self::seal(buffer, place, outgoing.body.length() as usize, self.geometry);
        points::reach("seal: sealed");
        sealed
    }

    fn seal(
        buffer: Buffer,
        place: &mut Option<Buffer>,
        length: usize,
        geometry: Geometry,
    ) -> Result<OwnedFd, Unpublished> {
        let memory = match buffer.seal(length, geometry) {
            Ok(sealed) => return Ok(sealed),
            Err((memory, _)) => memory,
        };
        let sealed = Buffer::copy(&memory).and_then(|copy| copy.seal(length, geometry).map_err(|(_, error)| error));
        sealed.map_err(|error| match Buffer::of(memory) {
            Ok(buffer) => {
                *place = Some(buffer);
                Unpublished::NotSealed(error)
            }
            Err(_) => Unpublished::Lost,
        })
    }
}

/// Buffers that are ready to be written, and the thread that makes them.
#[derive(Debug)]
struct Stock {
    unsent: Arc<Mutex<ReadyBuffers>>,
    /// None if there could be no thread: all buffers are then made when they are needed.
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct ReadyBuffers {
    ready: Vec<Buffer>,
    over: bool,
}

impl Stock {
    fn new(bytes: u64) -> Self {
        let unsent = Arc::new(Mutex::new(ReadyBuffers { ready: Vec::new(), over: false }));
        let filled = unsent.clone();
        let most = (MOST_BYTES / bytes).clamp(1, MOST) as usize;
        let thread = threads::spawn("fbuf-stock", move || fill(&filled, bytes, most));
        Self { unsent, thread: thread.ok() }
    }

    /// Takes one, if there is one; never waits.
    fn take(&self) -> Option<Buffer> {
        let draft = match self.unsent.try_lock() {
            Ok(mut unsent) => unsent.ready.pop(),
            Err(TryLockError::Poisoned(error)) => error.into_inner().ready.pop(),
            Err(TryLockError::WouldBlock) => None,
        };
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
        draft
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        // In a child that was forked the pool forgets it (`Drop for Pool`): there is no such thread.
        lock(&self.unsent).over = true;
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn lock(unsent: &Mutex<ReadyBuffers>) -> MutexGuard<'_, ReadyBuffers> {
    // Nothing panics while it is locked.
    unsent.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps so many buffers ready until it is over.
fn fill(unsent: &Mutex<ReadyBuffers>, bytes: u64, most: usize) {
    loop {
        let (over, full) = {
            let unsent = lock(unsent);
            (unsent.over, unsent.ready.len() >= most)
        };
        if over {
            return;
        }
        // If there is no memory, `prepare` makes a buffer itself, and hears why not.
        match if full { None } else { Buffer::new(bytes).ok() } {
            Some(draft) => {
                draft.map.populate();
                lock(unsent).ready.push(draft);
            }
            None => thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{fd::AsFd, unix::fs::FileExt},
    };

    use super::*;
    use crate::{
        memory::{Sealed, available::without_memory},
        ring::entry::Body,
        slot::GeometryTerms,
    };

    fn ready(stock: &Stock) -> usize {
        lock(&stock.unsent).ready.len()
    }

    /// Waits for its thread, as nobody else does.
    fn wait_for(stock: &Stock, count: usize) {
        while ready(stock) != count {
            thread::yield_now();
        }
    }

    #[test]
    fn a_stock_is_filled_again_and_again_and_never_waited_for() {
        let stock = Stock::new(4096);
        for _ in 0..100 {
            wait_for(&stock, MOST as usize);
            // None while its thread has a look at it; `prepare` would make one.
            let draft = std::iter::from_fn(|| Some(stock.take())).find_map(|draft| draft).unwrap();
            assert_eq!(draft.memory.size(), 4096);
        }
    }

    #[test]
    fn a_stock_of_large_buffers_is_small() {
        let stock = Stock::new(MOST_BYTES / 2);
        wait_for(&stock, 2);
        thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(ready(&stock), 2);
    }

    /// What was in a buffer before, and what was written behind the message, does not leave the process.
    #[test]
    fn what_is_sealed_is_the_message_and_the_header_and_zeroes() {
        let terms = |header_bytes| GeometryTerms { header_bytes, ..GeometryTerms::new(5000, 1) };
        for (header_bytes, length) in [(0, 0), (0, 1), (0, 4096), (0, 5000), (8, 0), (64, 5000), (64, 4097)] {
            let geometry = Geometry::try_from(terms(header_bytes)).unwrap();
            let bytes = geometry.segment_bytes(1) as usize;
            let buffer = Buffer::new(bytes as u64).unwrap();
            File::from(buffer.memory.as_fd().try_clone_to_owned().unwrap()).write_all_at(&vec![7; bytes], 0).unwrap();
            let sealed =
                Sealed::new(buffer.seal(length, geometry).map_err(|(_, error)| error).unwrap(), bytes).unwrap();
            for (at, &byte) in sealed.iter().enumerate() {
                let is_sent = at < length || geometry.header().contains(&at);
                assert_eq!(byte == 7, is_sent, "byte {at} of {geometry:?}");
                assert!(is_sent || byte == 0);
            }
        }
    }

    /// Another mapping keeps it from being sealed, as a child's does.
    #[test]
    fn a_buffer_that_can_neither_be_sealed_nor_mapped_again_is_not_replaced_by_an_empty_one() {
        let mut buffers = OneShotBuffers::new(Geometry::new(8, 1).unwrap());
        buffers.add(1);
        let slot = SlotId::new(0);
        for has_memory in [true, false] {
            let (_, bytes) = buffers.prepare(slot).unwrap().next().unwrap();
            let _other = Map::writable(&buffers.slots[0].as_ref().unwrap().memory).unwrap();
            let outgoing = Outgoing { slot, bytes, body: Body::new(0, 8), tag: 0 };
            if has_memory {
                assert!(buffers.publish(&outgoing).is_ok(), "the control: a copy is sealed");
            } else {
                let published = without_memory(|| buffers.publish(&outgoing));
                assert!(matches!(published, Err(Unpublished::Lost)), "{published:?}");
            }
        }
    }

    #[test]
    fn without_memory_there_is_no_stock_and_a_buffer_is_an_error() {
        let bytes = 1 << 50;
        let small = OneShotBuffers::new(Geometry::new(1, 1).unwrap());
        let mut buffers = OneShotBuffers { bytes, stock: Stock::new(bytes), ..small };
        buffers.add(1);
        assert!(matches!(buffers.prepare(SlotId::new(0)), Err(MemoryError::NotEnough { .. })));
        assert_eq!(ready(&buffers.stock), 0);
    }
}
