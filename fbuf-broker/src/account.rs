//! What each user of a broker takes up. A charge is a value that is kept beside what it pays for, and is
//! discharged when that is dropped: there is no way to forget it, and none to discharge it twice.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use fbuf_core::limits::MAX_LINKS;
use fbuf_protocol::{QuotaExceeded, Resource};

use crate::{
    policy::Quota,
    share::{Holding, Supply},
};

/// How many links endpoints of a user may name at least.
const LEAST_NAMES: u64 = 4 * MAX_LINKS as u64;

/// What the broker itself has little of.
#[derive(Debug, Clone)]
pub struct Capacity {
    clients: Arc<Supply>,
    descriptors: Arc<Supply>,
}

impl Capacity {
    /// That of a broker that this user runs, with so many places for clients and so many descriptors.
    #[must_use]
    pub fn new(clients: u64, descriptors: u64, owner: u32) -> Self {
        Self { clients: Supply::new(clients, owner), descriptors: Supply::new(descriptors, owner) }
    }

    /// As much as is asked for.
    #[must_use]
    pub fn unlimited() -> Self {
        Self::new(u64::MAX, u64::MAX, 0)
    }

    /// Takes what comes with something that is charged to a user.
    fn take(&self, user: u32, resource: Resource, asked: u64) -> Result<Vec<Holding>, (u64, u64)> {
        let pools = match resource {
            Resource::Connections => &[&self.clients, &self.descriptors][..],
            Resource::Descriptors => &[&self.descriptors],
            _ => &[],
        };
        pools.iter().map(|pool| pool.take(user, asked)).collect()
    }
}

/// The accounts of all users that take up anything.
#[derive(Debug)]
pub struct Accounts {
    capacity: Capacity,
    of: HashMap<u32, Arc<Account>>,
}

impl Accounts {
    /// None yet.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self { capacity, of: HashMap::new() }
    }

    /// That of a user, by id. Accounts on which nothing is charged, nor was asked lately, are forgotten.
    pub fn of(&mut self, user: u32) -> Arc<Account> {
        let now = Instant::now();
        self.of.retain(|_, account| Arc::strong_count(account) > 1 || account.is_ahead(now));
        self.of.entry(user).or_insert_with(|| Arc::new(Account::new(user, self.capacity.clone()))).clone()
    }

    /// What every user takes up, by id.
    pub fn used(&self) -> impl Iterator<Item = (u32, Resource, u64)> {
        let of = |account: &Arc<Account>| {
            let (user, used) = (account.user, account.clone());
            Resource::ALL.iter().map(move |&resource| (user, resource, used.used(resource)))
        };
        self.of.values().flat_map(of).filter(|&(_, _, used)| used > 0)
    }
}

/// What one user takes up.
pub struct Account {
    user: u32,
    capacity: Capacity,
    used: [AtomicU64; Resource::ALL.len()],
    /// How many links its endpoints have named.
    names: AtomicU64,
    /// When requests that were made evenly, as often as the quota allows, would have come so far.
    due: Mutex<Option<Instant>>,
    /// Locked by one request after the other, in the order in which they came.
    line: tokio::sync::Mutex<()>,
}

impl Account {
    fn new(user: u32, capacity: Capacity) -> Self {
        Self {
            user,
            capacity,
            used: Default::default(),
            names: AtomicU64::new(0),
            due: Mutex::new(None),
            line: tokio::sync::Mutex::default(),
        }
    }

    /// How much of it is in use.
    #[must_use]
    pub fn used(&self, resource: Resource) -> u64 {
        self.used[resource as usize].load(Ordering::Relaxed)
    }

    /// Charges so much to it.
    ///
    /// # Errors
    /// [`QuotaExceeded`]: it would be more than the quota, or than the user's share of what the broker has.
    pub fn charge(self: &Arc<Self>, quota: &Quota, resource: Resource, asked: u64) -> Result<Charge, QuotaExceeded> {
        let limit = quota.of(resource);
        // Relaxed: a number that stands for itself.
        let cell = &self.used[resource as usize];
        let fits = |used: u64| used.checked_add(asked).filter(|&sum| sum <= limit);
        cell.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .map_err(|used| QuotaExceeded::new(self.user, resource, asked, used, limit, &quota.rule))?;
        let mut charge = Charge { account: self.clone(), resource, amount: asked, _holdings: Vec::new() };
        charge._holdings = self.capacity.take(self.user, resource, asked).map_err(|(used, limit)| {
            const SHARE: &str = "a share of what the broker has left, of clients and of descriptors (RLIMIT_NOFILE)";
            QuotaExceeded::new(self.user, resource, asked, used, limit, SHARE)
        })?;
        Ok(charge)
    }

