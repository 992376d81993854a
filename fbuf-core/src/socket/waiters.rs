//! Slow users: so many threads wait at their sockets that calls at the other end take long.
//!
//! A process can wait for its end of a connection as often as it likes: by epoll(7) over duplicates of it, or by signals to many
//! processes (F_SETOWN in fcntl(2)). The kernel wakes all of them, one after the other, in the thread that sends a message over
//! the other end, takes one off, hangs up or closes: 60 ns for each of them, 0.2 s for a few million. That cannot be known before. So
//! each such call to a peer of another user is measured by the processor time of its thread. A user that is found out is slow for
//! a while: another thread makes the calls of its sockets, that of the relay (`relay.rs`) or [that which closes
//! them](crate::process::deferred).
//!
//! That costs time, and nothing else, since a user may be found out for what another one does: the clock of a thread runs on in
//! interrupts, unless the kernel has CONFIG_IRQ_TIME_ACCOUNTING, and on a virtual machine while the host has the processor.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};

use crate::{
    process::fork::{ForkMutex, Rank},
    wait::now,
};

/// A call that takes more of a processor than this is slow, and what it takes is owed by the user.
const SLOW: Duration = Duration::from_millis(1);
/// A user that owes more than this is found out.
const MOST_OWED: Duration = Duration::from_millis(100);
/// One call does not do it: where a machine is virtual, its host may take a processor away in any call, for as long as it likes.
const MOST_OF_ONE: Duration = Duration::from_millis(60);
/// Of so many parts of the time that passes, one is forgiven. So much of a processor a user can take up, and an honest one
/// owes less on a machine whose host is busy.
const FORGIVEN: u32 = 20;
/// For how long a user is slow once it was found out.
const MEMORY: Duration = Duration::from_secs(300);
/// For how long sockets of a slow user are waited for together, when they are closed, until what was sent is on its way, beside the part
/// of the time that is forgiven.
const MOST_WAITED: Duration = Duration::from_millis(100);

/// What something took, less a part of the time that has passed since.
#[derive(Debug, Default)]
pub(super) struct Debt {
    owed: Duration,
    /// When that was so, as [`now`] has it.
    at: u64,
}

impl Debt {
    /// How much is owed, if one of so many parts of the time is forgiven.
    pub(super) fn owed(&mut self, now: u64, forgiven: u32) -> Duration {
        self.owed = self.owed.saturating_sub(Duration::from_nanos(now.saturating_sub(self.at)) / forgiven);
        self.at = now;
        self.owed
    }

    /// Adds to it, after what is forgiven.
    pub(super) fn add(&mut self, took: Duration, now: u64, forgiven: u32) -> Duration {
        self.owed(now, forgiven);
        self.owed += took;
        self.owed
    }
}

/// What is known of one user. Times are those of [`now`], in nanoseconds.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// What slow calls took.
    calls: Debt,
    /// What was waited for when sockets were closed.
    waits: Debt,
    /// Until when it is slow.
    until: u64,
}

impl Found {
    /// Notes a slow call that took so much.
    fn note(&mut self, took: Duration, now: u64) {
        if self.calls.add(took.min(MOST_OF_ONE), now, FORGIVEN) > MOST_OWED {
            self.calls.owed = Duration::ZERO;
            self.until = now.saturating_add(MEMORY.as_nanos() as u64);
        }
    }
}

/// By user.
pub(crate) type Users = BTreeMap<u32, Found>;

pub(crate) static USERS: ForkMutex<Users> = ForkMutex::new(Rank::Waiters, Mutex::new(BTreeMap::new()), |_| {});
/// Whether there is any.
static ANY: AtomicBool = AtomicBool::new(false);

/// How much of a processor this thread has used.
pub(super) fn used() -> Option<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).ok().map(Duration::from)
}

/// Does what may wake all that wait at the other end, where a process of this user is, if it is another one.
pub fn measured<T>(user: Option<u32>, call: impl FnOnce() -> T) -> T {
    let Some(user) = user else { return call() };
    let begin = used();
    let result = call();
    if let (Some(begin), Some(end)) = (begin, used())
        && let took = end.saturating_sub(begin)
        && took > SLOW
        && let Some(now) = now()
    {
        USERS.lock().entry(user).or_default().note(took, now);
        // Relaxed: what is told besides is behind the lock.
        ANY.store(true, Ordering::Relaxed);
    }
    result
}

/// Whether this user is slow just now.
#[must_use]
pub fn is_slow(user: u32) -> bool {
    // Relaxed: as above.
    ANY.load(Ordering::Relaxed)
        && USERS.lock().get(&user).is_some_and(|found| now().is_some_and(|now| now < found.until))
}

/// Waits until something is so; not for long, for a user for which others have waited.
pub(super) fn wait_for(user: u32, is_so: impl Fn() -> bool) {
    const STEP: Duration = Duration::from_micros(50);
    while !is_so()
        && let Some(begin) = now()
        && USERS.lock().entry(user).or_default().waits.owed(begin, FORGIVEN) < MOST_WAITED
    {
        std::thread::sleep(STEP);
        let now = now().unwrap_or(begin);
        USERS.lock().entry(user).or_default().waits.add(Duration::from_nanos(now.saturating_sub(begin)), now, FORGIVEN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// Notes a call of so much at each of these times: when the user was found out first.
    fn found_out_at(took: Duration, times: impl IntoIterator<Item = u64>) -> Option<u64> {
        let mut found = Found::default();
        times.into_iter().find(|&now| {
            found.note(took, now);
            found.until > now
        })
    }

    #[test]
    fn a_user_is_found_out_when_its_calls_took_too_much_and_never_for_one() {
        let begin = 100 * SECOND;
        assert_eq!(found_out_at(Duration::MAX, [begin]), None);
        assert_eq!(found_out_at(Duration::MAX, [begin, begin + SECOND / 10]), Some(begin + SECOND / 10));
        // As fast as they can be: each takes what passes.
        let calls = |count: u64| (0..count).map(move |call| begin + call * SLOW.as_nanos() as u64);
        assert_eq!(found_out_at(SLOW, calls(100)), None);
        assert!(found_out_at(SLOW, calls(110)).is_some());
    }

    #[test]
    fn a_user_is_not_found_out_for_what_a_busy_host_takes() {
        // 10 ms now and then, for an hour.
        let times = |pause: u64| (0..3600 * SECOND / pause).map(move |call| 100 * SECOND + call * pause);
        let slice = Duration::from_millis(10);
        assert_eq!(found_out_at(slice, times(SECOND / 5)), None);
        // The control: more than is forgiven.
        assert!(found_out_at(slice, times(SECOND / 10)).is_some());
    }

    #[test]
    fn a_user_is_waited_for_a_while_and_then_no_more() {
        // No other test knows these users.
        let (user, other) = (4_200_000_021, 4_200_000_022);
        let begin = std::time::Instant::now();
        wait_for(other, || true);
        wait_for(user, || false);
        let waited = begin.elapsed();
        assert!(waited >= MOST_WAITED, "{waited:?}");
        let begin = std::time::Instant::now();
        (0..100).for_each(|_| wait_for(user, || false));
        // What was forgiven since, and some steps.
        assert!(begin.elapsed() < MOST_WAITED, "{:?}", begin.elapsed());
    }
}
