//! The fences of "store mine, then load yours".

use std::sync::OnceLock;

use crate::sync::{Ordering, fence};
#[cfg(not(loom))]
use crate::{
    process::{
        fork::{AtFork, Rank},
        sys::{Membarrier, membarrier},
    },
    sync::compiler_fence,
};

/// How this process orders "store, then load" against its peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fencing {
    /// The side that sleeps runs membarrier; the side that publishes runs no instruction.
    Asymmetric,
    /// Both sides run a full fence each time.
    Full,
}

impl Fencing {
    /// What this process can do. Found out, and registered with the kernel, at the first call.
    ///
    /// `FBUF_FENCE=full` in the environment forgoes membarrier, for measuring what it saves.
    pub fn of_this_process() -> Self {
        if let Some(&found) = FOUND.get() {
            return found;
        }
        #[cfg(not(loom))]
        AT_FORK.register();
        find_out()
    }

    /// Between publishing something and looking whether the other side sleeps, in a process that can do
    /// this much.
    #[inline]
    pub(crate) fn after_publishing(self) {
        match self {
            // Partner: the membarrier in `before_sleeping`, which runs a fence here for us. Loom
            // knows no membarrier; a fence on this side is what one on the other amounts to.
            #[cfg(not(loom))]
            Self::Asymmetric => compiler_fence(Ordering::SeqCst),
            #[cfg(loom)]
            Self::Asymmetric => fence(Ordering::SeqCst),
            // Partner: the fence in `before_sleeping`.
            Self::Full => fence(Ordering::SeqCst),
        }
    }

    /// Between raising the own flag and looking once more. False if the kernel, or a filter that was
    /// installed meanwhile, refused: then a wake-up may be lost, and sleep has to be short.
    #[must_use]
    pub fn before_sleeping(self) -> bool {
        // Partner: `after_publishing`. The fence serves peers that fence in full, and this
        // processor; membarrier serves the others.
        fence(Ordering::SeqCst);
        #[cfg(not(loom))]
        if self == Self::Asymmetric {
            return membarrier(Membarrier::Everywhere).is_ok();
        }
        true
    }
}

static FOUND: OnceLock<Fencing> = OnceLock::new();

fn find_out() -> Fencing {
    *FOUND.get_or_init(|| {
        let forgone = std::env::var_os("FBUF_FENCE").is_some_and(|value| value == "full");
        if !forgone && register() { Fencing::Asymmetric } else { Fencing::Full }
    })
}

/// It must not be half done when the process forks. Whether the parent's registration counts for a child is not documented.
#[cfg(not(loom))]
static AT_FORK: AtFork<Fencing> = AtFork::new(Rank::Fences, find_out, |fencing| {
    if *fencing == Fencing::Asymmetric {
        let _ = register_again();
    }
});

#[cfg(not(loom))]
fn register_again() -> std::io::Result<()> {
    membarrier(Membarrier::Register)
}

#[cfg(not(any(loom, miri)))]
fn register() -> bool {
    membarrier(Membarrier::Register).and_then(|()| membarrier(Membarrier::Everywhere)).is_ok()
}

#[cfg(loom)]
fn register() -> bool {
    true
}

/// Miri has no membarrier.
#[cfg(miri)]
fn register() -> bool {
    false
}
