//! Where fbufs go that are dropped unsent, on whatever thread.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::sys::eventfd::EventFd;

use super::Format;
use crate::{
    process::fork::Generation,
    send::storage::Storage,
    slot::{Geometry, SlotId},
};

/// Where fbufs go that are dropped unsent. Outlives its pool for as long as fbufs are out.
#[derive(Debug)]
pub(crate) struct UnsentFbufs {
    shape: SlotShape,
    generation: Generation,
    stored: Mutex<Stored>,
    pub(super) wake: Arc<EventFd>,
}

/// What an fbuf needs to know of its slot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlotShape {
    geometry: Geometry,
    has_tags: bool,
}

impl SlotShape {
    pub(super) fn new(Format { geometry, extras }: Format) -> Self {
        Self { geometry, has_tags: extras.tags }
    }

    /// The size of the slot.
    #[inline]
    pub(crate) fn slot_bytes(self) -> u32 {
        self.geometry.slot_bytes()
    }

    /// Where its user header is.
    pub(crate) fn header(self) -> Range<usize> {
        self.geometry.header()
    }

    /// Whether messages may have tags.
    #[inline]
    pub(crate) fn has_tags(self) -> bool {
        self.has_tags
    }
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
    _unsent: Arc<UnsentFbufs>,
    _memory: Storage,
}

impl UnsentFbufs {
    /// For slots like this. `wake` is signalled when one is put here that is waited for.
    pub(super) fn new(shape: SlotShape, wake: Arc<EventFd>) -> Arc<Self> {
        let stored = Mutex::new(Stored::Open { slots: Vec::new(), waited_for: false });
        Arc::new(Self { shape, generation: Generation::current(), stored, wake })
    }

    /// What the slots are like that belong here.
    #[inline]
    pub(crate) fn shape(&self) -> SlotShape {
        self.shape
    }

    /// Whether this process was forked from the one that has the pool. The lock may then be held by a thread that is not
    /// there, and what fbufs need is not freed.
    pub(super) fn is_inherited(&self) -> bool {
        !self.generation.is_current()
    }

    fn lock(&self) -> MutexGuard<'_, Stored> {
        // A panic while it was locked cannot have left it half changed.
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a slot here; what to drop afterwards, if this was the last one.
    pub(crate) fn put_back(&self, slot: SlotId) -> Option<Kept> {
        if self.is_inherited() {
            return None;
        }
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

    /// What is here.
    pub(super) fn slots(&self) -> Vec<SlotId> {
        if let Stored::Open { slots, .. } = &*self.lock() { slots.clone() } else { Vec::new() }
    }

    /// Takes what is here.
    pub(super) fn clear(&self) -> Vec<SlotId> {
        match &mut *self.lock() {
            Stored::Open { slots, waited_for } => {
                *waited_for = false;
                std::mem::take(slots)
            }
            _ => Vec::new(),
        }
    }

    /// Has the next slot that is put here wake its pool. False if there is one already.
    pub(super) fn await_next(&self) -> bool {
        match &mut *self.lock() {
            Stored::Open { slots, waited_for } if slots.is_empty() => {
                *waited_for = true;
                true
            }
            _ => false,
        }
    }

    /// The pool is gone, and so many of its fbufs are out: its memory stays until the last of them is here.
    pub(super) fn close(self: Arc<Self>, out: usize, storage: Storage) {
        let mut stored = self.lock();
        let put_back = if let Stored::Open { slots, .. } = &*stored { slots.len() } else { 0 };
        let outstanding = out - put_back;
        if outstanding > 0 {
            let kept = Kept { _unsent: self.clone(), _memory: storage };
            *stored = Stored::Closed { outstanding, kept };
        }
    }
}
