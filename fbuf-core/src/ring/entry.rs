//! What stands in a lane: entries of two words. A message is one entry, with an entry before it for each thing that only some
//! messages have.
//!
//! ```text
//!            63             24 23  20 19      0     63 62   61      31 30      0
//!  message  | lap mark        | 0    | slot    |   | 0|more| offset   | length  |
//!  prefix   | lap mark        | kind | 0       |   | its word, which is not zero |
//! ```

#[cfg(not(loom))]
use zerocopy::FromBytes;

use crate::{
    slot::SlotId,
    sync::{AtomicU64, read_only::ReadOnly},
    violation::Violation,
};

/// One entry of the ring.
#[cfg_attr(not(loom), derive(FromBytes))]
#[repr(C)]
#[derive(Debug)]
pub struct Entry {
    /// `position << 24 | kind << 20 | slot`, stored last.
    pub(super) head: AtomicU64,
    /// The [`Body`] of a message, or the word of a prefix.
    pub(super) body: AtomicU64,
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Entry>() == 16 && align_of::<Entry>() == 8);
    assert!(std::mem::offset_of!(Entry, head) == 0 && std::mem::offset_of!(Entry, body) == 8);
};

#[cfg(all(any(test, fuzzing), not(loom)))]
impl Entry {
    /// Writes any words, as a hostile peer would.
    pub fn scribble(&self, head: u64, body: u64) {
        use crate::sync::Ordering;
        self.head.store(head, Ordering::Relaxed);
        self.body.store(body, Ordering::Relaxed);
    }
}

impl<'a> ReadOnly<'a, Entry> {
    #[inline]
    pub(super) fn head(self) -> ReadOnly<'a, AtomicU64> {
        self.part(|entry| &entry.head)
    }

    #[inline]
    pub(super) fn body(self) -> ReadOnly<'a, AtomicU64> {
        self.part(|entry| &entry.body)
    }
}

/// How many bits of a head word name a slot, and how many say what kind of entry it is.
const SLOT_BITS: u32 = 20;
const KIND_BITS: u32 = 4;
const _: () = assert!(crate::limits::MAX_SLOTS <= 1 << SLOT_BITS);
/// How many bits of a body are the length of a message, and how many its offset.
const LENGTH_BITS: u32 = 31;
const _: () = assert!(crate::limits::MAX_SLOT_BYTES < 1 << LENGTH_BITS);
const MORE: u64 = 1 << (2 * LENGTH_BITS);

/// The kind of an entry that is a message.
pub(super) const MESSAGE: u64 = 0;

/// The head word of an entry of some kind at a position, but for the slot. Its mark, the lower 40 bits of
/// the position, does not come again for 2⁴⁰ entries.
#[inline]
pub(super) fn head_of(position: u64, kind: u64) -> u64 {
    (position << KIND_BITS | kind) << SLOT_BITS
}

/// The mark in a head word.
#[inline]
pub(super) fn mark(head: u64) -> u64 {
    head >> (SLOT_BITS + KIND_BITS)
}

/// The kind in a head word.
pub(super) fn kind(head: u64) -> u64 {
    head >> SLOT_BITS & ((1 << KIND_BITS) - 1)
}

/// The slot in a head word.
pub(super) fn slot(head: u64) -> u32 {
    (head & ((1 << SLOT_BITS) - 1)) as u32
}

/// Where the bytes of a message are in its slot, and whether it ends with them: still to be checked against the size of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Body(u64);

impl Body {
    /// So many bytes from this offset on, which lie in a slot.
    #[must_use]
    #[inline]
    pub const fn new(offset: u32, length: u32) -> Self {
        Self((offset as u64) << LENGTH_BITS | length as u64)
    }

    /// The same, of a message that goes on in the next entry.
    #[must_use]
    pub const fn with_more(self) -> Self {
        Self(self.0 | MORE)
    }

    pub(crate) const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// As it stands in an entry. Less than the size of a slot, plus one, only if all of it is a length that fits.
    #[must_use]
    #[inline]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// How many bytes.
    #[must_use]
    pub const fn length(self) -> u32 {
        (self.0 & ((1 << LENGTH_BITS) - 1)) as u32
    }

