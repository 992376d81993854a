//! Sleeping without losing a wake-up, and without a fence or a system call per message.
//!
//! Each side of a link has a flag in memory that only it writes. Before it sleeps it raises the flag
//! and looks once more; a side that publishes something looks at the other's flag and rings the bell if
//! it is up. That is Dekker's pattern: store mine, then load yours, on both sides, with a full fence
//! between. The fence is needed only when somebody sleeps, so the sleeper pays for both: membarrier(2)
//! makes every running processor execute one, and the publisher only keeps its compiler from
//! reordering. Where one of the two cannot have that, the flag itself asks for a fence, and the
//! publisher reads it once more behind one: a side that needs none spends no instruction on the question.

mod fence;
mod flag;

#[cfg(not(loom))]
pub(crate) use self::flag::now;
pub use self::{
    fence::Fencing,
    flag::{Flag, LastRing, Signal},
};
