//! Where Miri runs this, which has no memfd: shared memory is an allocation, which lives as long as anything maps it, and
//! its descriptor stands for it. What is done with the memory is the same code, which Miri checks: that no reference
//! outlives a mapping, that no thread writes what another reads, and by which pointers it is reached.
#![allow(unsafe_code)]

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use nix::sys::eventfd::EventFd;

use super::{Map, MemoryError};
use crate::violation::Unsuitable;

/// That the rest of `Map` is code for the compiler.
pub(super) const IS_USED: bool = true;

/// What is shared.
#[derive(Debug)]
pub(crate) struct Heap {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an allocation belongs to no thread; the code that follows pointers into it says why it may.
unsafe impl Send for Heap {}
// SAFETY: an allocation belongs to no thread; the code that follows pointers into it says why it may.
unsafe impl Sync for Heap {}

impl Heap {
    fn new(size: u64) -> Result<Arc<Self>, MemoryError> {
        let not_enough = MemoryError::NotEnough { asked: size, available: 1 << 24, bound: "what Miri is given here" };
        let layout = Layout::from_size_align(size as usize, 4096).ok().filter(|_| (1..1 << 24).contains(&size));
        let layout = layout.ok_or(not_enough)?;
        // SAFETY: the layout has a size.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).expect("there is memory");
        Ok(Arc::new(Self { base, layout }))
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(super) fn size(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Heap {
    fn drop(&mut self) {
        // SAFETY: it was allocated so, and nothing maps it any more (invariant 2): Miri sees if anything points there.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

static MEMORY: Named<Weak<Heap>> = Named::new();

pub(super) fn create(size: u64) -> Result<(Map, OwnedFd), MemoryError> {
    let heap = Heap::new(size)?;
    let descriptor = MEMORY.add(Arc::downgrade(&heap));
    Ok((Map::over(heap), descriptor))
}

pub(super) fn attach(fd: BorrowedFd<'_>, size: u64) -> Result<Map, Unsuitable> {
    let heap = MEMORY.of(fd).upgrade().ok_or(Unsuitable::NotSealable)?;
    let found = heap.size() as u64;
    if found == size { Ok(Map::over(heap)) } else { Err(Unsuitable::Size { found, wanted: size }) }
}

pub(super) fn private(size: u64) -> Result<Map, MemoryError> {
    Ok(Map::over(Heap::new(size)?))
}

/// Things that descriptors stand for. Each descriptor is an eventfd; its count is the number of its thing.
pub(crate) struct Named<T>(Mutex<BTreeMap<u64, T>>);

impl<T: Clone> Named<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    pub(crate) fn add(&self, thing: T) -> OwnedFd {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = all.len() as u32 + 1;
        all.insert(number.into(), thing);
        EventFd::from_value(number).expect("there are descriptors").into()
    }

    /// What a descriptor stands for that is one of these.
    pub(crate) fn of(&self, fd: BorrowedFd<'_>) -> T {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = [0; 8];
        nix::unistd::read(fd.as_fd(), &mut count).expect("it is an eventfd");
        // It is zero then.
        nix::unistd::write(fd, &count).expect("it is an eventfd");
        all[&u64::from_ne_bytes(count)].clone()
    }
}
