//! What the library says is the case: a wait sleeps, a message that is reported as sent had a receiver, and the end
//! of a stream is told from its failure.

mod support;

use std::{
    io::Write,
    time::{Duration, Instant},
};

use fbuf_broker::Embedded;
use fbuf_client::{Client, Sender, Wait, WaitError};
use nix::time::{ClockId, clock_gettime};
use support::SOON;

fn broker() -> (Embedded, Client) {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    (broker, client)
}

fn send(sender: &mut Sender, text: &[u8]) -> u64 {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.write_all(text).unwrap();
    sender.write(fbuf).unwrap().sequence
}

/// How much processor time this thread has used.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

#[test]
fn a_wait_for_returns_sleeps_although_an_fbuf_was_dropped_unsent() {
    const TIME: Duration = Duration::from_millis(500);
    let (_broker, client) = broker();
    let spent = |wait, unsent| {
        let mut receiver = client.receiver("c").open().unwrap();
        let mut sender = client.sender("c").slot_size(8).slots(4).wait(wait).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        send(&mut sender, b"kept");
        let _kept = receiver.get_timeout(SOON).unwrap();
        for _ in 0..unsent {
            drop(sender.allocate_timeout(SOON).unwrap());
        }
        let (before, start) = (processor_time(), Instant::now());
        assert_eq!(sender.wait_for_returns_timeout(TIME), Err(WaitError::StillLent { slots: 1 }));
        assert!(start.elapsed() >= TIME);
        processor_time() - before
    };
    // What a wait costs that looks all the time, as far as this machine lets it.
    let spinning = spent(Wait::Spin, 1);
    for wait in [Wait::Block, Wait::Adaptive] {
        for unsent in [0, 1, 3] {
            let sleeping = spent(wait, unsent);
            assert!(
                sleeping < spinning / 10,
                "{wait:?}, {unsent} dropped unsent: {sleeping:?} of processor time; spinning takes {spinning:?}"
            );
        }
    }
}
