//! Processes that are killed at random moments cost their peers nothing but their link.

mod support;

use std::{
    fs,
    process::Stdio,
    sync::{Mutex, PoisonError},
    thread,
};

use fbuf_broker::Embedded;
use fbuf_client::{Client, DisconnectReason, GetError, Wait};
use support::{Holdings, Process, Random, SOON, fbuf, settled, until_is};

/// Both tests count what this process holds, so they take turns.
static TURN: Mutex<()> = Mutex::new(());

const ROUNDS: u64 = 120;
const SLOTS: u64 = 16;

/// Compares what this process holds, the broker in it included, with what it held after the first
/// round. The broker closes the connection of a dead client when its thread gets to it.
fn nothing_kept(round: u64, before: &mut Option<Holdings>) {
    match *before {
        Some(before) => until_is(&format!("round {round}"), &before, Holdings::here),
        None => *before = Some(settled(Holdings::here)),
    }
}

#[test]
fn a_receiver_that_is_killed_costs_nothing() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let broker = Embedded::start().unwrap();
    let address = broker.address().to_string();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut random = Random(1);
    let mut sender = client.sender("kill").slot_size(64).slots(SLOTS as usize).open().unwrap();
    let mut survivor = client.receiver("kill").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let survivor = thread::spawn(move || {
        let mut next = 0u64;
        loop {
            match survivor.get_timeout(SOON) {
                Ok(received) => {
                    assert_eq!(received.sequence(), next);
                    assert_eq!(received[..], next.to_ne_bytes());
                    next += 1;
                }
                Err(GetError::Ended) => return next,
                Err(error) => panic!("{error}"),
            }
        }
    });
    let mut sent = 0u64;
    let mut before = None;
    for round in 0..ROUNDS {
        let wait = ["spin", "adaptive", "block"][random.below(3) as usize];
        let mut command = fbuf(["recv", "kill", "/dev/null", "--socket", &address, "--wait", wait]);
        let mut victim = Process::start(&mut command);
        sender.wait_for_receivers_timeout(2, SOON).unwrap();
        let death = random.below(1000);
        let mut died = false;
        let mut messages = 0;
        while !died {
            if messages == death {
                victim.kill();
            }
            let mut fbuf = sender.allocate_timeout(SOON).unwrap();
            fbuf.set_len(8).unwrap();
            fbuf.copy_from_slice(&sent.to_ne_bytes());
            assert_eq!(sender.write(fbuf).unwrap().sequence, sent);
            sent += 1;
            messages += 1;
            if messages > death {
                sender.poll_events();
            }
            while let Some(departure) = sender.next_departure() {
                assert_eq!(departure.peer.process.pid as u32, victim.pid());
                assert_eq!(departure.reason, DisconnectReason::Died);
                died = true;
            }
        }
        sender.wait_for_returns_timeout(SOON).unwrap();
        let counters = sender.counters();
        assert_eq!(counters.slots.free as u64, SLOTS, "round {round}: {counters:?}");
        assert_eq!(counters.receivers, 1);
        nothing_kept(round, &mut before);
    }
    drop(sender);
    assert_eq!(survivor.join().unwrap(), sent);
}

#[test]
fn a_sender_that_is_killed_is_heard_to_its_last_message() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let broker = Embedded::start().unwrap();
    let address = broker.address().to_string();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut random = Random(2);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    let data = random.bytes(4 << 20);
    fs::write(&path, &data).unwrap();
    let mut receiver = client.receiver("kill").keep_waiting().wait(Wait::Adaptive).open().unwrap();
    let mut before = None;
    let mut deaths = 0;
    for round in 0..ROUNDS {
        let size = ["100", "4096", "65536"][random.below(3) as usize];
        let wait = ["spin", "adaptive", "block"][random.below(3) as usize];
        let arguments = ["send", "kill", "--socket", &address, "--slot-size", size, "--wait", wait, "--slots", "8"];
        let mut command = fbuf(arguments);
        let mut victim = Process::start(command.arg(&path).stderr(Stdio::null()));
        let death = random.below(200);
        let (mut heard, mut messages) = (0, 0);
        let error = loop {
            match receiver.get_timeout(SOON) {
                Ok(received) => {
                    assert_eq!(received.sequence(), messages);
                    assert!(received[..] == data[heard..heard + received.len()], "round {round}: wrong bytes");
                    heard += received.len();
                    if messages == death {
                        victim.kill();
                    }
                    messages += 1;
                }
                Err(error) => break error,
            }
            if heard == data.len() {
                // It ended before its time came; kill it somewhere in its end.
                victim.kill();
                match receiver.get_timeout(std::time::Duration::from_millis(50)) {
                    Err(error) => break error,
                    Ok(received) => panic!("{} bytes too many", received.len()),
                }
            }
        };
        match error {
            GetError::Disconnected { peer } => {
                assert_eq!(peer.process.pid as u32, victim.pid());
                deaths += 1;
            }
            // It had ended in order, a moment before it was killed.
            GetError::TimedOut => assert_eq!(heard, data.len()),
            error => panic!("round {round}: {error}"),
        }
        assert_eq!(receiver.senders(), 0);
        nothing_kept(round, &mut before);
    }
    assert!(deaths > ROUNDS / 2, "only {deaths} senders died in the middle");
}

#[test]
fn a_death_is_heard_while_another_sender_is_busy() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("kill").open().unwrap();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let busy = {
        let (client, stop) = (client.clone(), stop.clone());
        thread::spawn(move || {
            let mut sender = client.sender("kill").slot_size(8).slots(64).open().unwrap();
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let fbuf = sender.allocate_timeout(SOON).unwrap();
                sender.write(fbuf).unwrap();
            }
        })
    };
    let address = broker.address().to_string();
    let mut command = fbuf(["send", "kill", "--socket", &address]);
    let mut victim = Process::start(command.stdin(Stdio::piped()));
    std::io::Write::write_all(victim.0.stdin.as_mut().unwrap(), b"x").unwrap();
    let mut killed = false;
    let peer = loop {
        match receiver.get_timeout(SOON) {
            Ok(received) if received.sender().process.pid as u32 == victim.pid() => {
                victim.kill();
                killed = true;
            }
            Ok(_) => {}
            Err(GetError::Disconnected { peer }) => break peer,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(killed && peer.process.pid as u32 == victim.pid());
    assert_eq!(receiver.senders(), 1);
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    while receiver.get_timeout(SOON).is_ok() {}
    busy.join().unwrap();
}
