//! What endpoints have done, summed up for metrics: endpoints that are alike are one group, and there are few groups however many
//! endpoints come and go.
//!
//! Endpoints are alike if they are of one user, channel, program and label. A user chooses the last three, so each user has a
//! share of the groups ([`share`](crate::share)); what has no group of its own counts in that of the rest of its user, and,
//! if there is none either, in that of the rest of all. No user counts in a group of another, and none can take that
//! of another away while an endpoint is open in it, or an hour after.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use fbuf_protocol::{
    Report,
    name::{Label, Program},
};

use crate::{
    share::{Holding, Supply},
    state::ClientId,
};

/// The most groups, beside that of the rest of all.
pub const MAX_GROUPS: u64 = 256;
/// How long a group in which no endpoint is open is kept for its user, if another user needs it.
const KEPT: Duration = Duration::from_secs(3600);

/// Which endpoints are counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Group {
    /// Those that are alike.
    Alike(Name),
    /// Those of a user that have no group of their own.
    RestOf(u32),
    /// Those of users that have no group.
    Rest,
}

/// What endpoints that are alike have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// The user.
    pub user: u32,
    /// The channel.
    pub channel: String,
    /// The program of the process.
    pub program: Program,
    /// The label.
    pub label: Option<Label>,
}

/// What endpoints have done since they were opened here, those that were closed since as well. Never less than before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Messages sent, or received.
    pub messages: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Messages left out.
    pub left_out: u64,
    /// Times that a sender found no free slot.
    pub waits: u64,
    /// Times that an endpoint slept.
    pub sleeps: u64,
    /// Peers that broke a rule.
    pub violations: u64,
}

impl Counts {
    /// Adds what has been done between two reports. What a client reports is anything.
    fn add(&mut self, before: &Report, now: &Report) {
        let more = |sum: &mut u64, of: fn(&Report) -> u64| {
            *sum = sum.saturating_add(of(now).saturating_sub(of(before)));
        };
        more(&mut self.messages, |report| report.messages);
        more(&mut self.bytes, |report| report.bytes);
        more(&mut self.left_out, |report| report.left_out);
        more(&mut self.waits, |report| report.waits);
        more(&mut self.sleeps, |report| report.sleeps);
        more(&mut self.violations, |report| report.violations);
    }
}

/// The senders of a group, or the receivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Which group.
    pub group: Group,
    /// Whether it is about senders.
    pub sends: bool,
    /// How many are open.
    pub endpoints: u64,
    /// What all of them have done.
    pub counts: Counts,
    /// What those that are open said last, as far as they have.
    pub reports: Vec<Report>,
}

/// What is known of a group.
#[derive(Debug)]
struct Sums {
    /// Of senders, and of receivers, once there was one.
    counts: [Option<Counts>; 2],
    /// How many endpoints are open.
    open: u64,
    /// Since when none is, if none is.
    empty_since: Instant,
    /// What its user has of the groups; nothing for the rest of all.
    _place: Option<Holding>,
}

impl Sums {
    fn new(place: Option<Holding>, now: Instant) -> Self {
        Self { counts: [None; 2], open: 0, empty_since: now, _place: place }
    }
}

/// An endpoint that is open.
#[derive(Debug)]
struct Endpoint {
    group: Arc<Group>,
    sends: bool,
    /// Whether it was open before: it counts from its first report on.
    was_open: bool,
    /// What it said last.
    last: Option<Report>,
}

/// All groups, and which endpoint is in which.
#[derive(Debug)]
pub struct Tally {
    places: Arc<Supply>,
    groups: BTreeMap<Arc<Group>, Sums>,
    endpoints: HashMap<ClientId, HashMap<u64, Endpoint>>,
}

impl Tally {
    /// Nothing yet, at a broker that this user runs.
    #[must_use]
    pub fn new(owner: u32) -> Self {
        Self { places: Supply::new(MAX_GROUPS, owner), groups: BTreeMap::new(), endpoints: HashMap::new() }
    }

