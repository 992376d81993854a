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

/// A call that takes more of a processor than this is slow, and what it takes is owed by the user.
const SLOW: Duration = Duration::from_millis(1);
/// A user that owes more than this is given up.
const MOST_OWED: Duration = Duration::from_millis(100);
/// One call does not do it: where a machine is virtual, its host may take a processor away in any call, for as long as it likes.
const MOST_OF_ONE: Duration = Duration::from_millis(60);
/// Of so many parts of the time that passes, one is forgiven. So much of a processor a user can take up, and an honest one
/// owes less on a machine whose host is busy.
const FORGIVEN: u64 = 20;
/// For how long a user is given up at first, and twice as long each time it is found out again,
const PAUSE: Duration = Duration::from_secs(1);
/// but no longer than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(256);

/// What is known of one user. Times are those of [`now`], in nanoseconds.
#[derive(Debug, Default)]
struct Found {
    /// What slow calls took and was not forgiven yet,
    owed: Duration,
    /// at this time.
    at: u64,
    /// Until when it is given up,
    until: u64,
    /// which is for so long.
    pause: Duration,
}

impl Found {
    /// Notes a slow call that took so much.
    fn note(&mut self, took: Duration, now: u64) {
        let since = |then: u64| Duration::from_nanos(now.saturating_sub(then));
        let forgiven = Duration::from_nanos(now.saturating_sub(self.at) / FORGIVEN);
        self.owed = self.owed.saturating_sub(forgiven) + took.min(MOST_OF_ONE);
        self.at = now;
        if now < self.until || self.owed <= MOST_OWED {
            return;
        }
        self.owed = Duration::ZERO;
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

    /// Notes a call of so much at each of these times: when the user was given up first.
    fn given_up_at(took: Duration, times: impl IntoIterator<Item = u64>) -> Option<u64> {
        let mut found = Found::default();
        times.into_iter().find(|&now| {
            found.note(took, now);
            found.until > now
        })
    }

    #[test]
    fn a_user_is_given_up_when_its_calls_took_too_much_and_never_for_one() {
        let begin = 100 * SECOND;
        assert_eq!(given_up_at(Duration::MAX, [begin]), None);
        assert_eq!(given_up_at(Duration::MAX, [begin, begin + SECOND / 10]), Some(begin + SECOND / 10));
        // As fast as they can be: each takes what passes.
        let calls = |count: u64| (0..count).map(move |call| begin + call * SLOW.as_nanos() as u64);
        assert_eq!(given_up_at(SLOW, calls(100)), None);
        assert!(given_up_at(SLOW, calls(110)).is_some());
    }

    #[test]
    fn a_user_is_not_given_up_for_what_a_busy_host_takes() {
        // 10 ms now and then, for an hour.
        let times = |pause: u64| (0..3600 * SECOND / pause).map(move |call| 100 * SECOND + call * pause);
        let slice = Duration::from_millis(10);
        assert_eq!(given_up_at(slice, times(SECOND / 5)), None);
        // The control: more than is forgiven.
        assert!(given_up_at(slice, times(SECOND / 10)).is_some());
    }

    #[test]
    fn a_user_that_is_found_out_again_is_given_up_for_twice_as_long_and_not_for_ever() {
        let (mut found, mut now) = (Found::default(), 100 * SECOND);
        for seconds in [1, 2, 4, 8, 16, 32, 64, 128, 256, 256] {
            found.note(MOST_OF_ONE, now);
            found.note(MOST_OF_ONE, now);
            // What was under way then.
            found.note(MOST_OF_ONE, now + 1);
            assert_eq!(found.until, now + seconds * SECOND);
            now = found.until;
        }
        found.note(MOST_OF_ONE, now + 256 * SECOND);
        found.note(MOST_OF_ONE, now + 256 * SECOND);
        assert_eq!(found.until, now + 257 * SECOND);
    }
}
