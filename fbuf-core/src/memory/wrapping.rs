//! A table with an index that wraps, so that no index is outside and none has to be compared: for what is
//! looked up several times for each message, by a number that was checked once.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::{marker::PhantomData, ops::Range, ptr::NonNull, slice};

#[cfg(not(loom))]
use zerocopy::FromZeros;

#[cfg(not(loom))]
use crate::memory::{Map, MemoryError};

/// Cells, as many as a power of two.
#[derive(Debug)]
pub struct WrappingTable<T> {
    /// One less than there are cells.
    mask: usize,
    cells: NonNull<T>,
    /// What they lie in, if that is not the heap.
    #[cfg(not(loom))]
    map: Option<Map>,
    owned: PhantomData<T>,
}

// SAFETY: it owns its cells as a `Box<[T]>` does.
unsafe impl<T: Send> Send for WrappingTable<T> {}
// SAFETY: through a shared ring only `&T` is reached.
unsafe impl<T: Sync> Sync for WrappingTable<T> {}

/// From how many bytes on cells of zeroes do not lie on the heap, which may have to clear memory that was used before.
#[cfg(not(loom))]
const MAPPED_FROM: usize = 64 << 10;

impl<T> WrappingTable<T> {
    /// At least so many cells, and at least one.
    ///
    /// # Panics
    /// As `Vec::with_capacity` does: there is no power of two of that many.
    pub fn new(least: usize, cell: impl FnMut() -> T) -> Self {
        let count = least.checked_next_power_of_two().expect("capacity overflow");
        let cells: Box<[T]> = std::iter::repeat_with(cell).take(count).collect();
        let cells = NonNull::from(Box::leak(cells)).cast();
        Self {
            mask: count - 1,
            cells,
            #[cfg(not(loom))]
            map: None,
            owned: PhantomData,
        }
    }

    /// At least so many cells, and at least one, all of zeroes. Many of them take no memory before they are changed.
    ///
    /// # Errors
    /// [`MemoryError`]
    ///
    /// # Panics
    /// As [`Self::new`].
    #[cfg(not(loom))]
    pub fn of_zeroes(least: usize) -> Result<Self, MemoryError>
    where
        T: FromZeros,
    {
        const { assert!(!std::mem::needs_drop::<T>() && align_of::<T>() <= 4096) };
        let count = least.checked_next_power_of_two().expect("capacity overflow");
        let bytes = size_of::<T>().saturating_mul(count);
        if bytes < MAPPED_FROM {
            return Ok(Self::new(least, T::new_zeroed));
        }
        let map = Map::of_zeroes(bytes as u64)?;
        // Zeroes are a `T` (`FromZeros`), and a mapping begins with a page.
        Ok(Self { mask: count - 1, cells: map.base().cast(), map: Some(map), owned: PhantomData })
    }

    fn all(&self) -> &[T] {
        // SAFETY: there are `mask + 1` cells, from `new` or `of_zeroes` on, which are borrowed with this.
        unsafe { slice::from_raw_parts(self.cells.as_ptr(), self.mask + 1) }
    }

    /// The cell at `index`, or at what is left of it after so many laps.
    #[inline]
    pub fn at(&self, index: usize) -> &T {
        // SAFETY: there are `mask + 1` cells, from `new` or `of_zeroes` on, which are borrowed with this.
        unsafe { self.cells.add(index & self.mask).as_ref() }
    }

    /// The cell with this number, if there is one; no laps.
    #[inline]
    pub fn get(&self, number: u64) -> Option<&T> {
        let index = usize::try_from(number).ok()?;
        // One comparison with what `at` has at hand, and not with a length that had to be computed.
        // SAFETY: there are `mask + 1` cells, from `new` or `of_zeroes` on, which are borrowed with this.
        (index <= self.mask).then(|| unsafe { self.cells.add(index).as_ref() })
    }

    /// As [`Self::at`].
    #[inline]
    pub fn at_mut(&mut self, index: usize) -> &mut T {
        // SAFETY: there are `mask + 1` cells, from `new` or `of_zeroes` on, which are borrowed with this for good.
        unsafe { self.cells.add(index & self.mask).as_mut() }
    }

    /// Sets cells that lie one behind the other without the index wrapping.
    pub fn fill(&mut self, cells: Range<usize>, value: T)
    where
        T: Clone,
    {
        // SAFETY: there are `mask + 1` cells, from `new` or `of_zeroes` on, to which this has the only reference.
        let all = unsafe { slice::from_raw_parts_mut(self.cells.as_ptr(), self.mask + 1) };
        if let Some(cells) = all.get_mut(cells) {
            cells.fill(value);
        }
    }

    /// Cells that lie one behind the other without the index wrapping; none if they do not.
    #[inline]
    pub fn slice(&self, cells: Range<usize>) -> &[T] {
        self.all().get(cells).unwrap_or_default()
    }

    /// All cells.
    #[cfg(any(test, loom))]
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.all().iter()
    }
}

impl<T> Drop for WrappingTable<T> {
    fn drop(&mut self) {
        #[cfg(not(loom))]
        if self.map.is_some() {
            // The cells need no drop, and go with it.
            return;
        }
        // SAFETY: what `new` took out of a box of `mask + 1` cells; nothing is reached through it any more.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.cells.as_ptr(), self.mask + 1)) });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_index_is_inside() {
        for least in [0, 1, 2, 3, 64, 1000] {
            let mut next = 0;
            let mut ring = WrappingTable::new(least, || {
                next += 1;
                next - 1
            });
            let cells = ring.iter().count();
            assert!(cells >= least.max(1) && cells.is_power_of_two());
            for index in [0, 1, cells - 1, cells, 7 * cells + 5, usize::MAX] {
                assert_eq!(*ring.at(index), index % cells);
                assert_eq!(*ring.at_mut(index), index % cells);
                assert_eq!(ring.get(index as u64).copied(), (index < cells).then_some(index));
            }
            assert_eq!((ring.slice(0..cells).len(), ring.slice(1..cells + 1).len()), (cells, 0));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "it asks the kernel which pages there are; Miri has no /proc, and no MAP_NORESERVE")]
    fn many_zeroes_take_memory_once_they_are_changed() {
        use std::sync::atomic::{AtomicU64, Ordering};
        let pages = |ring: &WrappingTable<AtomicU64>| {
            let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let begin = format!("{:x}-", ring.cells.as_ptr() as usize);
            let mut lines = text.lines().skip_while(|line| !line.starts_with(&begin)).skip(1);
            let resident = lines.find_map(|line| line.strip_prefix("Rss:")).expect("it is mapped");
            resident.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap() / 4
        };
        for least in [1 << 16, 1 << 20] {
            let ring = WrappingTable::<AtomicU64>::of_zeroes(least).unwrap();
            assert_eq!((pages(&ring), ring.iter().count()), (0, least));
            ring.at(0).store(7, Ordering::Relaxed);
            ring.at(least - 1).store(8, Ordering::Relaxed);
            // Huge pages may be large.
            assert!((1..=1024).contains(&pages(&ring)));
            assert_eq!(ring.get(least as u64 - 1).unwrap().load(Ordering::Relaxed), 8);
        }
        let few = WrappingTable::<AtomicU64>::of_zeroes(3).unwrap();
        assert!(few.map.is_none() && few.iter().all(|cell| cell.load(Ordering::Relaxed) == 0));
    }

    #[test]
    #[should_panic(expected = "capacity overflow")]
    fn more_cells_than_a_number_can_count_are_refused() {
        WrappingTable::new(usize::MAX, || ());
    }
}
