//! How an endpoint passes the time until there is something to do.

use std::time::{Duration, Instant};

/// What an endpoint does while it has nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wait {
    /// Looks again and again, and never sleeps: the lowest latency, at the price of a processor.
    Spin,
    /// Looks for about as long as it takes to wake a sleeper, then sleeps. With one processor it
    /// sleeps at once.
    #[default]
    Adaptive,
    /// Sleeps at once: the least processor time.
    Block,
}

/// For how long [`Wait::Adaptive`] looks: about what waking a sleeper costs on a virtual machine.
const SPIN_TIME: Duration = Duration::from_micros(50);
/// How often somebody who spins looks at sockets, where deaths and newcomers show.
const LOOK_TIME: Duration = Duration::from_millis(1);
/// How many looks pass between two looks at the clock.
const ROUND: u32 = 64;

/// One period of waiting.
#[derive(Debug)]
pub(crate) struct Waiting {
    how: Wait,
    deadline: Option<Instant>,
    rounds: u32,
    since: Option<Instant>,
    looked: Option<Instant>,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Look at memory again.
    Again,
    /// Look at sockets, without waiting.
    Look,
    /// Sleep.
    Sleep,
    /// The time is over.
    Expired,
}

impl Waiting {
    pub(crate) fn new(how: Wait, deadline: Option<Instant>) -> Self {
        let how = if how == Wait::Adaptive && single_processor() { Wait::Block } else { how };
        Self { how, deadline, rounds: 0, since: None, looked: None }
    }

    /// Whether this look is one of those that are worth more effort.
    pub(crate) fn is_thorough(&self) -> bool {
        self.rounds.is_multiple_of(ROUND)
    }

    #[inline]
    pub(crate) fn next(&mut self) -> Next {
        self.rounds = self.rounds.wrapping_add(1);
        if self.how != Wait::Block && !self.rounds.is_multiple_of(ROUND) {
            std::hint::spin_loop();
            return Next::Again;
        }
        self.at_the_clock(Instant::now())
    }

    fn at_the_clock(&mut self, now: Instant) -> Next {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            return Next::Expired;
        }
        let since = *self.since.get_or_insert(now);
        match self.how {
            Wait::Block => Next::Sleep,
            Wait::Adaptive if now.duration_since(since) >= SPIN_TIME => Next::Sleep,
            Wait::Adaptive => Next::Again,
            Wait::Spin => {
                let looked = self.looked.get_or_insert(since);
                if now.duration_since(*looked) < LOOK_TIME {
                    return Next::Again;
                }
                *looked = now;
                Next::Look
            }
        }
    }
}

fn single_processor() -> bool {
    use std::sync::OnceLock;
    static SINGLE: OnceLock<bool> = OnceLock::new();
    *SINGLE.get_or_init(|| std::thread::available_parallelism().is_ok_and(|count| count.get() == 1))
}

/// The moment that is `time` from now; none if that is beyond what clocks count.
pub(crate) fn deadline(time: Duration) -> Option<Instant> {
    Instant::now().checked_add(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_strategy_does_what_it_says() {
        let start = Instant::now();
        let at = |waiting: &mut Waiting, micros| waiting.at_the_clock(start + Duration::from_micros(micros));
        let mut block = Waiting::new(Wait::Block, None);
        assert_eq!(at(&mut block, 0), Next::Sleep);
        let mut spin = Waiting::new(Wait::Spin, None);
        assert_eq!(at(&mut spin, 0), Next::Again);
        assert_eq!(at(&mut spin, 999), Next::Again);
        assert_eq!(at(&mut spin, 1000), Next::Look);
        assert_eq!(at(&mut spin, 1001), Next::Again);
        if !single_processor() {
            let mut adaptive = Waiting::new(Wait::Adaptive, None);
            assert_eq!(at(&mut adaptive, 0), Next::Again);
            assert_eq!(at(&mut adaptive, 50), Next::Sleep);
        }
    }

    #[test]
    fn time_ends_for_each_strategy() {
        for how in [Wait::Spin, Wait::Adaptive, Wait::Block] {
            let now = Instant::now();
            assert_eq!(Waiting::new(how, Some(now)).at_the_clock(now), Next::Expired);
        }
    }
}
