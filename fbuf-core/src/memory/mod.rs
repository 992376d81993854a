//! Shared memory with one writer (invariant 1): a memfd is created and reserved, mapped by the
//! process that writes it, sealed by it, and verified by everybody else before they map it.

#[cfg(not(loom))]
pub(crate) mod available;
#[cfg(miri)]
pub(crate) mod heap;
#[cfg(not(loom))]
pub(crate) mod leasable;
#[cfg(not(loom))]
pub(crate) mod map;
#[cfg(not(loom))]
pub(crate) mod memfd;
#[cfg(not(loom))]
mod pieces;
#[cfg(not(loom))]
mod sealed;
#[cfg(not(loom))]
mod table;
#[cfg(not(loom))]
mod trial;
pub(crate) mod wrapping;

#[cfg(not(loom))]
pub(crate) use self::{
    available::FILE_SIZE,
    map::limit_of_map,
    memfd::{Seals, verify},
    pieces::{Address, Pieces},
    sealed::SealedMemory,
};
#[cfg(not(loom))]
pub use self::{
    available::available,
    leasable::{CannotReopen, HUGE_PAGE, Leasable, Pages, free_huge_pages, has_transparent_pages},
    map::{Map, page_bytes},
    memfd::{MemoryError, Reserved},
    sealed::Sealed,
    table::{SharedLayout, Table, TableView},
    trial::{Trial, try_page},
};
