//! Messages that are copied when they are taken, since their sender could still change them.
//!
//! One of the files of this crate that may be `unsafe`.

use super::{Inbound, Segment};
use crate::{memory::MemoryError, receive::received::Received, socket::link_message::LinkEnd};

impl Inbound {
    /// Has the memory exist to which a message will be copied, if it may be one.
    pub(super) fn provide_copy(&mut self, number: u32, length: u64) -> Result<(), MemoryError> {
        if number >= self.known || !self.fits(length) {
            return Ok(());
        }
        let stride = self.geometry.stride() as usize;
        match self.segments.iter_mut().rfind(|segment| segment.first <= number) {
            Some(Segment { map, copies: Some(copies), first }) => {
                let begin = (number - *first) as usize * stride;
                copies.provide(map, begin..begin + length as usize)
            }
            _ => Ok(()),
        }
    }

    /// Copies a message that was just taken, if messages are copied. One that cannot be is not delivered.
    pub(super) fn copy(&self, taken: &Received, number: u32) -> Result<(), LinkEnd> {
        let copied = match self.segments.iter().rfind(|segment| segment.first <= number) {
            Some(Segment { copies: None, .. }) => true,
            Some(Segment { map, copies: Some(copies), first }) => {
                let begin = (number - first) as usize * self.geometry.stride() as usize;
                // SAFETY: only this process has the copies, of which this slot's has one reader (invariant 2), which has
                // not read yet: it is here. The other map is not written by this process.
                #[expect(unsafe_code, reason = "only here is it known that the message was just taken")]
                unsafe {
                    copies.map().copy_from(map, begin, taken.length())
                }
            }
            None => false,
        };
        debug_assert!(copied, "slot {number} is known, and lies in no segment");
        if copied { Ok(()) } else { Err(LinkEnd::Exhausted("there is no copy of a message".into())) }
    }
}
