//! What each step of a message costs on one processor, with everything in its cache: so that a
//! regression is found without a second processor. `cargo bench -p fbuf-client --bench path`.
//!
//! Both ends live in this thread. What two processes do to each other's caches shows in `fbuf bench`.

use std::cell::RefCell;

use divan::{Bencher, black_box};
use fbuf_broker::Embedded;
use fbuf_client::{Client, Fbuf, Received, Receiver, Sender, Wait};

fn main() {
    divan::main();
}

/// Steps of one kind before those of the next.
const BURST: usize = 32;

/// Both ends of a channel.
struct Path {
    sender: Sender,
    receiver: Receiver,
    _broker: Embedded,
}

impl Path {
    fn new() -> Self {
        let broker = Embedded::start().expect("a broker");
        let client = Client::connect_to(broker.address()).expect("a connection");
        let mut receiver = client.receiver("bench").wait(Wait::Spin).open().expect("a receiver");
        let sender = client.sender("bench").slot_size(64).slots(2 * BURST).wait(Wait::Spin);
        let mut sender = sender.open().expect("a sender");
        while sender.receivers() == 0 {
            sender.poll_events();
            assert!(receiver.try_get().expect("no end").is_none());
        }
        Self { sender, receiver, _broker: broker }
    }

    fn allocate(&mut self) -> Vec<Fbuf> {
        (0..BURST).map(|_| self.sender.allocate().expect("a slot")).collect()
    }

    fn write(&mut self, fbufs: Vec<Fbuf>) {
        for mut fbuf in fbufs {
            fbuf.set_len(8).expect("room");
            black_box(self.sender.write(fbuf)).expect("a receiver");
        }
    }

    fn get(&mut self) -> Vec<Received> {
        (0..BURST).map(|_| self.receiver.get().expect("a message")).collect()
    }
}

/// Times one step, many times; the steps before it are not timed, and neither is dropping what it returns.
fn time<I, O>(bencher: Bencher<'_, '_>, before: impl Fn(&mut Path) -> I, step: impl Fn(&mut Path, I) -> O) {
    let path = RefCell::new(Path::new());
    bencher
        .counter(BURST)
        .with_inputs(|| before(&mut path.borrow_mut()))
        .bench_local_values(|input| step(&mut path.borrow_mut(), input));
}

#[divan::bench(sample_size = 1, sample_count = 10_000)]
fn allocate(bencher: Bencher<'_, '_>) {
    time(bencher, |_| (), |path, ()| path.allocate());
}

#[divan::bench(sample_size = 1, sample_count = 10_000)]
fn write(bencher: Bencher<'_, '_>) {
    let before = |path: &mut Path| {
        // What was written the last time is out of the way.
        while path.receiver.try_get().expect("no end").is_some() {}
        path.allocate()
    };
    time(bencher, before, |path, fbufs| path.write(fbufs));
}

#[divan::bench(sample_size = 1, sample_count = 10_000)]
fn get(bencher: Bencher<'_, '_>) {
    let before = |path: &mut Path| {
        let fbufs = path.allocate();
        path.write(fbufs);
    };
    time(bencher, before, |path, ()| path.get());
}

#[divan::bench(sample_size = 1, sample_count = 10_000)]
fn deallocate(bencher: Bencher<'_, '_>) {
    let before = |path: &mut Path| {
        let fbufs = path.allocate();
        path.write(fbufs);
        path.get()
    };
    time(bencher, before, |_, received| drop(received));
}

#[divan::bench(sample_size = 1, sample_count = 10_000)]
fn all_four(bencher: Bencher<'_, '_>) {
    let step = |path: &mut Path, ()| {
        for _ in 0..BURST {
            let mut fbuf = path.sender.allocate().expect("a slot");
            fbuf.set_len(8).expect("room");
            path.sender.write(fbuf).expect("a receiver");
        }
        for _ in 0..BURST {
            drop(black_box(path.receiver.get()).expect("a message"));
        }
    };
    time(bencher, |_| (), step);
}
