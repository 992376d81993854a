//! How much of a sender's time the receivers of one other user take up when they come and go.
//!
//! To open a link takes as long as the lane is large, milliseconds for many slots; to end it, one look at each slot; and a receiver may
//! come and go for ever. So
//! of what links of one other user take, a sender spends a quarter of its time at most, but for a moment at the beginning.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// For each time that links of a user took, how much of all time has to pass.
const PART: u32 = 4;
/// How much of that may be due before the next link waits.
const MOMENT: Duration = Duration::from_millis(500);

/// By user: until when what was spent on its links is no more than its part.
#[derive(Debug, Default)]
pub(super) struct Turns(BTreeMap<u32, Instant>);

impl Turns {
    /// Whether the next link of this user has to wait.
    pub(super) fn is_early(&self, user: u32, now: Instant) -> bool {
        self.0.get(&user).is_some_and(|&until| until.saturating_duration_since(now) > MOMENT)
    }

    /// So much was spent on a link of this user, until now.
    pub(super) fn note(&mut self, user: u32, spent: Duration, now: Instant) {
        let begin = now - spent;
        let until = self.0.get(&user).map_or(begin, |&until| until.max(begin));
        // Those that owe nothing are as those that never came.
        self.0.retain(|_, until| *until > now);
        self.0.insert(user, until + spent * PART);
    }

    /// Whether anything was spent on links of this user of late.
    #[cfg(test)]
    pub(super) fn knows(&self, user: u32) -> bool {
        self.0.contains_key(&user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_user_takes_a_quarter_of_the_time_and_another_waits_for_nothing() {
        let (begin, step) = (Instant::now(), Duration::from_millis(10));
        let (mut turns, mut now, mut spent) = (Turns::default(), begin, Duration::ZERO);
        while now - begin < Duration::from_secs(20) {
            now += step;
            if !turns.is_early(1, now - step) {
                turns.note(1, step, now);
                spent += step;
            }
            assert!(!turns.is_early(2, now));
        }
        let part = (now - begin) / PART;
        assert!((part..part + MOMENT).contains(&spent), "{spent:?}");
        // After a pause it owes nothing.
        assert!(!turns.is_early(1, now + MOMENT));
        turns.note(2, Duration::ZERO, now + MOMENT * PART);
        assert_eq!(turns.0.len(), 1);
    }
}
