//! What a stream costs while both sides are busy: no system calls for messages. And while nothing
//! happens: no processor time.

mod support;

use std::time::{Duration, Instant};

use fbuf_broker::Embedded;
use fbuf_client::{Client, GetError, Wait};
use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime},
};
use support::{calls::system_calls, fbuf};

/// Streams so many messages of 64 bytes between two processes and counts the system calls of both.
fn calls_of_stream(messages: u64) -> u64 {
    let demo = ["demo", "--over", "fbuf", "--wait", "spin", "--message", "64", "--bytes"].map(str::to_owned);
    system_calls(&fbuf(demo.into_iter().chain([(messages * 64).to_string()])))
}

#[test]
fn the_number_of_system_calls_does_not_depend_on_the_number_of_messages() {
    // On Linux, children of other threads' tests would be waited for as well: this is the only test
    // of this binary that has children.
    let mut counted = Vec::new();
    for messages in [1_000_000, 4_000_000] {
        let start = Instant::now();
        let calls = calls_of_stream(messages);
        let time = start.elapsed();
        println!("{messages} messages: {calls} system calls in {time:?}");
        // Starting two processes takes some hundreds. Whoever waits looks around once a millisecond,
        // with a call or two, so a slow machine makes more of them; messages make none.
        let allowed = 2_000 + 4 * time.as_millis() as u64;
        assert!(calls < allowed, "{calls} system calls for {messages} messages in {time:?}");
        counted.push(calls);
    }
    let one = counted[0];
    assert!(one > 100, "system calls were not counted");
}

/// Processor time of this thread.
fn processor_time() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap_or(TimeSpec::new(0, 0)))
}

#[test]
fn an_idle_receiver_uses_no_processor_time() {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    for wait in [Wait::Adaptive, Wait::Block] {
        let mut receiver = client.receiver("c").wait(wait).keep_waiting().open().unwrap();
        let mut sender = client.sender("c").open().unwrap();
        sender.wait_for_receivers(1).unwrap();
        let before = processor_time();
        let time = Duration::from_secs(2);
        assert_eq!(receiver.get_timeout(time).unwrap_err(), GetError::TimedOut);
        let used = processor_time() - before;
        assert!(used < time / 100, "{wait:?}: {used:?} of processor time in {time:?}");
        assert!(receiver.counters().sleeps <= 3, "{:?}", receiver.counters());
    }
}

#[test]
fn an_idle_sender_uses_no_processor_time() {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let _receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slots(1).open().unwrap();
    sender.wait_for_receivers(1).unwrap();
    let fbuf = sender.allocate().unwrap();
    sender.write(fbuf).unwrap();
    let before = processor_time();
    let time = Duration::from_secs(2);
    sender.allocate_timeout(time).unwrap_err();
    let used = processor_time() - before;
    assert!(used < time / 100, "{used:?} of processor time in {time:?}");
    assert!(sender.counters().sleeps <= 3, "{:?}", sender.counters());
}

#[test]
fn a_message_allocates_nothing() {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut skipped = client.receiver("c").max_backlog(4).open().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(16).open().unwrap();
    sender.wait_for_receivers(2).unwrap();
    let mut exchange = |rounds: u64| {
        for round in 0..rounds {
            // Now some messages at once, now one; sometimes the pool runs low.
            for n in 0..=round % 8 {
                let mut fbuf = sender.allocate().unwrap();
                fbuf.set_len(8).unwrap();
                fbuf.copy_from_slice(&n.to_ne_bytes());
                sender.write(fbuf).unwrap();
            }
            for n in 0..=round % 8 {
                assert_eq!(receiver.get().unwrap()[..], n.to_ne_bytes());
            }
            while let Some(received) = skipped.try_get().unwrap() {
                drop(received);
            }
        }
    };
    exchange(100);
    let counts = allocation_counter::measure(|| drop(std::hint::black_box(Box::new(1)))).count_total;
    assert_eq!(counts, 1, "allocations are not counted");
    // Of this thread only: the control thread and the broker have their own lives.
    let counted = allocation_counter::measure(|| exchange(50_000));
    assert_eq!(counted.count_total, 0, "{counted:?}");
}