    /// How many bytes of the slot come before them.
    #[must_use]
    pub const fn offset(self) -> u32 {
        (self.0 >> LENGTH_BITS & ((1 << LENGTH_BITS) - 1)) as u32
    }

    /// Whether the message goes on in the next entry.
    #[must_use]
    pub const fn has_more(self) -> bool {
        self.0 & MORE != 0
    }

    /// Whether it is a whole message inside of a slot of so many bytes.
    #[must_use]
    pub const fn fits(self, slot_bytes: u32) -> bool {
        self.0 < MORE && self.offset() as u64 + self.length() as u64 <= slot_bytes as u64
    }
}

impl From<u32> for Body {
    fn from(length: u32) -> Self {
        Self::new(0, length)
    }
}

/// What an entry before a message can say. Those of one message stand in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u64)]
pub enum Prefix {
    /// So many messages were left out for this receiver before this one.
    Gap = 1,
    /// The message has this tag, which its sender's program has set.
    Tag = 2,
    /// The message was sent at this time, in nanoseconds of CLOCK_MONOTONIC.
    Time = 3,
    /// The slot is one that its sender has received: which segment, and which slot of it.
    Origin = 4,
}

impl Prefix {
    const ALL: [Self; 4] = [Self::Gap, Self::Tag, Self::Time, Self::Origin];

    /// Of the kind in a head word.
    pub(super) fn of_kind(kind: u64) -> Result<Self, Violation> {
        Self::ALL.into_iter().find(|prefix| *prefix as u64 == kind).ok_or(Violation::Kind { kind: kind as u8 })
    }

    /// What it is, in words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gap => "a gap",
            Self::Tag => "a tag",
            Self::Time => "a time of sending",
            Self::Origin => "an origin",
        }
    }

    const fn index(self) -> usize {
        self as usize - 1
    }
}

/// Which prefixes messages of a link may have: its lane has room for each of them before each message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrefixSet(u8);

impl PrefixSet {
    /// None.
    pub const NONE: Self = Self(0);
    /// Those that this version can use over a link.
    pub const KNOWN: Self = Self::NONE.with(Prefix::Gap).with(Prefix::Tag).with(Prefix::Time);

    /// These and one more.
    #[must_use]
    pub const fn with(self, prefix: Prefix) -> Self {
        Self(self.0 | 1 << prefix.index())
    }

    /// These, and one more if so.
    #[must_use]
    pub const fn with_if(self, prefix: Prefix, is_used: bool) -> Self {
        if is_used { self.with(prefix) } else { self }
    }

    /// Whether this one is among them.
    #[must_use]
    pub const fn has(self, prefix: Prefix) -> bool {
        self.0 >> prefix.index() & 1 != 0
    }

    /// The first that is not among these.
    #[must_use]
    pub fn first_outside(self, others: Self) -> Option<Prefix> {
        Prefix::ALL.into_iter().find(|prefix| self.has(*prefix) && !others.has(*prefix))
    }

    /// As a greeting has them.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// Those of a greeting: none if they are more than [`Self::KNOWN`].
    #[must_use]
    pub fn from_bits(bits: u8) -> Option<Self> {
        Some(Self(bits)).filter(|set| set.first_outside(Self::KNOWN).is_none() && bits <= Self::KNOWN.0)
    }

    /// How many they are.
    #[must_use]
    pub const fn count(self) -> usize {
        self.0.count_ones() as usize
    }
}

/// What one message has before it: the word of each prefix, zero if it has none of that kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prefixes([u64; Prefix::ALL.len()]);

impl Prefixes {
    /// These and one more, unless its word is zero.
    #[must_use]
    pub const fn with(mut self, prefix: Prefix, word: u64) -> Self {
        self.0[prefix.index()] = word;
        self
    }

    /// The word of one, zero if there is none of that kind.
    #[must_use]
    #[inline]
    pub const fn word(&self, prefix: Prefix) -> u64 {
        self.0[prefix.index()]
    }

