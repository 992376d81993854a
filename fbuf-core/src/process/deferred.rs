//! What is dropped by another thread, because it may take long.
//!
//! The thread that closes the last descriptor of a file waits for as long as that file makes it wait: a TCP socket with
//! SO_LINGER for the time that its owner has set, a Unix socket for all files that wait in its queue, a file of a file
//! system in user space for that program, memory for the kernel, which frees a GiB in a fifth of a second. A peer chooses
//! what it passes. So what a peer has passed, or may have put into a queue, is [`DeferredDrop`]: it is dropped where it is if it
//! [says](Slow::cause) that this takes no time, and else by a thread that is called `fbuf-close`.
//!
//! There is one such thread for each user of which something waits to be dropped, and one for memory, which waits for
//! no process. So descriptors of a user that never close delay the close of descriptors of that user alone, and take one thread.
//! How much may wait is bounded by the caller, which asks ([`is_overrun`]) before it takes more of that user.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::{
    any::Any,
    cell::Cell,
    collections::{BTreeMap, VecDeque},
    fmt,
    mem::{self, ManuallyDrop},
    ops::{Deref, DerefMut},
    sync::Mutex,
    time::{Duration, Instant},
};

use crate::process::fork::{ForkMutex, Rank};
use crate::process::threads;

/// From how many bytes on memory is freed apart: so much takes some milliseconds.
pub(crate) const LARGE: u64 = 32 << 20;

/// How much of one user may wait before no more is to be taken from it,
const MOST_WAITING: usize = 8;
/// if the first has been waited for so long. What honest processes pass takes microseconds.
const PATIENCE: Duration = Duration::from_millis(50);

/// Why a drop may take long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// The kernel frees memory.
    Memory,
    /// A process of this user, if it is known, has passed what is to be closed.
    Peer(Option<u32>),
}

/// A value that may take long to drop.
pub trait Slow: Send + 'static {
    /// Why the drop may take long; nothing, if it takes no time whatever another process does. The drop is next.
    fn cause(&mut self) -> Option<Cause>;
}

/// Something that another thread drops, if the drop [may take long](Slow::cause). If no thread can be started, it is
/// dropped where it is.
pub struct DeferredDrop<T: Slow>(ManuallyDrop<T>);

impl<T: Slow> DeferredDrop<T> {
    /// The same, which is dropped where it is.
    #[must_use]
    pub fn into_inner(self) -> T {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: `this` is not used again, nor dropped.
        unsafe { ManuallyDrop::take(&mut this.0) }
    }
}

impl<T: Slow> From<T> for DeferredDrop<T> {
    fn from(value: T) -> Self {
        Self(ManuallyDrop::new(value))
    }
}

impl<T: Slow> Deref for DeferredDrop<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Slow> DerefMut for DeferredDrop<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: Slow + fmt::Debug> fmt::Debug for DeferredDrop<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: Slow> Drop for DeferredDrop<T> {
    fn drop(&mut self) {
        let cause = self.0.cause();
        // SAFETY: this is its drop, after which it is not used.
        let value = unsafe { ManuallyDrop::take(&mut self.0) };
        if let Some(cause) = cause {
            drop_deferred(cause, value);
        }
    }
}

/// Something that is to be dropped.
type Job = Box<dyn Any + Send>;

/// What is to be dropped for one cause, in order. It is there for as long as a thread drops.
#[derive(Debug)]
struct Line {
    waiting: VecDeque<Job>,
    /// Since when the thread has been at the one that it took out last.
    since: Instant,
}

/// The lines, by their causes.
#[derive(Debug)]
pub(crate) struct Lines(BTreeMap<Cause, Line>);

pub(crate) static LINES: ForkMutex<Lines> =
    ForkMutex::new(Rank::DeferredDrop, Mutex::new(Lines(BTreeMap::new())), |lines| lines.forget());

thread_local! {
    /// Whether this is one of the threads, which drops all that is in what it drops.
    static DROPS: Cell<bool> = const { Cell::new(false) };
}

impl Lines {
    /// In a child that was forked: the threads are the parent's, as what they drop. Neither allocates nor frees.
    fn forget(&mut self) {
        mem::forget(mem::take(&mut self.0));
    }

    /// Puts it into its line. Whether there was none, so that a thread is needed.
    fn add(&mut self, cause: Cause, job: Job) -> bool {
        let mut is_new = false;
        let line = self.0.entry(cause).or_insert_with(|| {
            is_new = true;
            Line { waiting: VecDeque::new(), since: Instant::now() }
        });
        line.waiting.push_back(job);
        is_new
    }

    /// The next of a line. If there is none, the line ends.
    fn next(&mut self, cause: Cause) -> Option<Job> {
        let line = self.0.get_mut(&cause)?;
        let job = line.waiting.pop_front();
        if job.is_some() {
            line.since = Instant::now();
        } else {
            self.0.remove(&cause);
        }
        job
    }

    fn is_full(&self, cause: Cause) -> bool {
        self.0.get(&cause).is_some_and(|line| line.waiting.len() >= MOST_WAITING)
    }

    fn is_overrun(&self, cause: Cause) -> bool {
        self.is_full(cause) && self.0.get(&cause).is_some_and(|line| line.since.elapsed() >= PATIENCE)
    }
}

