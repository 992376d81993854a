//! Users that are given up: so many threads wait at their sockets that calls at the other end take long.
//!
//! A process can wait for its end of a connection as often as it likes: by epoll(7) over duplicates of it, or by signals to many
//! processes (F_SETOWN in fcntl(2)). The kernel wakes all of them, one after the other, in the thread that sends a message over
//! the other end, takes one off, hangs up or closes: 60 ns for each of them, 0.2 s for a few million. That cannot be known before. So
//! each such call to a peer of another user is measured by the processor time of its thread, and a user that is found out is
//! given up for a while: no thread but the one [for that user](crate::process::deferred) touches its sockets, and no more are taken
//! from it.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};

use crate::{
    process::fork::{AtFork, Rank},
    wait::now,
};

/// A call that takes more of a processor than this is slow, if another one was not long ago,
const SLOW: Duration = Duration::from_millis(1);
/// as long as this: where a machine is virtual, its host may take a processor away in any call.
const NOT_LONG: Duration = Duration::from_secs(10);
/// One call of so much is enough.
const VERY_SLOW: Duration = Duration::from_millis(20);
/// For how long a user is given up at first, and twice as long each time it is found out again,
const PAUSE: Duration = Duration::from_secs(1);
/// but no longer than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(256);

/// What is known of one user. Times are those of [`now`], in nanoseconds.
#[derive(Debug, Default)]
struct Found {
    /// When a call was slow last.
    slow_at: Option<u64>,
    /// Until when it is given up,
    until: u64,
    /// which is for so long.
    pause: Duration,
}

impl Found {
    /// Notes a call that took so much.
    fn note(&mut self, took: Duration, now: u64) {
        let since = |then: u64| Duration::from_nanos(now.saturating_sub(then));
        let is_second = self.slow_at.is_some_and(|then| since(then) < NOT_LONG);
        self.slow_at = Some(now);
        if now < self.until || !(is_second || took >= VERY_SLOW) {
            return;
        }
        let is_again = self.until > 0 && since(self.until) < LONGEST_PAUSE;
        self.pause = if is_again { (2 * self.pause).min(LONGEST_PAUSE) } else { PAUSE };
        self.until = now.saturating_add(self.pause.as_nanos() as u64);
    }
}

/// By user.
type Users = BTreeMap<u32, Found>;

static USERS: Mutex<Users> = Mutex::new(BTreeMap::new());
/// Whether there is any.
static ANY: AtomicBool = AtomicBool::new(false);

/// Holds the lock on them.
type Locked = MutexGuard<'static, Users>;

static AT_FORK: AtFork<Locked> = AtFork::new(Rank::Waiters, locked, |_| {});

/// Takes it.
fn lock() -> Locked {
    AT_FORK.register();
    locked()
}

fn locked() -> Locked {
    // What is done under the lock does not panic.
    USERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does what may wake all that wait at the other end, where a process of this user is, if it is another one.
pub fn measured<T>(user: Option<u32>, call: impl FnOnce() -> T) -> T {
    let Some(user) = user else { return call() };
    let time = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
    let begin = time();
    let result = call();
    if let (Ok(begin), Ok(end)) = (begin, time())
        && let took = end.saturating_sub(begin)
        && took > SLOW
        && let Some(now) = now()
    {
        lock().entry(user).or_default().note(took, now);
        // Relaxed: what is told besides is behind the lock.
        ANY.store(true, Ordering::Relaxed);
    }
    result
}

/// Whether this user is given up just now.
#[must_use]
pub fn is_given_up(user: u32) -> bool {
    // Relaxed: as above.
    ANY.load(Ordering::Relaxed) && lock().get(&user).is_some_and(|found| now().is_some_and(|now| now < found.until))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_user_is_given_up_after_one_call_that_is_very_slow_or_two_that_are_slow() {
        let mut found = Found::default();
        found.note(SLOW, 100 * SECOND);
        assert_eq!(found.until, 0);
        // Too long after.
        found.note(SLOW, 120 * SECOND);
        assert_eq!(found.until, 0);
        found.note(SLOW, 121 * SECOND);
        assert_eq!(found.until, 122 * SECOND);
        let mut found = Found::default();
        found.note(VERY_SLOW, 100 * SECOND);
        assert_eq!(found.until, 101 * SECOND);
    }

    #[test]
    fn a_user_that_is_found_out_again_is_given_up_for_twice_as_long_and_not_for_ever() {
        let (mut found, mut now) = (Found::default(), 100 * SECOND);
        for seconds in [1, 2, 4, 8, 16, 32, 64, 128, 256, 256] {
            found.note(VERY_SLOW, now);
            // What was under way then.
            found.note(VERY_SLOW, now + 1);
            assert_eq!(found.until, now + seconds * SECOND);
            now = found.until;
        }
        found.note(VERY_SLOW, now + 256 * SECOND);
        assert_eq!(found.until, now + 257 * SECOND);
    }
}
