//! Tables of atomic words in shared memory.
#![allow(unsafe_code)]

use std::{
    marker::PhantomData,
    ops::Range,
    os::fd::{BorrowedFd, OwnedFd},
    slice,
};

use zerocopy::FromBytes;

use super::{Map, MemoryError, available, map::can_provide};
use crate::{
    sync::{AtomicU64, read_only::ReadOnly},
    violation::Unsuitable,
};

/// From how many bytes on it is looked whether there is memory for them, which takes as long as to have some exist.
const CHECKED_FROM: usize = 1 << 20;

/// A type that may lie in memory which another process writes at any time.
///
/// # Safety
/// It consists of atomics only, so that a reference to it promises nothing about its bytes. (That any bytes are a
/// valid one is what `FromBytes` says.)
pub unsafe trait SharedLayout: FromBytes {}

// SAFETY: itself.
unsafe impl SharedLayout for AtomicU64 {}

/// A header `H` followed by cells `C`, as many as a power of two from two on, in shared memory that this process writes. The other
/// side may map it, but not write it; both are [`SharedLayout`]s all the same, as [`TableView`] needs it.
///
/// ```
/// use fbuf_core::memory::Table;
/// use std::sync::atomic::AtomicU64;
///
/// let _size = Table::<AtomicU64, AtomicU64>::size(8);
/// ```
///
/// Numbers are none, for a `&u64` says that it does not change:
///
/// ```compile_fail,E0277
/// use fbuf_core::memory::Table;
///
/// let _size = Table::<u64, u64>::size(8);
/// ```
#[derive(Debug)]
pub struct Table<H, C>(Laid<H, C>);

/// The same, in memory that a peer writes, mapped read-only: words can be [loaded](ReadOnly) and not stored.
#[derive(Debug)]
pub struct TableView<H, C>(Laid<H, C>);

/// How a table lies in a mapping.
#[derive(Debug)]
struct Laid<H, C> {
    map: Map,
    /// One less than there are cells, which are two or more.
    mask: usize,
    layout: PhantomData<(H, C)>,
}

// SAFETY: all that is ever reached through a table is `&H` and `&C`, from any thread; the mapping is the process's.
unsafe impl<H: Sync, C: Sync> Send for Laid<H, C> {}
// SAFETY: all that is reached through a shared table is `&H` and `&C`.
unsafe impl<H: Sync, C: Sync> Sync for Laid<H, C> {}

impl<H: SharedLayout, C: SharedLayout> Table<H, C> {
    /// The bytes that a table with at least so many cells takes, in whole pages; [`u64::MAX`], of which there never
    /// is so much memory, if there is no power of two of so many.
    #[must_use]
    pub fn size(least: usize) -> u64 {
        Laid::<H, C>::size(least)
    }

    /// Makes a table of at least so many cells, of zeroes, that this process writes; the descriptor is
    /// for its reader.
    ///
    /// # Errors
    /// [`MemoryError`] as in [`Map::create`].
    pub fn create(name: &str, least: usize) -> Result<(Self, OwnedFd), MemoryError> {
        let (map, fd) = Map::create(name, Self::size(least))?;
        Ok((Self(Laid::over(map, least)), fd))
    }

    /// As [`Self::create`], with memory for the first page only: before cells are used, they are
    /// [provided](Self::provide).
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_growing(name: &str, least: usize) -> Result<(Self, OwnedFd), MemoryError> {
        let (map, fd) = Map::create_growing(name, Self::size(least))?;
        Ok((Self(Laid::over(map, least)), fd))
    }

    /// Has memory exist for the header and the first `cells` cells. Each side does so for what it uses, be the other
    /// side honest or not: an access to a page that does not exist may find no memory, which ends the process.
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn provide(&self, cells: usize) -> Result<(), MemoryError> {
        self.0.provide(cells, true)
    }

    /// The header.
    #[must_use]
    #[inline]
    pub fn head(&self) -> &H {
        self.0.head()
    }

    /// How many cells there are.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// The cell at `index`, or at what is left of it after so many laps.
    #[must_use]
    #[inline]
    pub fn at(&self, index: usize) -> &C {
        self.0.at(index)
    }

    /// The same and the cell right behind it, of an even index; of an odd one, the cell right before it and the same.
    #[must_use]
    #[inline]
    pub fn pair(&self, index: usize) -> [&C; 2] {
        self.0.pair(index).each_ref()
    }
}

impl<H: SharedLayout, C: SharedLayout> TableView<H, C> {
    /// Maps a table of at least so many cells that a peer writes.
    ///
    /// # Errors
    /// [`Unsuitable`]: it is not what a peer may send.
    pub fn attach(fd: BorrowedFd<'_>, least: usize) -> Result<Self, Unsuitable> {
        Ok(Self(Laid::over(Map::attach(fd, Laid::<H, C>::size(least))?, least)))
    }

