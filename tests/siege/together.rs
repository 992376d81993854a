//! Several processes of two users that work together: each takes as much of something as it gets, and asks for more for
//! ever. Another user attaches all the same, and so does root.

use std::io::{self, Read};

use fbuf_core::{
    limits::{MAX_ENDS_OF_USER, MAX_LEASED},
    protection::Mechanism,
};
use fbuf_protocol::{Refusal, Resource, Role, Slots};

use super::*;
use crate::{
    attacker::{RECEIVER, SENDER, over_and_over},
    caller::{Caller, Effect, Seen},
};

const GREEDY: [u32; 2] = [65_533, 65_532];
/// A user that comes later.
const LATER: u32 = 65_531;
/// How often that one attaches.
const TIMES: usize = 5;
/// How many descriptors the broker may have.
const DESCRIPTORS: u64 = 700;
/// What each of two processes of each user takes.
const TAKEN: [&str; 4] = ["places", "slots", "introductions", "ends"];
/// What each says before it is told to go on.
const READY: &str = "it is connected";
/// What the later user says each time.
const ATTACHED: &str = "it has attached";

/// Is one of the processes, until it is killed.
pub fn be(role: &str) -> ! {
    let (mut callers, mut taken) = (Vec::new(), 0);
    if role != "later" {
        // All have a place before the others are taken.
        callers.push(Caller::join().unwrap());
        println!("{READY}");
        io::stdin().read_to_end(&mut Vec::new()).unwrap();
    }
    match role {
        "places" => over_and_over(|| take_places(&mut callers)),
        "slots" => over_and_over(|| take_slots(&callers, &mut taken)),
        "introductions" => over_and_over(|| take_introductions(&callers, &mut taken)),
        "ends" => over_and_over(|| take_ends(&callers, &mut taken)),
        "later" => (0..TIMES).for_each(|_| attach_beside()),
        other => panic!("no such role: {other}"),
    }
    loop {
        thread::park();
    }
}

/// Whether more is refused since the user has its share.
fn is_share(refusal: &Refusal, resource: Resource) -> Seen {
    let so =
        matches!(refusal, Refusal::QuotaExceeded(spent) if spent.resource == resource && spent.rule.contains("share"));
    Effect::if_so(so, || refusal.to_string())
}

/// Connects until it is sent away.
fn take_places(callers: &mut Vec<Caller>) -> Seen {
    while let Some(caller) = Caller::try_to_join()? {
        callers.push(caller);
    }
    Effect::if_so(true, String::new)
}

fn take_slots(callers: &[Caller], taken: &mut u64) -> Seen {
    let slots = Slots::Broker { huge: false };
    let role = Role::sender(64, MAX_LEASED.into(), Mechanism::Lease, slots);
    loop {
        *taken += 1;
        match callers[0].open(*taken, &format!("slots-{}", std::process::id()), role)? {
            Some(Ok(())) => {}
            Some(Err(refusal)) => return is_share(&refusal, Resource::Descriptors),
            None => return Err("the broker hangs up".into()),
        }
    }
}

/// Links ends of its own, and never reads of it: what has no descriptor waits.
fn take_introductions(callers: &[Caller], taken: &mut u64) -> Seen {
    let channel = format!("unread-{}", std::process::id());
    while *taken < MAX_ENDS_OF_USER as u64 {
        let role = if taken.is_multiple_of(2) { SENDER } else { RECEIVER };
        let opened = callers[0].open(*taken, &channel, role)?;
        Effect::if_so(opened == Some(Ok(())), || format!("to open: {opened:?}"))?;
        *taken += 1;
    }
    let apart = callers[0].unpaired(*taken - 1)?;
    Effect::if_so(apart.iter().any(|one| one.why.passes()), || format!("all are linked: {apart:?}"))
}

/// Opens ends of both kinds of the channel that honest ones use.
fn take_ends(callers: &[Caller], taken: &mut u64) -> Seen {
    let mut refused = 0;
    while refused < 2 {
        *taken += 1;
        let role = if taken.is_multiple_of(2) { SENDER } else { RECEIVER };
        match callers[0].open(*taken, "c", role)? {
            Some(Ok(())) => refused = 0,
            Some(Err(Refusal::Share { .. })) => refused += 1,
            other => return Err(format!("to open: {other:?}")),
        }
    }
    Effect::if_so(true, String::new)
}

/// Is linked on a channel of its own, and receives on the one that is crowded.
fn attach_beside() {
    let client = Client::connect().unwrap();
    let mut sender = client.sender("later").slot_size(8).slots(2).open().unwrap();
    let mut receiver = client.receiver("later").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let fbuf = sender.allocate_timeout(SOON).unwrap();
    sender.write(fbuf).unwrap();
    receiver.get_timeout(SOON).unwrap();
    let mut crowded = client.receiver("c").max_backlog(1 + HONEST_SLOTS / 2).keep_waiting().open().unwrap();
    loop {
        match crowded.get_timeout(SOON) {
            Ok(received) if received.sender().process.uid == 0 => break println!("{ATTACHED}"),
            Ok(_) | Err(GetError::Disconnected { .. } | GetError::PeerViolation { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn two_users_together_keep_no_third_from_the_broker() {
    roles!(play);
    if !is_root() {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_short(folder.path(), DESCRIPTORS, GREEDY.into_iter().chain([LATER]));
    let client = Client::connect_to(&broker.address).unwrap();
    let mut honest = Honest::begin(&client);
    honest.exchange();
    // A thread that drops what may take long ends a moment after it has.
    let before = settled(|| Holdings::of(broker.process.pid()));
    let mut greedy = Vec::new();
    for taken in TAKEN {
        for user in GREEDY {
            greedy.extend((0..2).map(|_| Attacker::start(taken, user, &broker)));
        }
    }
    let start = Instant::now();
    let mut wait_for_all = |greedy: &[Attacker], words: &[&str]| {
        let mut idle: Vec<_> = (0..greedy.len()).collect();
        while !idle.is_empty() {
            honest.exchange();
            idle.retain(|&index| greedy[index].count(TAKEN[index / 4], words) == 0);
            assert!(start.elapsed() < SOON, "these have not said {words:?}: {idle:?}");
        }
    };
    wait_for_all(&greedy, &[READY]);
    greedy.iter_mut().for_each(|one| drop(one.process.0.stdin.take()));
    wait_for_all(&greedy, &[attacker::BEGUN]);
    // The last part is root's.
    let open = Holdings::of(broker.process.pid()).descriptors as u64;
    assert!(open < DESCRIPTORS - DESCRIPTORS / 20, "{open} descriptors are open");
    assert!(open > DESCRIPTORS / 3, "{open} descriptors are open: nobody was greedy");
    let later = Attacker::start("later", LATER, &broker);
    let mut attached = 0;
    while attached < TIMES {
        honest.exchange();
        attach(&broker);
        attached += later.said.try_iter().filter(|line| line.contains(ATTACHED)).count();
        assert!(start.elapsed() < 2 * SOON, "the later user has attached {attached} times");
        for (index, one) in greedy.iter_mut().enumerate() {
            let ended = one.process.has_ended();
            one.effects(TAKEN[index / 4]);
            assert!(!ended, "one that takes {} has ended", TAKEN[index / 4]);
        }
    }
    greedy.into_iter().chain([later]).for_each(Attacker::kill);
    until_is("the broker", &before, || {
        honest.look();
        Holdings::of(broker.process.pid())
    });
}