    /// A client has opened an endpoint. One that was open before, at an earlier broker or over a connection that was lost,
    /// has been counted there.
    pub fn open(&mut self, (client, endpoint): (ClientId, u64), name: Name, sends: bool, was_open: bool, now: Instant) {
        let group = self.group_for(name, now);
        let sums = self.groups.entry(group.clone()).or_insert_with(|| Sums::new(None, now));
        sums.open += 1;
        sums.counts[usize::from(sends)].get_or_insert_default();
        let opened = Endpoint { group, sends, was_open, last: None };
        self.endpoints.entry(client).or_default().insert(endpoint, opened);
    }

    /// An endpoint has said what it does. Nothing is noted of one that is not open.
    pub fn note(&mut self, client: ClientId, endpoint: u64, report: Report) {
        let Some(endpoint) = self.endpoints.get_mut(&client).and_then(|all| all.get_mut(&endpoint)) else { return };
        let first = if endpoint.was_open { report } else { Report::default() };
        let before = endpoint.last.replace(report).unwrap_or(first);
        let sums = self.groups.get_mut(&endpoint.group);
        if let Some(counts) = sums.and_then(|sums| sums.counts[usize::from(endpoint.sends)].as_mut()) {
            counts.add(&before, &report);
        }
    }

    /// An endpoint is closed. One that is not open is closed already.
    pub fn close(&mut self, client: ClientId, endpoint: u64, now: Instant) {
        let closed = self.endpoints.get_mut(&client).and_then(|all| all.remove(&endpoint));
        closed.iter().for_each(|closed| self.count_out(closed, now));
    }

    /// A client has gone.
    pub fn leave(&mut self, client: ClientId, now: Instant) {
        let closed = self.endpoints.remove(&client).unwrap_or_default();
        closed.values().for_each(|closed| self.count_out(closed, now));
    }

    /// What an endpoint said last; none if it has said nothing.
    #[must_use]
    pub fn last(&self, client: ClientId, endpoint: u64) -> Option<Report> {
        self.endpoints.get(&client)?.get(&endpoint)?.last
    }

