//! A lane on the heap of one process, for tests and models.

use super::*;
use crate::{memory::wrapping::WrappingTable, wait};

#[cfg(loom)]
use loom::sync::Arc;
#[cfg(not(loom))]
use std::sync::Arc;

#[derive(Debug, Clone)]
pub(crate) struct HeapLane(Arc<(LaneHead, WrappingTable<LaneCell>)>);

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
        let ring = WrappingTable::new(capacity, || LaneCell { first: AtomicU64::new(0), second: AtomicU64::new(0) });
        Self(Arc::new((head, ring)))
    }

    /// Both ends of a new one of so many cells.
    pub(crate) fn ends(capacity: usize, format: LaneFormat) -> (LaneWriter<Self>, LaneReader<Self>) {
        let memory = Self::new(capacity);
        (LaneWriter::new(memory.clone(), format), LaneReader::new(memory, format))
    }

    /// Writes any words into the ring, as a hostile peer would.
    #[cfg(not(loom))]
    pub(crate) fn scribble(&self, index: usize, first: u64, second: u64) {
        self.0.1.at(index).scribble(first, second);
    }
}

impl WritableLane for HeapLane {
    fn head(&self) -> &LaneHead {
        &self.0.0
    }
    fn cell(&self, position: u64) -> &LaneCell {
        self.0.1.at(position as usize)
    }
    fn pair(&self, position: u64) -> [&LaneCell; 2] {
        [position & !1, position | 1].map(|position| self.0.1.at(position as usize))
    }
}

impl LaneMemory for HeapLane {
    fn head(&self) -> ReadOnly<'_, LaneHead> {
        ReadOnly::of(&self.0.0)
    }
    fn cell(&self, position: u64) -> ReadOnly<'_, LaneCell> {
        ReadOnly::of(WritableLane::cell(self, position))
    }
    fn pair(&self, position: u64) -> [ReadOnly<'_, LaneCell>; 2] {
        WritableLane::pair(self, position).map(ReadOnly::of)
    }
    fn capacity(&self) -> u64 {
        self.0.1.iter().count() as u64
    }
}
