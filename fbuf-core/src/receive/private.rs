//! A message that its receiver may write for itself.
//!
//! One of the files of this crate that may be `unsafe`: here an address becomes a slice.
#![allow(unsafe_code)]

use std::{
    fmt, io,
    ops::{Deref, DerefMut},
    slice,
};

use super::received::Received;
use crate::{
    memory::{Map, MemoryError},
    peer::Peer,
    protection::Mechanism,
};

impl Received {
    /// The same bytes, to be written by this process: each page that is written is copied first, the others
    /// stay shared, and neither the sender nor other receivers see anything of it. The slot goes back
    /// when the view is dropped.
    ///
    /// # Errors
    /// The message, and why the kernel gives no such view.
    pub fn into_private(self) -> Result<Private, (Self, MemoryError)> {
        let length = self.length();
        let view = match self.kept() {
            _ if length == 0 => Ok(None),
            Some(kept) => kept.make_private(self.bytes(), length),
            // What was copied is this process's own already.
            None if self.mechanism() == Mechanism::Copy => Ok(None),
            None => self.view_in_segment().map(Some),
        };
        match view {
            Ok(None) => Ok(Private { bytes: self.bytes().cast_mut(), map: None, received: self }),
            Ok(Some((map, begin))) => match map.place(begin, length) {
                Some(bytes) => Ok(Private { bytes, map: Some(map), received: self }),
                None => Err((
                    self,
                    MemoryError::Refused {
                        call: "mmap",
                        asked: length as u64,
                        error: io::Error::other("the view is too short"),
                    },
                )),
            },
            Err(error) => Err((self, error)),
        }
    }
}

/// A message that this process may write, without anybody else seeing it: [`Received::into_private`].
///
/// Pages that were not written yet are those of the message, and as [immutable](Self::is_intact) as the message was: those
/// of a volatile one can still be changed by its sender, which is of the same user, or trusted.
pub struct Private {
    bytes: *mut u8,
    /// Dropped before the message is handed back.
    map: Option<Map>,
    received: Received,
}

// SAFETY: it is the only view of this process that is written, and the rest is as for `Received`.
unsafe impl Send for Private {}
// SAFETY: through `&Private` one can only read.
unsafe impl Sync for Private {}

impl Private {
    /// As [`Received::sequence`].
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.received.sequence()
    }

    /// As [`Received::sender`].
    #[must_use]
    pub fn sender(&self) -> Peer {
        self.received.sender()
    }

    /// As [`Received::is_intact`], of the pages that were not written.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.received.is_intact()
    }

    /// Whether unwritten pages are shared with the sender still. Those of a message that was copied when it
    /// came are not.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.map.is_some()
    }
}

impl Deref for Private {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        if self.received.length() == 0 {
            return &[];
        }
        // SAFETY: so many bytes of the view (`into_private`), or of a copy that only this process has (invariant 2);
        // pages that were not written yet are as those of the message, for which its docs speak.
        unsafe { slice::from_raw_parts(self.bytes, self.received.length()) }
    }
}

impl DerefMut for Private {
    fn deref_mut(&mut self) -> &mut [u8] {
        if self.received.length() == 0 {
            return &mut [];
        }
        // SAFETY: so many bytes of the view (`into_private`), or of a copy that only this process has (invariant 2), and
        // this is the only reference to them: no code reads the message through `received` any more.
        unsafe { slice::from_raw_parts_mut(self.bytes, self.received.length()) }
    }
}

impl fmt::Debug for Private {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Private").field("len", &self.len()).field("sequence", &self.sequence()).finish_non_exhaustive()
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        if let Some(kept) = self.received.kept() {
            kept.end_private();
        }
    }
}