/// Has another thread drop something. If no thread can be started, it is dropped here. A destructor that panics ends neither
/// that thread nor the call.
pub fn drop_deferred(cause: Cause, value: impl Send + 'static) {
    // Where Miri runs this, descriptors stand for memory on the heap.
    if cfg!(miri) || DROPS.get() {
        threads::contain(|| drop(value));
        return;
    }
    let is_new = LINES.lock().add(cause, Box::new(value));
    if is_new && threads::spawn("fbuf-close", move || drop_line(cause)).is_err() {
        drop_line(cause);
    }
}

/// Drops what is in a line, and what comes meanwhile.
fn drop_line(cause: Cause) {
    let dropped_before = DROPS.replace(true);
    // Not in the condition of a loop, which would hold the lock while it is dropped.
    let next = || LINES.lock().next(cause);
    while let Some(job) = next() {
        // The line is to end, or nothing of this cause would ever be dropped again.
        threads::contain(|| drop(job));
    }
    DROPS.set(dropped_before);
}

/// Whether so much that this user has passed waits to be closed that a caller that can wait takes no more from it.
#[must_use]
pub(crate) fn is_full(user: u32) -> bool {
    LINES.lock().is_full(Cause::Peer(Some(user)))
}

/// Whether so much that this user has passed has waited for so long to be closed that no more is to be taken from it.
#[must_use]
pub fn is_overrun(user: u32) -> bool {
    LINES.lock().is_overrun(Cause::Peer(Some(user)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::mpsc::{Receiver, Sender, channel},
        thread::{self, ThreadId},
    };

    /// Says when it begins to be dropped, and waits until it may be.
    struct Held(Option<Cause>, Sender<ThreadId>, Receiver<()>);

    impl Drop for Held {
        fn drop(&mut self) {
            let _ = self.1.send(thread::current().id());
            let _ = self.2.recv();
        }
    }

    impl Slow for Held {
        fn cause(&mut self) -> Option<Cause> {
            self.0
        }
    }

    fn held(cause: Option<Cause>) -> (DeferredDrop<Held>, Receiver<ThreadId>, Sender<()>) {
        let (say, said) = channel();
        let (go, gone) = channel();
        (Held(cause, say, gone).into(), said, go)
    }

    /// A user that no other test knows.
    const fn user(number: u32) -> Cause {
        Cause::Peer(Some(4_000_000_000 + number))
    }

    #[test]
    fn what_is_slow_holds_up_nothing_of_another_cause() {
        let (first, said, go) = held(Some(user(0)));
        drop(first);
        let one = said.recv().unwrap();
        let (of_the_same, waits, _) = held(Some(user(0)));
        drop(of_the_same);
        for cause in [Cause::Memory, Cause::Peer(None), user(1)] {
            let (other, said, _) = held(Some(cause));
            drop(other);
            let thread = said.recv().unwrap();
            assert!(thread != one && thread != thread::current().id());
        }
        assert!(waits.try_recv().is_err(), "what waits for the first was dropped before");
        drop(go);
        assert_eq!(waits.recv().unwrap(), one);
    }

    #[test]
    fn what_is_quick_or_is_taken_out_is_dropped_where_it_is() {
        let (quick, said, _) = held(None);
        drop(quick);
        assert_eq!(said.recv().unwrap(), thread::current().id());
        let (slow, said, _) = held(Some(user(2)));
        drop(slow.into_inner());
        assert_eq!(said.recv().unwrap(), thread::current().id());
    }

    #[test]
    fn what_is_in_something_slow_is_dropped_with_it() {
        let (inner, said, _) = held(Some(user(3)));
        let (outer, outside, _) = held(Some(user(4)));
        drop_deferred(user(5), (outer, inner));
        assert_eq!(outside.recv().unwrap(), said.recv().unwrap());
    }

    #[test]
    fn a_destructor_that_panics_holds_up_nothing_of_the_same_cause() {
        struct Panics;
        impl Drop for Panics {
            fn drop(&mut self) {
                panic!("a destructor of the program");
            }
        }
        let (first, said, go) = held(Some(user(7)));
        drop(first);
        let one = said.recv().unwrap();
        drop_deferred(user(7), Panics);
        let (next, dropped, _) = held(Some(user(7)));
        drop(next);
        drop(go);
        assert_eq!(dropped.recv_timeout(Duration::from_secs(60)), Ok(one), "it waits for ever");
        while LINES.lock().0.contains_key(&user(7)) {
            thread::yield_now();
        }
        let (last, dropped, _) = held(Some(user(7)));
        drop(last);
        assert!(dropped.recv().is_ok());
    }

    #[test]
    fn a_user_of_whom_much_waits_for_long_is_known() {
        let cause = user(6);
        let Cause::Peer(Some(number)) = cause else { unreachable!() };
        let (first, said, go) = held(Some(cause));
        drop(first);
        said.recv().unwrap();
        let rest: Vec<_> = (0..MOST_WAITING).map(|_| held(Some(cause))).collect();
        let mut dropped = Vec::new();
        for (one, said, _) in rest {
            assert!(!is_overrun(number));
            drop(one);
            dropped.push(said);
        }
        while !is_overrun(number) {
            thread::yield_now();
        }
        assert!(!is_overrun(number + 1000));
        drop(go);
        assert!(dropped.iter().all(|said| said.recv().is_ok()));
        while LINES.lock().0.contains_key(&cause) {
            thread::yield_now();
        }
        assert!(!is_overrun(number));
    }
}