    /// As [`Self::attach`], of a table of which not all cells need exist: nothing is looked at before it is
    /// [provided](Self::provide).
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn attach_growing(fd: BorrowedFd<'_>, least: usize) -> Result<Self, Unsuitable> {
        Ok(Self(Laid::over(Map::attach_growing(fd, Laid::<H, C>::size(least))?, least)))
    }

    /// The same, in memory that another user made: [`Map::made_by`].
    #[must_use]
    pub(crate) fn made_by(mut self, user: Option<u32>) -> Self {
        self.0.map = self.0.map.made_by(user);
        self
    }

    /// As [`Table::provide`].
    ///
    /// # Errors
    /// [`MemoryError`]
    pub fn provide(&self, cells: usize) -> Result<(), MemoryError> {
        self.0.provide(cells, false)
    }

    /// The header.
    #[must_use]
    #[inline]
    pub fn head(&self) -> ReadOnly<'_, H> {
        ReadOnly::of(self.0.head())
    }

    /// How many cells there are.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.0.capacity()
    }

    /// The cell at `index`, or at what is left of it after so many laps.
    #[must_use]
    #[inline]
    pub fn at(&self, index: usize) -> ReadOnly<'_, C> {
        ReadOnly::of(self.0.at(index))
    }

    /// As [`Table::pair`].
    #[must_use]
    #[inline]
    pub fn pair(&self, index: usize) -> [ReadOnly<'_, C>; 2] {
        self.0.pair(index).each_ref().map(ReadOnly::of)
    }

    /// Cells that lie one behind the other without the index wrapping; none if they do not.
    #[must_use]
    #[inline]
    pub fn slice(&self, cells: Range<usize>) -> ReadOnly<'_, [C]> {
        ReadOnly::of(self.0.slice(cells))
    }
}

impl<H: SharedLayout, C: SharedLayout> Laid<H, C> {
    /// Fails to compile for layouts in which cells would not be aligned behind the header.
    const LAID_OUT: () = assert!(
        align_of::<H>() <= 4096 && align_of::<C>() <= align_of::<H>() && size_of::<H>().is_multiple_of(align_of::<C>())
    );

    fn size(least: usize) -> u64 {
        let () = Self::LAID_OUT;
        let cells = least.max(2).checked_next_power_of_two().map_or(u64::MAX, |cells| cells as u64);
        let bytes = (size_of::<C>() as u64).saturating_mul(cells).saturating_add(size_of::<H>() as u64);
        bytes.div_ceil(4096).saturating_mul(4096)
    }

    /// Over a mapping of `size(least)` bytes: that there is one says that `least` is no more than fits.
    fn over(map: Map, least: usize) -> Self {
        // A child that wrote, or read on, would take part in what is between this process and its peer.
        let map = map.kept_from_children();
        Self { map, mask: least.max(2).next_power_of_two() - 1, layout: PhantomData }
    }

    /// As [`Table::provide`], to be written or only read.
    fn provide(&self, cells: usize, writes: bool) -> Result<(), MemoryError> {
        let bytes = size_of::<H>() + size_of::<C>() * cells.min(self.capacity());
        if !can_provide() {
            return Ok(());
        }
        if bytes > CHECKED_FROM {
            available::check(bytes as u64)?;
        }
        let refused = |source| MemoryError::Refused { call: "madvise", asked: bytes as u64, error: source };
        self.map.provide(0..bytes, writes).map_err(refused)
    }

    #[inline]
    fn head(&self) -> &H {
        // SAFETY: the mapping is page-aligned and `size` ≥ size_of::<H>() long, any bytes are a valid
        // `H` (FromBytes), and it consists of atomics (`SharedLayout`), which is why another process may
        // write it meanwhile (invariant 1 says which one).
        unsafe { self.map.base().cast::<H>().as_ref() }
    }

    #[inline]
    fn capacity(&self) -> usize {
        self.mask + 1
    }

    #[inline]
    fn at(&self, index: usize) -> &C {
        // SAFETY: there are `mask + 1` cells behind the header (`size`), `LAID_OUT` aligns them, and they
        // consist of atomics (`SharedLayout`), which another process may write meanwhile (invariant 1).
        unsafe { self.map.base().add(size_of::<H>()).cast::<C>().add(index & self.mask).as_ref() }
    }

    #[inline]
    fn pair(&self, index: usize) -> &[C; 2] {
        let first = index & self.mask & !1;
        // SAFETY: there are `mask + 1` cells behind the header (`size`), an even number, so that there is a second one behind the
        // first, which is even; `LAID_OUT` aligns them, and they consist of atomics (`SharedLayout`), which another
        // process may write meanwhile (invariant 1).
        unsafe { self.map.base().add(size_of::<H>()).cast::<C>().add(first).cast().as_ref() }
    }

