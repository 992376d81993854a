//! Places and descriptors of the broker: users that take all they can get leave some for others, and the last for root.

#[path = "support/hostile.rs"]
mod client;
mod support;

use std::{io::Read, path::Path, time::Duration};

use client::Hostile;
use fbuf_client::{Client, ConnectError, Mechanism};
use fbuf_core::limits::MAX_GROUPS;
use fbuf_protocol::{Role, Slots};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{setgroups, setresgid, setresuid},
};
use support::{
    BrokerProcess,
    role::{Other, roles},
};

/// Users that take all, and one that comes later.
const GREEDY: [u32; 3] = [65_531, 65_532, 65_533];
const LATER: u32 = 65_530;
/// How many descriptors the broker may have.
const DESCRIPTORS: u64 = 700;

/// What a child does.
fn play(role: &str) {
    let (role, groups) = role.split_once(' ').unwrap_or((role, ""));
    match role {
        "connections" => take(|| match Client::connect() {
            Ok(client) => Some(client),
            Err(ConnectError::QuotaExceeded { quota: spent, .. }) => {
                assert!(spent.to_string().contains("a share of what the broker has left"), "{spent}");
                None
            }
            Err(error) => panic!("{error}"),
        }),
        "slots" => {
            let client = Client::connect().unwrap();
            let sender = |name: usize| {
                let sender = client.sender(&format!("{}-{name}", std::process::id())).slot_size(64).slots(16);
                let sender = sender.mechanism(Mechanism::Lease).open().ok()?;
                // A sender copies instead if the broker cannot make its slots.
                (sender.protection_info().mechanism == Mechanism::Lease).then_some(sender)
            };
            let mut names = 0..;
            take(|| sender(names.next()?));
        }
        "short" => {
            let client = Client::connect().unwrap();
            let mut names = 0..;
            let mut one = |slots| {
                let sender = client.sender(&format!("short-{}", names.next()?)).slot_size(64).slots(slots);
                let sender = sender.mechanism(Mechanism::Lease).open().ok()?;
                (sender.protection_info().mechanism == Mechanism::Lease).then_some(sender)
            };
            let many: Vec<_> = std::iter::from_fn(|| one(16)).collect();
            let few: Vec<_> = std::iter::from_fn(|| one(1)).collect();
            let _receiver = client.receiver("short").open().unwrap();
            let mut sender = client.sender("short").open().unwrap();
            println!("{} taken", 16 * many.len() + few.len());
            while sender.wait_for_receivers_timeout(1, Duration::from_millis(20)).is_err() {
                sender.unpaired().unwrap().iter().for_each(|one| println!("{one}"));
            }
            println!("linked now");
        }
        "groups" => {
            let groups: u32 = groups.parse().unwrap();
            let groups: Vec<_> = (0..groups).map(|group| (1_000_000 + group).into()).collect();
            setgroups(&groups).unwrap();
            setresgid(LATER.into(), LATER.into(), LATER.into()).unwrap();
            setresuid(LATER.into(), LATER.into(), LATER.into()).unwrap();
            match Client::connect() {
                Ok(_) => println!("it is served"),
                Err(error) => println!("{error}, so it is not served"),
            }
        }
        "later" => {
            let client = Client::connect().unwrap();
            let _receiver = client.receiver("later").open().unwrap();
            let mut sender = client.sender("later").open().unwrap();
            sender.wait_for_receivers_timeout(1, support::SOON).unwrap();
            println!("linked");
        }
        other => panic!("no such role: {other}"),
    }
}

/// Takes as much as it gets, and keeps it until its input ends.
fn take<T>(mut one: impl FnMut() -> Option<T>) {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let all: Vec<T> = std::iter::from_fn(&mut one).collect();
    println!("{} taken", all.len());
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// A broker for these users and root, with few descriptors.
fn broker(folder: &Path) -> BrokerProcess {
    BrokerProcess::start_short(folder, DESCRIPTORS, GREEDY.into_iter().chain([LATER]))
}

fn all_is_taken_and_others_are_served(role: &str, of_a_share: u64) {
    if !support::is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path());
    let mut greedy = Vec::new();
    for user in GREEDY {
        let mut other = Other::start(&broker.address, role, user);
        greedy.push((other.number::<u64>("taken"), other));
    }
    let counts: Vec<_> = greedy.iter().map(|(count, _)| *count).collect();
    // They do get what there is to get, and each less than the one before.
    assert!(counts[0] * of_a_share > DESCRIPTORS / 4, "{counts:?}");
    assert!(counts.is_sorted_by(|one, next| one > next) && counts[2] > 0, "{counts:?}");
    Other::start(&broker.address, "later", LATER).hear("linked");
    let root = Client::connect_to(&broker.address).unwrap();
    let role = Role::sender(64, 16, Mechanism::Lease, Slots::Broker { huge: false });
    let _receiver = root.receiver("root").keep_waiting().open().unwrap();
    Hostile::join(&broker.address, "root", role);
}

/// A user that has its share gets links for which it lacks a descriptor when the others leave more of them.
#[test]
fn a_link_waits_for_a_share_that_grows_when_another_user_leaves() {
    roles!(play);
    if !support::is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path());
    let [rich, short] = [GREEDY[0], GREEDY[1]];
    let mut rich = Other::start(&broker.address, "slots", rich);
    rich.hear("taken");
    let mut short = Other::start(&broker.address, "short", short);
    let had: u64 = short.number("taken");
    assert!(had > 0 && had < DESCRIPTORS / 4, "{had}");
    // Not for a moment: it has asked several times.
    (0..3).for_each(|_| drop(short.hear("they are linked when it has fewer, or may have more")));
    drop(rich);
    short.hear("linked now");
}

/// What a client's groups cost the broker for each connection is bounded.
#[test]
fn a_client_in_more_groups_than_any_user_needs_is_not_served() {
    roles!(play);
    if !support::is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = broker(folder.path());
    for (groups, is_served) in [(MAX_GROUPS, true), (MAX_GROUPS + 1, false), (65_536, false)] {
        let mut other = Other::start(&broker.address, format!("groups {groups}"), 0);
        let said = other.hear("served");
        assert_eq!(said == "it is served", is_served, "{groups} groups: {said}");
    }
}

#[test]
fn users_that_connect_as_often_as_they_can_leave_places_for_others() {
    roles!(play);
    all_is_taken_and_others_are_served("connections", 1);
}

#[test]
fn users_that_have_slots_made_as_often_as_they_can_leave_descriptors_for_others() {
    roles!(play);
    all_is_taken_and_others_are_served("slots", 16);
}
