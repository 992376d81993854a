//! Points in the code that have a name, at which tests kill or stop their own process, as `FBUF_DIE_AT` in
//! its environment says. Without the feature `points` there are none, and no code for them.

/// The code gets to the point of this name.
#[cfg(any(loom, not(feature = "points")))]
#[inline(always)]
pub const fn reach(_: &str) {}

#[cfg(all(not(loom), feature = "points"))]
pub use with_points::{BROKER, ENDPOINTS, reach};

#[cfg(all(not(loom), feature = "points"))]
mod with_points {
    use std::{
        env,
        sync::{
            OnceLock,
            atomic::{AtomicI64, Ordering},
        },
    };

    use nix::sys::signal::{SigSet, Signal, raise};

    /// Those of endpoints, each in the part of the work to which it belongs.
    pub const ENDPOINTS: [&str; 45] = [
        "attach: connected",
        "attach: asked",
        "attach: opened",
        "attach: introduced",
        "attach: board made",
        "attach: greeted",
        "attach: lane made",
        "attach: answered",
        "attach: linked",
        "growth: made",
        "growth: announced",
        "growth: mapped",
        "growth: used",
        "write: taken",
        "write: half an entry",
        "write: published",
        "write: bell",
        "get: marked",
        "get: held",
        "get: copied",
        "return: begun",
        "return: handed back",
        "return: cleared",
        "return: bell",
        "seal: guarded",
        "seal: released",
        "seal: unmapped",
        "seal: sealed",
        "seal: sent",
        "lease: vacated",
        "lease: taken",
        "lease: released",
        "lease: opened again",
        "break: found",
        "break: copied",
        "break: let go",
        "break: put back",
        "grant: opened",
        "grant: sent",
        "right: accepted",
        "right: used",
        "park: raised",
        "park: about to sleep",
        "park: awake",
        "end: closed",
    ];

    /// Those of a broker, while a client attaches.
    pub const BROKER: [&str; 7] = [
        "broker: accepted",
        "broker: joined",
        "broker: greeted",
        "broker: opened",
        "broker: slots made",
        "broker: introduced to one",
        "broker: introduced to both",
    ];

    /// Where to end, how often to get there before, and by which signal.
    struct End {
        name: String,
        left: AtomicI64,
        signal: Signal,
    }

    /// The code gets to the point of this name.
    pub fn reach(name: &str) {
        static END: OnceLock<Option<End>> = OnceLock::new();
        let Some(end) = END.get_or_init(read) else { return };
        // Relaxed: threads may get there at once, and one of them is the one.
        if end.name == name && end.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            // Threads of the library block all signals.
            let _ = SigSet::from(end.signal).thread_unblock();
            // It does not return from SIGKILL.
            let _ = raise(end.signal);
        }
    }

    /// `count signal name`, as in `3 SIGKILL write: published`.
    fn read() -> Option<End> {
        let text = env::var("FBUF_DIE_AT").ok()?;
        let mut words = text.splitn(3, ' ');
        let left = AtomicI64::new(words.next()?.parse().ok()?);
        let signal = words.next()?.parse().ok()?;
        Some(End { name: words.next()?.to_owned(), left, signal })
    }
}
