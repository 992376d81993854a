//! What the two protocols have in shared memory.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use super::{board::BoardHead, entry::LaneCell, lane::LaneHead};
use crate::memory::SharedLayout;

// SAFETY: a flag, words and a time, each an AtomicU64; padding, which is never read.
unsafe impl SharedLayout for LaneHead {}
// SAFETY: two AtomicU64.
unsafe impl SharedLayout for LaneCell {}
// SAFETY: a flag, a word and a time, each an AtomicU64; padding, which is never read.
unsafe impl SharedLayout for BoardHead {}
