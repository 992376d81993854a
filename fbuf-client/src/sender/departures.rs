//! The receivers that went and were not asked about yet.

use std::collections::{BTreeMap, VecDeque};

use fbuf_core::limits::MAX_DEPARTURES;

use super::Departure;

/// The last departures. Of the user that has most of them, the oldest is forgotten first: no user that comes and goes has
/// those of another forgotten.
#[derive(Debug, Default)]
pub(super) struct Departures(VecDeque<Departure>);

impl Departures {
    pub(super) fn add(&mut self, departure: Departure) {
        self.0.push_back(departure);
        if self.0.len() > MAX_DEPARTURES {
            self.0.remove(self.oldest_of_most());
        }
    }

    /// The one that came first.
    pub(super) fn next(&mut self) -> Option<Departure> {
        self.0.pop_front()
    }

    fn oldest_of_most(&self) -> usize {
        let mut oldest = BTreeMap::new();
        for (index, departure) in self.0.iter().enumerate() {
            oldest.entry(departure.peer.process.uid).or_insert((0, index)).0 += 1;
        }
        oldest.into_values().max_by_key(|&(count, _)| count).map_or(0, |(_, index)| index)
    }
}

#[cfg(test)]
mod tests {
    use fbuf_core::peer::{Credentials, Peer};

    use super::{super::DisconnectReason, *};

    #[test]
    fn a_user_that_comes_and_goes_has_no_departure_of_another_forgotten() {
        let mut departures = Departures::default();
        let mut depart = |endpoint, uid| {
            let peer = Peer::new(endpoint, Credentials::new(1, uid, uid));
            departures.add(Departure { peer, reason: DisconnectReason::Left, unread: None });
        };
        (0..3).for_each(|endpoint| depart(endpoint, 1000));
        (3..500).for_each(|endpoint| depart(endpoint, 1001));
        let left: Vec<_> = std::iter::from_fn(|| departures.next()).map(|departure| departure.peer.endpoint).collect();
        let last = 500 - (MAX_DEPARTURES as u64 - 3);
        assert_eq!(left, (0..3).chain(last..500).collect::<Vec<_>>());
    }
}
