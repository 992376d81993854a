//! A message that was sent and kept.
//!
//! One of the files of this crate that may be `unsafe`: here an address becomes a slice.
#![allow(unsafe_code)]

use std::{
    fmt,
    ops::{Deref, Range},
    ptr::NonNull,
    slice,
};

use super::fbuf::{Fbuf, Outgoing, put_back};
use crate::{
    memory::Sealed,
    ring::entry::Body,
    send::{
        pool::{Pool, UnsentFbufs},
        storage::{Unkept, leased::View},
    },
    slot::{Mark, SlotId},
};

/// A message that was sent, and that its sender may still read: [`Deref`] to its bytes. Its slot is not used
/// again before this is dropped, from any thread, or becomes a [`Fbuf`] once more.
///
/// As of an [`Fbuf`], no process writes its bytes, but that a slot which is leased can be opened for writing by its owner's user:
/// this one, or that of a receiver that made the slot and is [trusted](crate::trust::Trusted). A one-shot
/// cannot be written at all.
pub struct Retained {
    kind: Kind,
    tag: u64,
    /// Where the user header is in the slot.
    header: Range<usize>,
}

enum Kind {
    /// It lies in a slot, which begins there.
    Slot { bytes: *const u8, body: Body, slot: SlotId, message: Mark, home: NonNull<UnsentFbufs>, view: Option<View> },
    /// It was given away.
    Sealed(Sealed),
}

// SAFETY: no process writes the bytes of a slot that is retained (invariant 2), and `UnsentFbufs` is Sync.
unsafe impl Send for Retained {}
// SAFETY: through `&Retained` one can only read, and no process writes meanwhile (invariant 2).
unsafe impl Sync for Retained {}

impl Pool {
    /// Keeps a slot that is about to be sent for its sender to read on. To be [given up](Self::give_up) if it is not sent.
    pub(crate) fn retain(&mut self, outgoing: &Outgoing, sequence: u64) -> Result<Retained, Unkept> {
        let &Outgoing { slot, body, tag, .. } = outgoing;
        let (bytes, view) = self.view(slot)?;
        self.keep(slot);
        let kind = Kind::Slot { bytes, body, slot, message: Mark::of(sequence), home: self.home(), view };
        Ok(Retained { kind, tag, header: self.geometry().header() })
    }

    /// Keeps a message that was sealed for good.
    pub(crate) fn retain_sealed(&self, sealed: Sealed, tag: u64) -> Retained {
        Retained { kind: Kind::Sealed(sealed), tag, header: self.geometry().header() }
    }

    /// Forgets that a slot was retained, if it was: it was not sent.
    pub(crate) fn give_up(&mut self, retained: Option<Retained>) {
        if let Some(retained) = retained
            && let Some((slot, ..)) = self.own_slot(&retained)
        {
            self.let_go(slot);
            retained.forget();
        }
    }

    /// The same slot, to be written again, if every receiver has handed it back.
    ///
    /// # Errors
    /// What was given, if not.
    pub fn rewrite(&mut self, retained: Retained) -> Result<Fbuf, Retained> {
        let Some((slot, message, body)) = self.own_slot(&retained) else { return Err(retained) };
        match self.reclaim(slot, message) {
            Some(bytes) => {
                let tag = retained.tag;
                retained.forget();
                Ok(self.fbuf(Outgoing { slot, bytes, body, tag }))
            }
            None => Err(retained),
        }
    }

    fn own_slot(&self, retained: &Retained) -> Option<(SlotId, Mark, Body)> {
        match &retained.kind {
            Kind::Slot { body, slot, message, home, view, .. }
                if *home == self.home() && self.is_seen(*slot, view.as_ref()) =>
            {
                Some((*slot, *message, *body))
            }
            _ => None,
        }
    }
}

impl Retained {
    /// The [tag](Fbuf::set_tag) it was sent with; zero if there was none.
    #[must_use]
    pub fn tag(&self) -> u64 {
        self.tag
    }

    /// The [user header](Fbuf::header_mut) it was sent with.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        match &self.kind {
            // SAFETY: a header lies in the same memory as its slot, and so what is said of the bytes (`deref`) holds for it.
            Kind::Slot { bytes, .. } => unsafe {
                slice::from_raw_parts(bytes.add(self.header.start), self.header.len())
            },
            Kind::Sealed(sealed) => sealed.behind(self.header.clone()),
        }
    }

    /// Ends it without putting the slot back.
    fn forget(mut self) {
        if let Kind::Slot { view, .. } = &mut self.kind {
            drop(view.take());
        }
        std::mem::forget(self);
    }
}

impl From<Sealed> for Retained {
    fn from(sealed: Sealed) -> Self {
        Self { kind: Kind::Sealed(sealed), tag: 0, header: 0..0 }
    }
}

impl Deref for Retained {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.kind {
            // SAFETY: they were filled, no process writes them before the slot is used again (as for `Fbuf`), and it is not
            // while this lives (`Pool::retained`, invariant 2), nor do its mappings go (`Drop for Pool`, or `view`).
            Kind::Slot { bytes, body, .. } => unsafe {
                slice::from_raw_parts(bytes.add(body.offset() as usize), body.length() as usize)
            },
            Kind::Sealed(sealed) => sealed,
        }
    }
}

impl AsRef<[u8]> for Retained {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Retained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Retained").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Drop for Retained {
    fn drop(&mut self) {
        if let Kind::Slot { slot, home, .. } = self.kind {
            put_back(home, slot);
        }
    }
}
