//! Messages that are copied when they are taken, since their sender could still change them.
//!
//! One of the files of this crate that may be `unsafe`.

use std::ops::Range;

use super::{Inbound, Segment};
use crate::{memory::MemoryError, ring::entry::Body, socket::link_message::LinkEnd};

impl Inbound {
    /// Has the memory exist to which a message will be copied, if it may be one.
    pub(super) fn provide_copy(&mut self, number: u32, body: Body) -> Result<(), MemoryError> {
        if number >= self.known || !self.fits(body) {
            return Ok(());
        }
        let (stride, header) = (self.geometry.stride() as usize, self.geometry.header());
        match self.segments.iter_mut().rfind(|segment| segment.first <= number) {
            Some(Segment { map, copies: Some(copies), first }) => {
                let begin = (number - *first) as usize * stride;
                [bytes(body), header]
                    .into_iter()
                    .filter(|bytes| !bytes.is_empty())
                    .try_for_each(|bytes| copies.provide(map, begin + bytes.start..begin + bytes.end))
            }
            _ => Ok(()),
        }
    }

    /// Copies a message that was just taken, and its user header, if messages are copied. One that cannot be is not delivered.
    pub(super) fn copy(&self, number: u32, body: Body) -> Result<(), LinkEnd> {
        let copied = match self.segments.iter().rfind(|segment| segment.first <= number) {
            Some(Segment { copies: None, .. }) => true,
            Some(Segment { map, copies: Some(copies), first }) => {
                let begin = (number - first) as usize * self.geometry.stride() as usize;
                let copy = |bytes: Range<usize>| {
                    // SAFETY: only this process has the copies, of which this slot's has one reader (invariant 2), which has
                    // not read yet: it is here. The other map is not written by this process.
                    #[expect(unsafe_code, reason = "only here is it known that the message was just taken")]
                    unsafe {
                        copies.map().copy_from(map, begin + bytes.start, bytes.len())
                    }
                };
                copy(bytes(body)) && copy(self.geometry.header())
            }
            None => false,
        };
        debug_assert!(copied, "slot {number} is known, and lies in no segment");
        if copied { Ok(()) } else { Err(LinkEnd::Exhausted("there is no copy of a message".into())) }
    }
}

/// Where a message is in its slot, from a word on: maps are copied by words.
fn bytes(body: Body) -> Range<usize> {
    let offset = body.offset() as usize;
    offset / 8 * 8..offset + body.length() as usize
}
