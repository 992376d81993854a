//! Three senders and three receivers share channels at every level of protection, or as many as there may be where slots
//! are the receiver's, and one of them is killed at a time, over and over: from outside at a random instruction, or from
//! inside at a point that has a name.
//! After each kill, the processes that are left have all that they are owed, in order and unchanged; every slot is
//! back in its pool; and processes hold what they held before.
//!
//! `FBUF_KILLS=20000 cargo test --release -p fbuf-cli --features points --test kill_matrix -- --nocapture` makes a longer run.

mod actor;
mod exchange;
#[path = "../support/mod.rs"]
mod support;
mod survivors;

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
};

use actor::{Actor, Role};
use exchange::Level;
use fbuf_core::points;
use nix::{sys::signal::Signal, unistd::geteuid};
use support::{BrokerProcess, Holdings, Memory, Random, role::roles, settled, until, until_is};
use survivors::Survivors;

/// How often somebody is killed, if `FBUF_KILLS` says nothing else.
const KILLS: u64 = 2000;
/// How many steps the other processes make before they kill one that has not died.
const PATIENCE: u64 = 60;
/// How many KiB more a process that goes on may have, after any kill, than it had after the first ones: what allocators
/// keep, and pages that were not used before.
const MEMORY: u64 = 1 << 10;
/// After how many rounds that is noted, and, every time, what is charged.
const ROUNDS: u64 = 100;

#[test]
fn whoever_is_killed_costs_the_others_nothing() {
    roles!(actor::act);
    let kills = env::var("FBUF_KILLS").map_or(KILLS, |text| text.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let (broker, metrics) = BrokerProcess::start_with_metrics(&folder.path().join("broker"), |_| {});
    let broker = broker.forget_log();
    let used = || metrics.used_by(geteuid().as_raw());
    let files = files(folder.path());
    let mut survivors = Survivors::start(&broker.address);
    let paid = used();
    let mut random = Random(kills);
    let processes = [std::process::id(), broker.process.pid()];
    let holdings = || processes.map(Holdings::of);
    let memory = || processes.map(Memory::of);
    let (mut before, mut early) = (None, None::<[Memory; 2]>);
    let mut deaths: BTreeMap<&str, u64> = BTreeMap::new();
    let mut owed = Level::ALL.map(|_| 0);
    let mut every_point = points::ENDPOINTS.iter().cycle();
    // Two in each round: one where chance has it, and the other one when it has shown that it lacks nothing.
    for round in 0..kills / 2 {
        let point = if random.below(3) > 0 { every_point.next().copied() } else { None };
        // Most get to a point within 30 steps, if they do at all.
        let patience = if point.is_some() { PATIENCE } else { random.below(PATIENCE) };
        // What is rare is not waited for again and again.
        let most = match point.map(part_of) {
            Some("attach" | "end") => 4,
            Some("growth") => 8,
            _ => 40,
        };
        let count = if random.below(2) == 0 { 0 } else { random.below(most) };
        let either = if random.below(2) == 0 { Role::Sender } else { Role::Receiver };
        let victim = point.and_then(Role::of).unwrap_or(either);
        let mut other = Actor::start(victim.other(), &broker.address, None);
        let mut victim = Actor::start(victim, &broker.address, point.map(|point| (point, count)));
        let died = (0..patience).any(|_| {
            survivors.step(&mut random);
            victim.has_died()
        });
        if !died {
            victim.kill();
        }
        *deaths.entry(point.filter(|_| died).unwrap_or("from outside")).or_default() += 1;
        survivors.mourn(victim.pid());
        survivors.get(victim.owed());
        victim.owed().keys().for_each(|&(level, _)| owed[level] += 1);
        other.check();
        survivors.settle(Some((&mut other, victim.owed())));
        other.kill();
        survivors.mourn(other.pid());
        survivors.get(other.owed());
        survivors.forget();
        survivors.settle(None);
        let before = *before.get_or_insert_with(|| settled(holdings));
        // The broker hears of a death a moment later, and may have introduced a process that was dead by then.
        until_is(&format!("round {round}, {point:?} after {count}"), &before, || {
            survivors.settle(None);
            holdings()
        });
        assert_eq!(self::files(folder.path()), files, "something is left");
        if round % ROUNDS == 0 {
            until_is("what is charged", &paid, used);
        }
        let now = memory();
        if round == ROUNDS.min(kills / 4) {
            early = Some(now);
        }
        for (now, early) in now.iter().zip(early.iter().flatten()) {
            let most = |early| early + MEMORY;
            let is_more = now.private > most(early.private) || now.shared > most(early.shared);
            assert!(!is_more, "round {round}: memory grew from {early} to {now}");
        }
    }
    let [early, late] = [early.unwrap(), memory()].map(|memory| memory.map(|of_one| of_one.to_string()));
    println!("{kills} kills: {deaths:#?}\nprivate and shared memory, of this process and the broker:");
    println!("{early:?} early, {late:?} late");
    let leased = [Level::Leased, Level::OfJudge].map(|level| survivors.leased(level));
    drop(survivors);
    until_is("what is charged in the end", &Vec::new(), used);
    assert!(!owed.contains(&0) && !leased.contains(&0), "{owed:?} were owed, and {leased:?} leased");
    // Not everybody gets to every point before dying of something else; but in a long run somebody does.
    let missing: Vec<_> = points::ENDPOINTS.iter().filter(|point| !deaths.contains_key(*point)).collect();
    let few = if kills >= 10 * KILLS { 0 } else { points::ENDPOINTS.len() / 4 };
    assert!(kills < KILLS || missing.len() <= few, "nobody died at {missing:?}");
    let parts = |points: &[&str]| points.iter().map(|point| part_of(point).to_owned()).collect::<BTreeSet<_>>();
    let died: Vec<_> = deaths.keys().copied().filter(|point| point.contains(':')).collect();
    assert!(kills < KILLS || parts(&died) == parts(&points::ENDPOINTS), "a part of the work was left out: {missing:?}");
}

/// The part of the work that a point is in.
fn part_of(point: &str) -> &str {
    point.split(':').next().unwrap_or(point)
}

/// What is in file systems where something could be left, and could be of fbuf.
fn files(own: &Path) -> BTreeSet<PathBuf> {
    let entries = |folder: &Path| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let shared = entries(Path::new("/dev/shm")).chain(entries(&env::temp_dir()));
    shared.filter(|path| path.to_string_lossy().contains("fbuf")).chain(entries(own)).collect()
}

/// A broker that dies at any step of an attach, and comes back: the client attaches in the end.
#[test]
fn a_broker_that_dies_while_somebody_attaches_keeps_nobody_for_ever() {
    for point in points::BROKER {
        for count in 0..6 {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("broker");
            let mut broker = BrokerProcess::start_with(&path, |command| {
                command.env("FBUF_DIE_AT", format!("{count} {} {point}", Signal::SIGKILL));
            });
            let address = broker.address.clone();
            let attaching = std::thread::spawn(move || actor::attach(&address));
            // It dies of its own, unless the point is not passed so often.
            until("the broker dies, or all attach", || attaching.is_finished() || broker.process.has_ended());
            let died = broker.process.has_ended();
            assert!(died || count > 0, "the broker did not get to {point}");
            let _next = died.then(|| BrokerProcess::start(&path));
            let connections = attaching.join().unwrap();
            println!("{point}, {count} times before: died {died}, {connections} tries to connect");
        }
    }
}
