//! What the broker itself has little of, places for clients and descriptors, and how much of each a user may have at a
//! time. No constant is right for it: it depends on how many users there are, and on how much is left.
//!
//! Of n users each may have one part in n + 1 of what the others have left. The first can have half, the second a sixth,
//! the third a twelfth; however many come, something is left for the next. The last part is for root and for the user
//! that runs the broker, which may have all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Of so many parts the last one is kept for root and for the user that runs the broker.
const PARTS: u64 = 16;

/// Something of which there is a fixed amount.
#[derive(Debug)]
pub struct Supply {
    total: u64,
    /// The user that runs the broker.
    owner: u32,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    sum: u64,
    by: HashMap<u32, u64>,
}

impl Supply {
    /// So much, at a broker that this user runs.
    #[must_use]
    pub fn new(total: u64, owner: u32) -> Arc<Self> {
        Arc::new(Self { total, owner, held: Mutex::default() })
    }

    /// Gives a user so much more.
    ///
    /// # Errors
    /// How much the user has, and may have now, if that would be too much.
    pub fn take(self: &Arc<Self>, user: u32, asked: u64) -> Result<Holding, (u64, u64)> {
        let mut held = self.lock();
        let own = held.by.get(&user).copied().unwrap_or(0);
        let limit = self.limit(&held, user, own);
        if own.checked_add(asked).is_none_or(|sum| sum > limit) {
            return Err((own, limit));
        }
        held.sum += asked;
        *held.by.entry(user).or_default() += asked;
        Ok(Holding { supply: self.clone(), user, amount: asked })
    }

    /// How much a user may have that has so much already.
    fn limit(&self, held: &Held, user: u32, own: u64) -> u64 {
        let is_first = |user: u32| user == 0 || user == self.owner;
        let others = held.sum - own;
        if is_first(user) {
            return self.total.saturating_sub(others);
        }
        let users = held.by.keys().filter(|&&other| other != user && !is_first(other)).count() as u64 + 1;
        (self.total - self.total / PARTS).saturating_sub(others) / (users + 1)
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        // A panic while it was locked cannot have left it half changed.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a user has of a [`Supply`], for as long as this exists.
#[derive(Debug)]
pub struct Holding {
    supply: Arc<Supply>,
    user: u32,
    amount: u64,
}

impl Drop for Holding {
    fn drop(&mut self) {
        let mut held = self.supply.lock();
        held.sum -= self.amount;
        if let Some(own) = held.by.get_mut(&self.user) {
            *own -= self.amount;
            if *own == 0 {
                held.by.remove(&self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWNER: u32 = 1000;

    /// All that a user can get, one by one.
    fn take_all(supply: &Arc<Supply>, user: u32) -> Vec<Holding> {
        (0..).map_while(|_| supply.take(user, 1).ok()).collect()
    }

    #[test]
    fn something_is_left_for_the_next_user_and_the_last_is_roots_and_the_owners() {
        let supply = Supply::new(4096, OWNER);
        let greedy: Vec<_> = (1..=20).map(|user| take_all(&supply, user)).collect();
        let counts: Vec<_> = greedy.iter().map(Vec::len).collect();
        assert_eq!(counts[..4], [1920, 640, 320, 192]);
        assert!(counts.iter().all(|&count| count > 0), "{counts:?}");
        // However many users work together.
        assert!(supply.take(0, 4096 / PARTS / 2).is_ok());
        let owners = take_all(&supply, OWNER);
        assert!(owners.len() as u64 >= 4096 / PARTS);
        assert_eq!(supply.lock().sum, 4096, "there is more, which not even its owner gets");
        assert!(supply.take(0, 1).is_err() && supply.take(1, u64::MAX).is_err());
        drop((greedy, owners));
        assert!(supply.lock().by.is_empty() && supply.lock().sum == 0);
    }

    #[test]
    fn the_only_user_of_a_broker_gets_all() {
        for user in [0, OWNER] {
            assert_eq!(take_all(&Supply::new(100, OWNER), user).len(), 100);
        }
    }

    proptest! {
        #[test]
        fn no_history_lends_more_than_there_is(steps in prop::collection::vec((0..6u32, 1..40u64, any::<bool>()), 0..200)) {
            let supply = Supply::new(200, 5);
            let mut held: Vec<Holding> = Vec::new();
            for (user, amount, gives_back) in steps {
                if gives_back && !held.is_empty() {
                    held.swap_remove(amount as usize % held.len());
                } else {
                    held.extend(supply.take(user, amount));
                }
                let sum: u64 = held.iter().map(|holding| holding.amount).sum();
                prop_assert_eq!(supply.lock().sum, sum);
                prop_assert!(sum <= 200);
                let others: u64 = held.iter().filter(|holding| ![0, 5].contains(&holding.user)).map(|one| one.amount).sum();
                prop_assert!(others <= 200 - 200 / PARTS);
            }
        }
    }
}
