//! A table whose index wraps, so that no index is outside and none has to be compared: for what is
//! looked up several times for each message, by a number that was checked once.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::ops::Range;

/// Cells, as many as a power of two.
#[derive(Debug)]
pub struct Ring<T> {
    cells: Box<[T]>,
    /// One less than there are cells.
    mask: usize,
}

impl<T> Ring<T> {
    /// At least so many cells, and at least one.
    ///
    /// # Panics
    /// As `Vec::with_capacity` does: there is no power of two of that many.
    pub fn new(least: usize, cell: impl FnMut() -> T) -> Self {
        let count = least.checked_next_power_of_two().expect("capacity overflow");
        Self { cells: std::iter::repeat_with(cell).take(count).collect(), mask: count - 1 }
    }

    /// The cell at `index`, or at what is left of it after so many laps.
    #[inline]
    pub fn at(&self, index: usize) -> &T {
        // SAFETY: there are `mask + 1` cells, from `new` on.
        unsafe { self.cells.get_unchecked(index & self.mask) }
    }

    /// The cell with this number, if there is one; no laps.
    #[inline]
    pub fn get(&self, number: u64) -> Option<&T> {
        self.cells.get(usize::try_from(number).ok()?)
    }

    /// As [`Self::at`].
    #[inline]
    pub fn at_mut(&mut self, index: usize) -> &mut T {
        // SAFETY: there are `mask + 1` cells, from `new` on.
        unsafe { self.cells.get_unchecked_mut(index & self.mask) }
    }

    /// Sets cells that lie one behind the other without the index wrapping.
    pub fn fill(&mut self, cells: Range<usize>, value: T)
    where
        T: Clone,
    {
        if let Some(cells) = self.cells.get_mut(cells) {
            cells.fill(value);
        }
    }

    /// Cells that lie one behind the other without the index wrapping; none if they do not.
    #[inline]
    pub fn slice(&self, cells: Range<usize>) -> &[T] {
        self.cells.get(cells).unwrap_or_default()
    }

    /// All cells.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.cells.iter()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_index_is_inside() {
        for least in [0, 1, 2, 3, 64, 1000] {
            let mut next = 0;
            let mut ring = Ring::new(least, || {
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
    #[should_panic(expected = "capacity overflow")]
    fn more_cells_than_a_number_can_count_are_refused() {
        Ring::new(usize::MAX, || ());
    }
}
