//! Words that a peer writes and this process only reads.
//!
//! The memory of a peer is mapped read-only: a store into it would kill this process with SIGSEGV. The words in it are
//! atomics all the same, which a `&AtomicU64` would let any code store to. So what lies in such memory is shown as a
//! [`ReadOnly`], which has the loads and no stores.

use crate::sync::{AtomicU64, Ordering};

/// A reference through which words can be loaded, and not stored.
///
/// ```
/// use fbuf_core::memory::{Table, TableView};
/// use std::{os::fd::AsFd, sync::atomic::{AtomicU64, Ordering}};
///
/// let (written, memory) = Table::<AtomicU64, AtomicU64>::create("example", 8)?;
/// let read = TableView::<AtomicU64, AtomicU64>::attach(memory.as_fd(), 8)?;
/// written.at(3).store(7, Ordering::Release);
/// assert_eq!(read.at(3).load(Ordering::Acquire), 7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// ```compile_fail,E0599
/// use fbuf_core::memory::{Table, TableView};
/// use std::{os::fd::AsFd, sync::atomic::{AtomicU64, Ordering}};
///
/// let (written, memory) = Table::<AtomicU64, AtomicU64>::create("example", 8)?;
/// let read = TableView::<AtomicU64, AtomicU64>::attach(memory.as_fd(), 8)?;
/// read.at(3).store(7, Ordering::Release);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ReadOnly<'a, T: ?Sized>(&'a T);

impl<T: ?Sized> Clone for ReadOnly<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: ?Sized> Copy for ReadOnly<'_, T> {}

impl<'a, T: ?Sized> ReadOnly<'a, T> {
    /// Shows words without their stores.
    #[inline]
    pub(crate) fn of(words: &'a T) -> Self {
        Self(words)
    }

    /// Some of these words.
    #[inline]
    pub(crate) fn part<U: ?Sized>(self, choose: impl FnOnce(&'a T) -> &'a U) -> ReadOnly<'a, U> {
        ReadOnly(choose(self.0))
    }
}

impl<'a, T> ReadOnly<'a, [T]> {
    /// One after the other.
    #[inline]
    pub fn iter(self) -> impl ExactSizeIterator<Item = ReadOnly<'a, T>> {
        self.0.iter().map(ReadOnly)
    }
}

impl ReadOnly<'_, AtomicU64> {
    /// As [`AtomicU64::load`].
    #[inline]
    #[must_use]
    pub fn load(self, order: Ordering) -> u64 {
        self.0.load(order)
    }
}
