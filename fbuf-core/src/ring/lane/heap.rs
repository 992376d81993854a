//! A lane on the heap of one process, for tests and models.

use super::*;
use crate::{memory::wrapping::WrappingTable, wait};

#[cfg(loom)]
use loom::sync::Arc;
#[cfg(not(loom))]
use std::sync::Arc;

#[derive(Debug, Clone)]
pub(crate) struct HeapLane(Arc<(LaneHead, WrappingTable<Entry>)>);

impl HeapLane {
    pub(crate) fn new(capacity: usize) -> Self {
        let head = LaneHead {
            flag: wait::Flag::new(),
            closed: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
            aborted: AtomicU64::new(0),
            last_ring: LastRing::new(),
            dropped: AtomicU64::new(0),
        };
        let ring = WrappingTable::new(capacity, || Entry { head: AtomicU64::new(0), body: AtomicU64::new(0) });
        Self(Arc::new((head, ring)))
    }

    /// Writes any words into the ring, as a hostile peer would.
    #[cfg(not(loom))]
    pub(crate) fn scribble(&self, index: usize, head: u64, body: u64) {
        self.0.1.at(index).scribble(head, body);
    }
}

impl WritableLane for HeapLane {
    fn head(&self) -> &LaneHead {
        &self.0.0
    }
    fn entry(&self, position: u64) -> &Entry {
        self.0.1.at(position as usize)
    }
}

impl LaneMemory for HeapLane {
    fn head(&self) -> ReadOnly<'_, LaneHead> {
        ReadOnly::of(&self.0.0)
    }
    fn entry(&self, position: u64) -> ReadOnly<'_, Entry> {
        ReadOnly::of(self.0.1.at(position as usize))
    }
    fn capacity(&self) -> u64 {
        self.0.1.iter().count() as u64
    }
}
