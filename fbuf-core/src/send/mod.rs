//! The sending side: slots that this process may write, and the sender's half of each link.
//!
//! [`pool::Pool::allocate`] makes an [`fbuf::Fbuf`] of a free slot, and [`pool::Pool::send`] lends it over each
//! [`link`]; when receivers have handed it back, [`pool::Pool::collect`] finds it. Where the bytes of slots lie, and what
//! protects them once they are sent, is the matter of `storage`, one file for each mechanism.

pub mod fbuf;
pub mod guard;
pub mod link;
pub mod pool;
pub mod retained;
pub(crate) mod storage;
pub mod unread;