    #[inline]
    fn slice(&self, cells: Range<usize>) -> &[C] {
        // SAFETY: there are so many cells behind the header (`size`), `LAID_OUT` aligns them, and they consist of
        // atomics (`SharedLayout`), which another process may write meanwhile (invariant 1).
        let all =
            unsafe { slice::from_raw_parts(self.map.base().add(size_of::<H>()).cast().as_ptr(), self.capacity()) };
        all.get(cells).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::fd::AsFd,
        sync::atomic::{AtomicU64, Ordering},
    };

    use super::*;

    #[test]
    fn the_reader_sees_what_the_writer_stores() {
        let (written, fd) = Table::<AtomicU64, AtomicU64>::create("fbuf-test", 1000).unwrap();
        let read = TableView::<AtomicU64, AtomicU64>::attach(fd.as_fd(), 1000).unwrap();
        written.head().store(7, Ordering::Release);
        written.at(999).store(8, Ordering::Release);
        assert_eq!(read.head().load(Ordering::Acquire), 7);
        assert_eq!(read.at(999 + 3 * read.capacity()).load(Ordering::Acquire), 8);
    }

    #[test]
    fn cells_come_in_pairs_wherever_one_begins() {
        for least in [0, 1, 2, 3, 1000] {
            let (written, fd) = Table::<AtomicU64, AtomicU64>::create("fbuf-test", least).unwrap();
            let read = TableView::<AtomicU64, AtomicU64>::attach(fd.as_fd(), least).unwrap();
            (0..written.capacity()).for_each(|index| written.at(index).store(index as u64, Ordering::Relaxed));
            for index in [0, 1, written.capacity() - 1, written.capacity(), usize::MAX] {
                let first = (index % written.capacity()) as u64 & !1;
                assert_eq!(written.pair(index).map(|cell| cell.load(Ordering::Relaxed)), [first, first + 1]);
                assert_eq!(read.pair(index).map(|cell| cell.load(Ordering::Relaxed)), [first, first + 1]);
            }
        }
    }

    /// How many pages a file has.
    fn pages(fd: &OwnedFd) -> i64 {
        nix::sys::stat::fstat(fd).unwrap().st_blocks / 8
    }

    #[test]
    fn a_table_grows_by_what_is_provided() {
        let (written, fd) = Table::<AtomicU64, AtomicU64>::create_growing("fbuf-test", 1 << 20).unwrap();
        assert_eq!(pages(&fd), 1);
        type View = TableView<AtomicU64, AtomicU64>;
        let read = View::attach_growing(fd.as_fd(), 1 << 20).unwrap();
        assert!(matches!(View::attach(fd.as_fd(), 1 << 20), Err(Unsuitable::Holes { .. })));
        for (cells, wanted) in [(0, 1), (511, 1), (512, 2), (5000, 10), (1 << 20, 2049)] {
            written.provide(cells).unwrap();
            assert_eq!(pages(&fd), wanted, "{cells} cells");
            read.provide(cells).unwrap();
            assert_eq!(pages(&fd), wanted, "{cells} cells, to be read");
            if let Some(last) = cells.checked_sub(1) {
                written.at(last).store(cells as u64, Ordering::Release);
                assert_eq!(read.at(last).load(Ordering::Acquire), cells as u64);
            }
        }
    }

    /// What the writer has not provided, the reader does.
    #[test]
    fn a_reader_has_exist_what_it_reads() {
        let (_written, fd) = Table::<AtomicU64, AtomicU64>::create_growing("fbuf-test", 1 << 20).unwrap();
        let read = TableView::<AtomicU64, AtomicU64>::attach_growing(fd.as_fd(), 1 << 20).unwrap();
        read.provide(5000).unwrap();
        assert_eq!((pages(&fd), read.at(4999).load(Ordering::Acquire)), (10, 0));
    }

    #[test]
    fn a_table_of_another_size_is_not_mapped() {
        let (_written, fd) = Table::<AtomicU64, AtomicU64>::create("fbuf-test", 10).unwrap();
        let error = TableView::<AtomicU64, AtomicU64>::attach(fd.as_fd(), 1000).unwrap_err();
        assert_eq!(error, Unsuitable::Size { found: 4096, wanted: 12288 });
    }

    #[test]
    fn a_table_of_more_cells_than_can_be_counted_is_not_made() {
        let made = Table::<AtomicU64, AtomicU64>::create("fbuf-test", usize::MAX);
        assert!(matches!(made, Err(MemoryError::NotEnough { .. })));
        let (_written, fd) = Table::<AtomicU64, AtomicU64>::create("fbuf-test", 8).unwrap();
        assert!(TableView::<AtomicU64, AtomicU64>::attach(fd.as_fd(), usize::MAX).is_err());
    }
}
