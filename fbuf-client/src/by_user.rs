//! A bounded queue of what a call is to say of peers, of which no user delays or displaces what is said of another.

use std::collections::VecDeque;

use fbuf_core::{peer::Peer, socket::shares};

/// What is said of a peer.
pub(crate) trait OfPeer {
    /// None if it is of no peer. It counts as the own user's then.
    fn peer(&self) -> Option<&Peer>;
}

/// Items wait until they are asked for: those of one user first in, first out, those of several users by turns.
#[derive(Debug)]
pub(crate) struct ByUser<T> {
    /// The users that have any, and the items of each. The user that had its turn longest ago is the first.
    users: VecDeque<(User, VecDeque<T>)>,
    len: usize,
    most: usize,
}

/// None stands for the own user and root.
type User = Option<u32>;

impl<T: OfPeer> ByUser<T> {
    /// For so many items at most. If there are more, of the user that has most of them the oldest is forgotten.
    pub(crate) const fn with_most(most: usize) -> Self {
        Self { users: VecDeque::new(), len: 0, most }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn add(&mut self, item: T) {
        let user = item.peer().and_then(shares::bounded);
        match self.users.iter_mut().find(|(other, _)| *other == user) {
            Some((_, items)) => items.push_back(item),
            None => self.users.push_back((user, [item].into())),
        }
        self.len += 1;
        if self.len > self.most {
            self.forget_one();
        }
    }

    /// The oldest of the user that had its turn longest ago.
    pub(crate) fn next(&mut self) -> Option<T> {
        let (user, mut items) = self.users.pop_front()?;
        let item = items.pop_front();
        self.len -= usize::from(item.is_some());
        if !items.is_empty() {
            self.users.push_back((user, items));
        }
        item
    }

    fn forget_one(&mut self) {
        let most = self.users.iter_mut().max_by_key(|(_, items)| items.len());
        let forgotten = most.and_then(|(_, items)| items.pop_front());
        self.len -= usize::from(forgotten.is_some());
        self.users.retain(|(_, items)| !items.is_empty());
    }
}

impl<T: OfPeer> Extend<T> for ByUser<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, items: I) {
        items.into_iter().for_each(|item| self.add(item));
    }
}

#[cfg(test)]
mod tests {
    use fbuf_core::peer::Credentials;

    use super::*;

    #[derive(Debug)]
    struct Said(Option<Peer>, u32);

    impl OfPeer for Said {
        fn peer(&self) -> Option<&Peer> {
            self.0.as_ref()
        }
    }

    fn of(uid: u32, number: u32) -> Said {
        Said(Some(Peer::new(u64::from(number), Credentials::new(1, uid, uid))), number)
    }

    fn numbers(queue: &mut ByUser<Said>) -> Vec<u32> {
        std::iter::from_fn(|| queue.next()).map(|Said(_, number)| number).collect()
    }

    #[test]
    fn what_is_said_of_many_peers_of_one_user_delays_that_of_another_by_one() {
        let mut queue = ByUser::with_most(1000);
        queue.extend((0..500).map(|number| of(1001, number)));
        queue.extend([500, 501].map(|number| of(1000, number)));
        queue.add(of(1002, 502));
        assert_eq!(numbers(&mut queue)[..6], [0, 500, 502, 1, 501, 2]);
    }

    #[test]
    fn a_user_of_whom_more_is_said_after_each_turn_has_its_turn_behind_the_others() {
        let mut queue = ByUser::with_most(1000);
        queue.extend([0, 1].map(|number| of(1001, number)));
        queue.extend([100, 101].map(|number| of(1000, number)));
        let mut told = |next| {
            let Said(_, number) = queue.next().unwrap();
            queue.add(of(1001, next));
            number
        };
        assert_eq!([2, 3, 4, 5].map(&mut told), [0, 100, 1, 101]);
    }

    #[test]
    fn what_is_said_of_the_peers_of_one_user_stays_in_order() {
        let mut queue = ByUser::with_most(1000);
        (0..300).for_each(|number| queue.add(of(1000 + number % 3, number)));
        let all = numbers(&mut queue);
        for user in 0..3 {
            let of_user: Vec<_> = all.iter().copied().filter(|number| number % 3 == user).collect();
            assert!(of_user.len() == 100 && of_user.is_sorted(), "{of_user:?}");
        }
        assert!(queue.is_empty());
    }

    #[test]
    fn a_user_of_whom_much_is_said_has_nothing_of_another_forgotten() {
        let mut queue = ByUser::with_most(64);
        queue.extend((0..3).map(|number| of(1000, number)));
        queue.extend((3..500).map(|number| of(1001, number)));
        let mut left = numbers(&mut queue);
        left.sort_unstable();
        assert_eq!(left, (0..3).chain(500 - 61..500).collect::<Vec<_>>());
        assert!(queue.is_empty());
    }

    #[test]
    fn the_own_user_root_and_what_is_of_no_peer_are_one() {
        let mut queue = ByUser::with_most(10);
        let own = Peer::new(0, Credentials::new(1, 1000, 1000)).with_same_user(true);
        queue.extend([Said(Some(own), 0), of(0, 1), Said(None, 2), of(1000, 3)]);
        assert_eq!(numbers(&mut queue), [0, 3, 1, 2]);
    }

    #[test]
    fn as_many_users_as_there_may_be_items_are_no_more() {
        let mut queue = ByUser::with_most(64);
        queue.extend((0..500).map(|number| of(1000 + number, number)));
        assert_eq!(numbers(&mut queue).len(), 64);
    }
}