    /// All groups, the receivers and the senders of each apart.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        let mut open: HashMap<(&Group, bool), Vec<Option<Report>>> = HashMap::new();
        for endpoint in self.endpoints.values().flat_map(HashMap::values) {
            open.entry((&endpoint.group, endpoint.sends)).or_default().push(endpoint.last);
        }
        let mut lines = Vec::new();
        for (group, sums) in &self.groups {
            for (sends, counts) in [false, true].into_iter().zip(sums.counts) {
                let Some(counts) = counts else { continue };
                let reports = open.remove(&(&**group, sends)).unwrap_or_default();
                let (group, endpoints) = ((**group).clone(), reports.len() as u64);
                lines.push(Line { group, sends, endpoints, counts, reports: reports.into_iter().flatten().collect() });
            }
        }
        lines
    }

    fn count_out(&mut self, closed: &Endpoint, now: Instant) {
        if let Some(sums) = self.groups.get_mut(&closed.group) {
            sums.open -= 1;
            sums.empty_since = now;
        }
    }

    /// The group for an endpoint of this name: that of its like, or the rest to which it belongs. The rest of a user has its
    /// place before the user needs it.
    fn group_for(&mut self, name: Name, now: Instant) -> Arc<Group> {
        let user = name.user;
        let (rest, alike) = (Arc::new(Group::RestOf(user)), Arc::new(Group::Alike(name)));
        match (self.find(&rest, user, now), self.find(&alike, user, now)) {
            (_, true) => alike,
            (true, false) => rest,
            (false, false) => Arc::new(Group::Rest),
        }
    }

    /// Whether there is a group of a user, which is made if there is a place for it.
    fn find(&mut self, group: &Arc<Group>, user: u32, now: Instant) -> bool {
        if self.groups.contains_key(group) {
            return true;
        }
        loop {
            if let Ok(place) = self.places.take(user, 1) {
                self.groups.insert(group.clone(), Sums::new(Some(place), now));
                return true;
            }
            let Some(spare) = self.spare(user, now) else { return false };
            self.groups.remove(&spare);
        }
    }

    /// The group that a user can do without first: of those that are empty its own, or those of others after an hour, the
    /// one that has been empty for longest.
    fn spare(&self, user: u32, now: Instant) -> Option<Arc<Group>> {
        let empty = self.groups.iter().filter(|(_, sums)| sums.open == 0);
        let spare = empty.filter_map(|(group, sums)| {
            let is_own = match &**group {
                Group::Alike(name) => name.user == user,
                Group::RestOf(other) if *other == user => return None,
                Group::RestOf(_) => false,
                Group::Rest => return None,
            };
            let is_old = now.saturating_duration_since(sums.empty_since) >= KEPT;
            (is_own || is_old).then_some((!is_own, sums.empty_since, group))
        });
        spare.min().map(|(.., group)| group.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWNER: u32 = 1000;

    fn name(user: u32, label: &str) -> Name {
        let label = Some(Label::new(label).unwrap());
        Name { user, channel: "c".into(), program: Program::default(), label }
    }

    fn sent(messages: u64) -> Report {
        Report { messages, bytes: messages.saturating_mul(10), ..Report::default() }
    }

    fn messages(tally: &Tally, group: &Group) -> Option<u64> {
        tally.lines().into_iter().find(|line| line.group == *group).map(|line| line.counts.messages)
    }

    /// A user with one client.
    struct User {
        id: u32,
        client: ClientId,
        next: u64,
    }

    impl User {
        fn new(id: u32) -> Self {
            Self { id, client: ClientId(id.into()), next: 0 }
        }

        fn open(&mut self, tally: &mut Tally, label: &str, now: Instant) -> u64 {
            self.next += 1;
            tally.open((self.client, self.next), name(self.id, label), true, false, now);
            self.next
        }
    }

    #[test]
    fn endpoints_that_are_alike_are_one_line_also_when_they_have_ended() {
        let (mut tally, now, mut user) = (Tally::new(OWNER), Instant::now(), User::new(1));
        let (first, second) = (user.open(&mut tally, "x", now), user.open(&mut tally, "x", now));
        tally.note(user.client, first, sent(5));
        tally.note(user.client, first, sent(7));
        assert_eq!((tally.last(user.client, first), tally.last(user.client, second)), (Some(sent(7)), None));
        tally.close(user.client, first, now);
        tally.close(user.client, first, now);
        tally.note(user.client, first, sent(1000));
        tally.note(user.client, second, sent(10));
        let [line] = &tally.lines()[..] else { panic!("{:?}", tally.lines()) };
        assert_eq!((line.endpoints, line.counts.messages, line.counts.bytes), (1, 17, 170));
        assert_eq!((&line.group, line.sends, &line.reports[..]), (&Group::Alike(name(1, "x")), true, &[sent(10)][..]));
        tally.leave(user.client, now);
        assert_eq!(messages(&tally, &Group::Alike(name(1, "x"))), Some(17));
    }

    #[test]
    fn an_endpoint_that_comes_again_is_not_counted_again() {
        let (mut tally, now, user) = (Tally::new(OWNER), Instant::now(), User::new(1));
        let again = |tally: &mut Tally, was_open| tally.open((user.client, 1), name(1, "x"), true, was_open, now);
        again(&mut tally, false);
        tally.note(user.client, 1, sent(1000));
        tally.close(user.client, 1, now);
        again(&mut tally, true);
        tally.note(user.client, 1, sent(1001));
        tally.note(user.client, 1, sent(1005));
        assert_eq!(messages(&tally, &Group::Alike(name(1, "x"))), Some(1004));
    }

    #[test]
    fn what_has_no_group_of_its_own_counts_in_the_rest_of_its_user() {
        let (mut tally, now, mut greedy, mut other) = (Tally::new(OWNER), Instant::now(), User::new(1), User::new(2));
        let labels = 10_000;
        for label in 0..labels {
            let endpoint = greedy.open(&mut tally, &label.to_string(), now);
            tally.note(greedy.client, endpoint, sent(1));
        }
        let lines = tally.lines();
        assert!(lines.len() as u64 <= MAX_GROUPS / 2, "{}", lines.len());
        assert_eq!(lines.iter().map(|line| line.counts.messages).sum::<u64>(), labels);
        assert_eq!(lines.iter().map(|line| line.endpoints).sum::<u64>(), labels);
        assert_eq!(messages(&tally, &Group::RestOf(1)), Some(labels - (lines.len() as u64 - 1)));
        // Another user has groups of its own, also for what the first one calls so.
        let endpoint = other.open(&mut tally, "0", now);
        tally.note(other.client, endpoint, sent(3));
        assert_eq!(messages(&tally, &Group::Alike(name(2, "0"))), Some(3));
        assert_eq!(messages(&tally, &Group::Alike(name(1, "0"))), Some(1));
    }

    #[test]
    fn a_user_that_changes_its_labels_gives_up_those_it_used_first() {
        let (mut tally, now, mut user) = (Tally::new(OWNER), Instant::now(), User::new(1));
        let kept = user.open(&mut tally, "kept", now);
        for label in 0..1000 {
            let now = now + Duration::from_secs(label);
            let endpoint = user.open(&mut tally, &label.to_string(), now);
            tally.close(user.client, endpoint, now);
        }
        let groups: Vec<_> = tally.lines().into_iter().map(|line| line.group).collect();
        assert!(groups.contains(&Group::Alike(name(1, "kept"))) && groups.contains(&Group::Alike(name(1, "999"))));
        assert!(!groups.contains(&Group::Alike(name(1, "0"))) && !groups.contains(&Group::RestOf(1)), "{groups:?}");
        tally.note(user.client, kept, sent(1));
        assert_eq!(messages(&tally, &Group::Alike(name(1, "kept"))), Some(1));
    }

    #[test]
    fn groups_of_users_that_are_gone_are_for_others_after_an_hour() {
        let (mut tally, now) = (Tally::new(OWNER), Instant::now());
        for id in 1..100 {
            let mut user = User::new(id);
            for label in 0..1000 {
                user.open(&mut tally, &label.to_string(), now);
            }
            tally.leave(user.client, now);
        }
        // More users than there are groups share what is counted of them.
        assert!(messages(&tally, &Group::Rest).is_some() && tally.lines().len() as u64 <= MAX_GROUPS + 1);
        let mut late = User::new(500);
        late.open(&mut tally, "0", now + KEPT - Duration::from_secs(1));
        assert_eq!(messages(&tally, &Group::Alike(name(500, "0"))), None);
        late.open(&mut tally, "0", now + KEPT);
        assert!(messages(&tally, &Group::Alike(name(500, "0"))).is_some());
    }

    proptest! {
        #[test]
        fn no_history_has_more_lines_than_there_are_places_or_counts_that_go_back(
            steps in prop::collection::vec((0..3u8, 0..6u32, 0..400u16, any::<u64>()), 0..400)
        ) {
            let (mut tally, mut now) = (Tally::new(5), Instant::now());
            let mut before: BTreeMap<(Group, bool), Counts> = BTreeMap::new();
            for (kind, user, label, number) in steps {
                now += Duration::from_secs(number % 100);
                let (client, endpoint) = (ClientId(user.into()), u64::from(label));
                match kind {
                    0 if tally.last(client, endpoint).is_none() => {
                        tally.close(client, endpoint, now);
                        tally.open((client, endpoint), name(user, &label.to_string()), number % 2 == 0, false, now);
                    }
                    1 => tally.note(client, endpoint, sent(number)),
                    _ => tally.close(client, endpoint, now),
                }
                let lines = tally.lines();
                prop_assert!(lines.len() as u64 <= 2 * (MAX_GROUPS + 1));
                let seen: BTreeMap<_, _> = lines.iter().map(|line| ((line.group.clone(), line.sends), line.counts)).collect();
                for (line, counts) in &seen {
                    let earlier = before.get(line).copied().unwrap_or_default();
                    prop_assert!(counts.messages >= earlier.messages && counts.bytes >= earlier.bytes);
                }
                before = seen;
            }
        }
    }
}
