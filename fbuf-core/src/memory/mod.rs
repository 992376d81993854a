//! Shared memory with one writer (invariant 1): a memfd is created and reserved, mapped by the
//! process that writes it, sealed by it, and verified by everybody else before they map it.

pub(crate) mod claim;
mod copies;
#[cfg(miri)]
pub(crate) mod heap;
mod leasable;
mod map;
mod memfd;
mod pieces;
mod room;
mod sealed;
mod table;
mod trial;

pub(crate) use claim::Claim;
pub(crate) use copies::Copies;
pub use leasable::{HUGE_PAGE, Leasable, Pages, free_huge_pages, has_transparent_pages};
pub use map::Map;
pub use memfd::{MemoryError, Reserved};
pub(crate) use memfd::{Seals, verify};
pub(crate) use pieces::{Address, Pieces};
pub use room::available;
pub use sealed::Sealed;
pub(crate) use sealed::SealedMemory;
pub use table::{SharedLayout, Table, TableView};
pub use trial::{Trial, try_page};
