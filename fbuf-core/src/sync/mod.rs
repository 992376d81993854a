//! The atomics that the lock-free protocols are built on: the standard ones, or loom's in a model
//! (`--cfg loom`), so that what is modelled is the code that runs.

pub mod read_only;

#[cfg(not(loom))]
pub use std::{
    sync::{
        Mutex,
        atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, compiler_fence, fence},
    },
    thread::yield_now,
};

#[cfg(loom)]
pub use loom::{
    sync::{
        Mutex,
        atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence},
    },
    thread::yield_now,
};