    /// Those that there are, in their order.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = (Prefix, u64)> {
        Prefix::ALL.into_iter().map(|prefix| (prefix, self.word(prefix))).filter(|(_, word)| *word != 0)
    }

    /// Which there are.
    #[must_use]
    pub fn set(&self) -> PrefixSet {
        self.iter().fold(PrefixSet::NONE, |set, (prefix, _)| set.with(prefix))
    }
}

/// A message as it stands in a lane, with what is before it: still to be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// What stands before it.
    pub prefixes: Prefixes,
    /// The number of its slot.
    pub slot: u32,
    /// Where its bytes are there.
    pub body: Body,
}

impl Note {
    /// A message that has nothing before it.
    #[must_use]
    pub fn plain(slot: SlotId, body: Body) -> Self {
        Self { prefixes: Prefixes::default(), slot: slot.number(), body }
    }

    /// How many entries it takes.
    #[must_use]
    pub fn entries(&self) -> u64 {
        1 + self.prefixes.set().count() as u64
    }
}

/// How many entries the lane has that joins a sender with `slots` slots to a receiver, if messages may have these prefixes.
///
/// A slot that is lent has at most one message in the lane, and a message at most one prefix of each kind before it.
/// A power of two, so that a position is masked, not divided.
#[must_use]
pub const fn capacity_for(slots: u32, prefixes: PrefixSet) -> usize {
    (slots as usize * (1 + prefixes.count())).next_power_of_two()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::limits::{MAX_SLOT_BYTES, MAX_SLOTS};

    #[test]
    fn a_body_keeps_what_it_is_made_of_and_fits_only_inside_of_a_slot() {
        for (offset, length) in [(0, 0), (0, MAX_SLOT_BYTES), (MAX_SLOT_BYTES, 0), (7, 9)] {
            let body = Body::new(offset, length);
            assert_eq!((body.offset(), body.length(), body.has_more()), (offset, length, false));
            let more = body.with_more();
            assert_eq!((more.offset(), more.length(), more.has_more()), (offset, length, true));
            assert!(body.fits(offset + length) && !more.fits(MAX_SLOT_BYTES));
            assert!(offset + length == 0 || !body.fits(offset + length - 1));
            assert!(!Body::from_word(body.word() | 1 << 63).fits(MAX_SLOT_BYTES), "a bit that means nothing");
            // As a reader compares it that looks for messages at the beginning of a slot.
            assert_eq!(body.word() <= MAX_SLOT_BYTES.into(), offset == 0);
        }
    }

    #[test]
    fn capacity_holds_a_message_for_each_slot_and_all_its_prefixes() {
        let three = PrefixSet::KNOWN;
        assert_eq!((three.count(), PrefixSet::NONE.count()), (3, 0));
        for slots in [1, 2, 3, 64, 1000, MAX_SLOTS] {
            for prefixes in [PrefixSet::NONE, PrefixSet::NONE.with(Prefix::Tag), three] {
                let capacity = capacity_for(slots, prefixes);
                assert!(capacity >= (1 + prefixes.count()) * slots as usize && capacity.is_power_of_two());
            }
        }
    }

    #[test]
    fn prefixes_are_known_by_their_kind() {
        let some = Prefixes::default().with(Prefix::Time, 5).with(Prefix::Gap, 3).with(Prefix::Tag, 0);
        assert_eq!(some.iter().collect::<Vec<_>>(), [(Prefix::Gap, 3), (Prefix::Time, 5)]);
        assert!(some.set().has(Prefix::Gap) && !some.set().has(Prefix::Tag) && some.set().count() == 2);
        assert_eq!(some.set().first_outside(PrefixSet::NONE.with(Prefix::Gap)), Some(Prefix::Time));
        assert_eq!(PrefixSet::from_bits(some.set().bits()), Some(some.set()));
        let unknown = PrefixSet::NONE.with(Prefix::Origin).bits();
        assert_eq!([unknown, 16, 255].map(PrefixSet::from_bits), [None; 3]);
        assert_eq!(Prefix::of_kind(4), Ok(Prefix::Origin));
        assert_eq!([0, 5, 15].map(Prefix::of_kind), [0, 5, 15].map(|kind| Err(Violation::Kind { kind: kind as u8 })));
    }
}
