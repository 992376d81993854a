//! What a receiver left unread when it went.

use std::ops::Range;

/// Messages that a receiver was sent and did not read to the end: it never took them, or it held them still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unread {
    /// How many.
    pub messages: u64,
    /// The number of the first of them.
    pub first: u64,
    /// The number of the last of them. If there are fewer messages than numbers from first to last, the receiver has
    /// read some of those between, or some were left out for it.
    pub last: u64,
}

impl Unread {
    /// All messages with these numbers.
    pub(crate) fn all(numbers: Range<u64>) -> Option<Self> {
        let last = numbers.end.checked_sub(1).filter(|last| *last >= numbers.start)?;
        Some(Self { messages: numbers.end - numbers.start, first: numbers.start, last })
    }

    /// Messages with these numbers, each of which comes once.
    pub(crate) fn each(numbers: impl Iterator<Item = u64>) -> Option<Self> {
        numbers.fold(None, |sum, number| Self::add(sum, Self::all(number..number + 1)))
    }

    /// Both, of which no message is in the other.
    pub(crate) fn add(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        let (Some(one), Some(other)) = (one, other) else { return one.or(other) };
        Some(Self {
            messages: one.messages + other.messages,
            first: one.first.min(other.first),
            last: one.last.max(other.last),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unread_is_counted_once_and_lies_between_the_first_and_the_last() {
        assert_eq!(Unread::all(5..5), None);
        assert_eq!(Unread::each([].into_iter()), None);
        let range = Unread::all(10..13);
        assert_eq!(range, Some(Unread { messages: 3, first: 10, last: 12 }));
        let sum = Unread::add(range, Unread::each([7, 2, 20].into_iter()));
        assert_eq!(sum, Some(Unread { messages: 6, first: 2, last: 20 }));
        assert_eq!((Unread::add(None, range), Unread::add(range, None)), (range, range));
    }
}
