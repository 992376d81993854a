//! How much of the log is about which user: one that does much, or is refused much, does not fill it, nor hold up the
//! broker that writes it.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use tracing::warn;

/// How many lines may be about one user before the next ones are left out, and for how long.
const MOST: u32 = 100;
const TIME: Duration = Duration::from_secs(5);

/// The lines about each user since some moment.
#[derive(Debug)]
pub(super) struct LogLimit {
    since: Instant,
    asked: HashMap<u32, u32>,
}

impl LogLimit {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, asked: HashMap::new() }
    }

    /// Whether one more line may be about a user. What was left out is counted, and said when that is over.
    pub(super) fn may_log(&mut self, user: u32, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= TIME {
            for (uid, log_limit) in self.left_out() {
                warn!(uid, lines = log_limit, "more was done or refused than is written here");
            }
            *self = Self::new(now);
        }
        let asked = self.asked.entry(user).or_default();
        *asked = asked.saturating_add(1);
        *asked <= MOST
    }

    fn left_out(&self) -> impl Iterator<Item = (u32, u32)> {
        self.asked
            .iter()
            .map(|(&user, &asked)| (user, asked.saturating_sub(MOST)))
            .filter(|&(_, log_limit)| log_limit > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_much_is_written_of_less_and_others_are_as_ever() {
        let start = Instant::now();
        let mut log_limit = LogLimit::new(start);
        let count = |log_limit: &mut LogLimit, user, tries, at| {
            (0..tries).filter(|_| log_limit.may_log(user, at)).count() as u32
        };
        assert_eq!(count(&mut log_limit, 1, 3 * MOST, start), MOST);
        assert_eq!(count(&mut log_limit, 2, MOST, start), MOST);
        assert_eq!(log_limit.left_out().collect::<Vec<_>>(), [(1, 2 * MOST)]);
        assert_eq!(count(&mut log_limit, 1, 3 * MOST, start + TIME), MOST);
        assert_eq!(log_limit.asked.len(), 1, "a user that did nothing lately is still known");
    }
}