    /// Takes note that one of its endpoints names so many links, which may be none: of each that the quota allows, there are
    /// two ends to name it, and some there may be from before it was lowered.
    ///
    /// # Errors
    /// [`QuotaExceeded`]: they would be more.
    pub fn name(self: &Arc<Self>, quota: &Quota, asked: u64) -> Result<Names, QuotaExceeded> {
        let (resource, limit) = (Resource::Links, quota.of(Resource::Links).saturating_mul(2).max(LEAST_NAMES));
        let fits = |used: u64| used.checked_add(asked).filter(|&sum| sum <= limit);
        // Relaxed: a number that stands for itself.
        self.names
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .map_err(|used| QuotaExceeded::new(self.user, resource, asked, used, limit, &quota.rule))?;
        Ok(Names { account: self.clone(), amount: asked })
    }

    /// Takes a descriptor of the broker's, for something that no quota is about; none, if the user has its share.
    #[must_use]
    pub fn take_descriptor(&self) -> Option<Holding> {
        self.capacity.descriptors.take(self.user, 1).ok()
    }

    /// Waits for the requests of this user that came before.
    pub async fn line(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.line.lock().await
    }

    /// Notes a request: when it may be answered. A user that has been silent may make as many at once as are allowed in
    /// a second.
    #[must_use]
    pub fn note_request(&self, quota: &Quota, now: Instant) -> Instant {
        self.note_work(quota, 1, now)
    }

    /// As [`Self::note_request`], for what takes as long as so many.
    #[must_use]
    pub fn note_work(&self, quota: &Quota, requests: u32, now: Instant) -> Instant {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let time = Duration::from_secs(1) / quota.requests_per_second.max(1) * requests;
        let next = due.map_or(now, |due| due.max(now)) + time;
        *due = Some(next);
        next.checked_sub(Duration::from_secs(1)).unwrap_or(now)
    }

    /// Whether more was asked than is due by now.
    fn is_ahead(&self, now: Instant) -> bool {
        self.due.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|due| due > now)
    }
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("user", &self.user).field("used", &self.used).finish_non_exhaustive()
    }
}

/// Something that a user takes up, for as long as this exists.
#[derive(Debug)]
pub struct Charge {
    account: Arc<Account>,
    resource: Resource,
    amount: u64,
    /// What it takes of the broker's own.
    _holdings: Vec<Holding>,
}

impl Drop for Charge {
    fn drop(&mut self) {
        let before = self.account.used[self.resource as usize].fetch_sub(self.amount, Ordering::Relaxed);
        debug_assert!(before >= self.amount, "{} were discharged of {before}", self.amount);
    }
}

/// Links that an endpoint of a user has named, for as long as this exists.
#[derive(Debug)]
pub struct Names {
    account: Arc<Account>,
    amount: u64,
}

impl Drop for Names {
    fn drop(&mut self) {
        self.account.names.fetch_sub(self.amount, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_charged_is_discharged_with_what_it_pays_for() {
        let mut accounts = Accounts::new(Capacity::unlimited());
        let (account, quota) = (accounts.of(7), Quota::default().with(Resource::Links, 10));
        let three = account.charge(&quota, Resource::Links, 3).unwrap();
        let seven = account.charge(&quota, Resource::Links, 7).unwrap();
        let spent = account.charge(&quota, Resource::Links, 1).unwrap_err();
        assert_eq!((spent.asked, spent.used, spent.limit), (1, 10, 10));
        assert!(account.charge(&quota, Resource::Links, u64::MAX).is_err(), "a sum that overflows");
        drop(three);
        assert_eq!(account.used(Resource::Links), 7);
        assert_eq!(accounts.used().collect::<Vec<_>>(), [(7, Resource::Links, 7)]);
        // So late that no pause of this thread is longer.
        let later = account.note_request(&quota, Instant::now() + Duration::from_secs(3600));
        drop((seven, account));
        accounts.of(8);
        assert!(accounts.of.contains_key(&7) && accounts.of(7).is_ahead(later), "what was asked lately was forgotten");
        *accounts.of(7).due.lock().unwrap() = None;
        accounts.of(8);
        assert_eq!(accounts.of.keys().collect::<Vec<_>>(), [&8], "an account with nothing on it was kept");
    }

    #[test]
    fn who_asks_too_often_is_made_to_wait() {
        let (account, quota) = (Account::new(1, Capacity::unlimited()), Quota::default().with_requests_per_second(100));
        let now = Instant::now();
        for _ in 0..100 {
            assert!(account.note_request(&quota, now) <= now, "the first second's worth need not wait");
        }
        assert_eq!(account.note_request(&quota, now), now + Duration::from_millis(10));
        let later = now + Duration::from_secs(5);
        assert!(account.note_request(&quota, later) <= later);
    }
}
