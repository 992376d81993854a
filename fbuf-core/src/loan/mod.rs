//! The shapes of a fbuf: [`Fbuf`], a slot that this process may write; [`Retained`], one that it sent and
//! may read; [`Received`], a message that it may read until it hands it back; and [`Private`], one of those
//! that it may write for itself.

mod fbuf;
mod private;
mod received;
mod retained;

pub use fbuf::{Fbuf, TooLarge};
pub use private::Private;
pub(crate) use received::Kept;
pub use received::Received;
pub use retained::Retained;
