//! Endpoints that tasks of tokio wait for, in both kinds of runtime: nothing is lost, whatever is given up; what is there costs no
//! system call, what is not one wake-up.

mod support;

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use fbuf_client::{
    Abort, AllocateError, AsyncReceiver, AsyncSender, Client, GetError, Receiver, Sender, WaitError, WriteError,
};
use futures_util::{SinkExt, StreamExt};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    time::{ClockId, clock_gettime},
    unistd::geteuid,
};
use support::{
    SOON, broker,
    calls::system_calls,
    role::{Other, command_of, roles},
};
use tokio::{
    runtime::{Builder, Runtime},
    task::yield_now,
    time::timeout,
};

/// How many messages go there and back.
const MESSAGES: u64 = 3000;

fn runtime(kind: &str) -> Runtime {
    let mut builder = match kind {
        "current thread" => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    builder.enable_all().build().unwrap()
}

const RUNTIMES: [&str; 2] = ["current thread", "threads"];

/// Few slots, so that each side waits for the other.
fn ends(client: &Client, there: &str, back: &str) -> (Sender, Receiver) {
    let receiver = client.receiver(back).open().unwrap();
    let sender = client.sender(there).slot_size(8).slots(2).require_finish().open().unwrap();
    (sender, receiver)
}

/// Each wait is given up after one poll, and begun again.
async fn send(sender: &mut AsyncSender, number: u64) {
    let mut fbuf = match timeout(Duration::ZERO, sender.allocate()).await {
        Ok(fbuf) => fbuf.unwrap(),
        Err(_) => timeout(SOON, sender.allocate()).await.expect("a wake-up was lost").unwrap(),
    };
    fbuf.set_len(8).unwrap();
    fbuf.copy_from_slice(&number.to_ne_bytes());
    sender.write(fbuf).unwrap();
}

async fn get(receiver: &mut AsyncReceiver) -> Result<u64, GetError> {
    let received = match timeout(Duration::ZERO, receiver.get()).await {
        Ok(received) => received,
        Err(_) => timeout(SOON, receiver.get()).await.expect("a wake-up was lost"),
    }?;
    Ok(u64::from_ne_bytes(received[..].try_into().unwrap()))
}

/// What a child does.
fn play(role: &str) {
    match role.split_once(": ") {
        Some(("echo", kind)) => runtime(kind).block_on(async {
            let (sender, receiver) = ends(&Client::connect().unwrap(), "back", "there");
            let (mut sender, mut receiver) = (AsyncSender::new(sender).unwrap(), AsyncReceiver::new(receiver).unwrap());
            sender.wait_for_receivers(1).await.unwrap();
            let echo = async {
                loop {
                    match get(&mut receiver).await {
                        Ok(number) => send(&mut sender, number).await,
                        Err(GetError::Ended) => return,
                        Err(error) => panic!("{error}"),
                    }
                }
            };
            echo.await;
            sender.finish();
        }),
        Some(("messages that are there", count)) => bursts(count.parse().unwrap()),
        None if role == "waits without descriptors" => wait_without_descriptors(),
        _ => {
            let mut sender = Client::connect().unwrap().sender("c").open().unwrap();
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            support::send(&mut sender, b"the last");
            println!("it was sent");
            loop {
                thread::park();
            }
        }
    }
}

#[test]
fn messages_go_there_and_back_between_all_runtimes() {
    roles!(play);
    for theirs in RUNTIMES {
        for ours in RUNTIMES {
            let (broker, client) = broker();
            let (sender, receiver) = ends(&client, "there", "back");
            let mut other = Other::start(broker.address(), format!("echo: {theirs}"), geteuid().as_raw());
            let slept = runtime(ours).block_on(async move {
                let (mut sender, mut receiver) =
                    (AsyncSender::new(sender).unwrap(), AsyncReceiver::new(receiver).unwrap());
                let sends = tokio::spawn(async move {
                    sender.wait_for_receivers(1).await.unwrap();
                    for number in 0..MESSAGES {
                        send(&mut sender, number).await;
                    }
                    sender.wait_for_returns().await.unwrap();
                    let slept = sender.counters().sleeps;
                    sender.finish();
                    slept
                });
                for number in 0..MESSAGES {
                    assert_eq!(get(&mut receiver).await.unwrap(), number);
                }
                assert!(matches!(receiver.get().await, Err(GetError::Ended)));
                [sends.await.unwrap(), receiver.counters().sleeps]
            });
            println!("{ours} with {theirs}: slept {slept:?} times");
            assert!(slept.iter().all(|&times| times > 10), "{ours} with {theirs}: nothing was tested: {slept:?}");
            assert!(other.process.end().success());
        }
    }
}

/// Bursts of messages that are there when they are asked for, in one task.
fn bursts(count: u64) {
    let (_broker, client) = broker();
    runtime("current thread").block_on(async {
        let mut receiver = AsyncReceiver::new(client.receiver("c").open().unwrap()).unwrap();
        let mut sender = AsyncSender::new(client.sender("c").slot_size(8).slots(64).open().unwrap()).unwrap();
        sender.wait_for_receivers(1).await.unwrap();
        for _ in 0..count / 32 {
            for _ in 0..32 {
                let fbuf = sender.allocate().await.unwrap();
                sender.write(fbuf).unwrap();
            }
            for _ in 0..32 {
                receiver.get().await.unwrap();
            }
        }
    });
}

#[test]
fn what_is_there_costs_no_system_call() {
    roles!(play);
    let program = std::env::current_exe().unwrap();
    let calls = [10_000, 500_000].map(|messages| {
        let start = Instant::now();
        let calls = system_calls(&command_of(&program, format!("messages that are there: {messages}")));
        (calls, start.elapsed())
    });
    println!("{calls:?}");
    let [(few, _), (many, time)] = calls;
    assert!(few > 100, "system calls were not counted");
    // A runtime looks at its descriptors after so many polls, and an endpoint at its sockets after so much time. The budget of a task
    // is 128 messages.
    let allowed = few + 2 * (2 * 500_000 / 128) + 4 * time.as_millis() as u64;
    assert!(many < allowed, "{many} calls");
}

#[test]
fn a_task_that_always_finds_something_lets_others_run() {
    let (_broker, client) = broker();
    runtime("current thread").block_on(async {
        let mut receiver = AsyncReceiver::new(client.receiver("c").open().unwrap()).unwrap();
        let mut sender = AsyncSender::new(client.sender("c").slot_size(8).slots(4).open().unwrap()).unwrap();
        sender.wait_for_receivers(1).await.unwrap();
        let turns = Arc::new(AtomicU64::new(0));
        let counter = turns.clone();
        let others = tokio::spawn(async move {
            loop {
                counter.fetch_add(1, Ordering::Relaxed);
                yield_now().await;
            }
        });
        for _ in 0..100_000 {
            let fbuf = sender.allocate().await.unwrap();
            sender.write(fbuf).unwrap();
            receiver.get().await.unwrap();
        }
        others.abort();
        let turns = turns.load(Ordering::Relaxed);
        assert!(turns > 500, "{turns} turns of another task");
    });
}

#[test]
fn a_thousand_endpoints_wait_in_one_runtime() {
    const RECEIVERS: usize = 1000;
    roles!(play);
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let (_broker, client) = broker();
    for kind in RUNTIMES {
        runtime(kind).block_on(async {
            let receivers: Vec<_> =
                (0..RECEIVERS).map(|_| AsyncReceiver::new(client.receiver("c").open().unwrap()).unwrap()).collect();
            let mut sender = AsyncSender::new(client.sender("c").slot_size(8).slots(4).open().unwrap()).unwrap();
            assert_eq!(timeout(SOON, sender.wait_for_receivers(RECEIVERS)).await.unwrap(), Ok(RECEIVERS));
            let tasks: Vec<_> = receivers
                .into_iter()
                .map(|mut receiver| {
                    tokio::spawn(async move {
                        for number in 0..20 {
                            assert_eq!(get(&mut receiver).await, Ok(number));
                        }
                        assert!(matches!(receiver.get().await, Err(GetError::Ended)));
                    })
                })
                .collect();
            for number in 0..20 {
                send(&mut sender, number).await;
            }
            sender.wait_for_returns().await.unwrap();
            sender.finish();
            for task in tasks {
                timeout(SOON, task).await.expect("it was not woken").unwrap();
            }
        });
    }
}

#[test]
fn a_stream_ends_with_its_senders_and_a_sink_that_is_closed_ends_one() {
    let (_broker, client) = broker();
    runtime("threads").block_on(async {
        let mut receiver = AsyncReceiver::new(client.receiver("c").open().unwrap()).unwrap();
        let sender = client.sender("c").slot_size(8).slots(8).require_finish().open().unwrap();
        let mut sender = AsyncSender::new(sender).unwrap();
        sender.wait_for_receivers(1).await.unwrap();
        let fbufs =
            [sender.allocate().await.unwrap(), sender.allocate().await.unwrap(), sender.allocate().await.unwrap()];
        let mut sink = sender.into_sink();
        let [one, other, late] = fbufs;
        sink.feed(one).await.unwrap();
        sink.send(other).await.unwrap();
        sink.close().await.unwrap();
        assert!(matches!(sink.send(late).await, Err(WriteError::NoReceiver { .. })));
        assert!(sink.into_inner().is_none());
        let items: Vec<_> = (&mut receiver).collect().await;
        assert!(
            items.iter().map(|item| item.as_ref().map(|message| message.sequence())).eq([Ok(0), Ok(1)]),
            "{items:?}"
        );
        assert!(receiver.next().await.is_none());

        // One that is not closed has not said that the stream is complete: an error is an item, and no end.
        let mut receiver = AsyncReceiver::new(client.receiver("d").keep_waiting().open().unwrap()).unwrap();
        let mut sender = AsyncSender::new(client.sender("d").require_finish().open().unwrap()).unwrap();
        sender.wait_for_receivers(1).await.unwrap();
        drop(sender.into_sink());
        let item = receiver.next().await.unwrap();
        assert!(matches!(item, Err(GetError::Aborted { reason: Abort::Unfinished, .. })), "{item:?}");
        let mut sender = AsyncSender::new(client.sender("d").open().unwrap()).unwrap();
        sender.wait_for_receivers(1).await.unwrap();
        let fbuf = sender.allocate().await.unwrap();
        sender.write(fbuf).unwrap();
        assert_eq!(timeout(SOON, receiver.next()).await.unwrap().unwrap().unwrap().len(), 0);
    });
}

#[test]
fn a_receiver_that_waits_hears_at_once_of_a_death() {
    roles!(play);
    let (broker, client) = broker();
    runtime("current thread").block_on(async {
        let mut receiver = AsyncReceiver::new(client.receiver("c").open().unwrap()).unwrap();
        let mut other = Other::start(broker.address(), "sender", geteuid().as_raw());
        assert_eq!(timeout(SOON, receiver.get()).await.unwrap().unwrap()[..], *b"the last");
        other.hear("it was sent");
        let killer = tokio::task::spawn_blocking(move || other.process.kill());
        let end = timeout(SOON, receiver.get()).await.expect("it was not woken");
        assert!(matches!(end, Err(GetError::Disconnected { .. })), "{end:?}");
        killer.await.unwrap();
    });
}

#[test]
fn a_lossy_sender_does_not_wait_in_a_task_either() {
    let (_broker, client) = broker();
    runtime("current thread").block_on(async {
        let mut sender = AsyncSender::new(client.sender("c").slots(2).lossy().open().unwrap()).unwrap();
        let _held = [sender.allocate().await.unwrap(), sender.allocate().await.unwrap()];
        assert_eq!(sender.allocate().await.unwrap_err(), AllocateError::WouldWait { slots: 2 });
    });
}

/// Polls a future once, on a thread that is in no runtime.
fn poll_once<T>(future: impl Future<Output = T>) -> Poll<T> {
    pin!(future).poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn without_a_runtime_no_endpoint_waits_and_in_another_one_it_goes_on() {
    let (_broker, client) = broker();
    let error = AsyncReceiver::new(client.receiver("c").open().unwrap()).unwrap_err();
    assert!(error.to_string().contains("no reactor"), "{error}");
    let first = runtime("current thread");
    let (mut receiver, mut sender) = first.block_on(async {
        let mut receiver = AsyncReceiver::new(client.receiver("c").open().unwrap()).unwrap();
        let mut sender = AsyncSender::new(client.sender("c").slots(1).open().unwrap()).unwrap();
        sender.wait_for_receivers(1).await.unwrap();
        assert!(timeout(Duration::ZERO, receiver.get()).await.is_err());
        (receiver, sender)
    });
    drop(first);
    let fbuf = loop {
        if let Poll::Ready(fbuf) = poll_once(sender.allocate()) {
            break fbuf.unwrap();
        }
    };
    let waiting = loop {
        if let Poll::Ready(result) = poll_once(receiver.get()) {
            break result.unwrap_err();
        }
    };
    assert!(matches!(waiting, GetError::RuntimeEnded(_)), "{waiting}");
    assert!(matches!(poll_once(sender.wait_for_receivers(2)), Poll::Ready(Err(WaitError::RuntimeEnded(_)))));
    assert!(waiting.to_string().contains("tokio runtime that watched this endpoint has ended"), "{waiting}");
    // One without I/O cannot watch anything, and is not asked to.
    let without = Builder::new_current_thread().enable_time().build().unwrap();
    assert!(matches!(without.block_on(receiver.get()), Err(GetError::RuntimeEnded(_))));
    runtime("threads").block_on(async {
        let mut receiver = AsyncReceiver::new(receiver.into_inner()).unwrap();
        let mut sender = AsyncSender::new(sender.into_inner()).unwrap();
        let gets = tokio::spawn(async move {
            timeout(SOON, receiver.get()).await.expect("it was not woken").unwrap();
        });
        sender.write(fbuf).unwrap();
        gets.await.unwrap();
        timeout(SOON, sender.allocate()).await.expect("it was not woken").unwrap();
    });
}

/// A task may be dropped at each `await`.
#[test]
fn a_sender_that_is_dropped_with_its_task_has_broken_its_stream_off() {
    let (_broker, client) = broker();
    runtime("threads").block_on(async {
        let mut receiver = AsyncReceiver::new(client.receiver("c").open().unwrap()).unwrap();
        let mut sender = AsyncSender::new(client.sender("c").slots(1).open().unwrap()).unwrap();
        sender.wait_for_receivers(1).await.unwrap();
        let sends = tokio::spawn(async move {
            loop {
                let fbuf = sender.allocate().await.unwrap();
                sender.write(fbuf).unwrap();
            }
        });
        let held = receiver.get().await.unwrap();
        sends.abort();
        let end = timeout(SOON, receiver.get()).await.expect("it was not woken");
        assert!(matches!(end, Err(GetError::Aborted { reason: Abort::Unfinished, .. })), "{end:?}");
        drop(held);
        // Taken out it is as it was opened.
        let mut receiver = client.receiver("d").open().unwrap();
        let mut sender = AsyncSender::new(client.sender("d").open().unwrap()).unwrap();
        sender.wait_for_receivers(1).await.unwrap();
        drop(sender.into_inner());
        assert!(matches!(receiver.get_timeout(SOON), Err(GetError::Ended)));
    });
}

fn wait_without_descriptors() {
    let (_broker, client) = broker();
    runtime("current thread").block_on(async {
        let mut receiver = client.receiver("c").open().unwrap();
        let sender = client.sender("c").slots(1).disconnect_after(SOON);
        let mut sender = AsyncSender::new(sender.open().unwrap()).unwrap();
        sender.wait_for_receivers(1).await.unwrap();
        let fbuf = sender.allocate().await.unwrap();
        sender.write(fbuf).unwrap();
        let _held = receiver.get_timeout(SOON).unwrap();
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 0, most).unwrap();
        let time = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
        let before = time();
        assert!(timeout(Duration::from_secs(1), sender.allocate()).await.is_err());
        let used = time() - before;
        assert!(used < Duration::from_millis(100), "{used:?} of a second");
        println!("it slept");
    });
}

#[test]
fn a_task_sleeps_although_no_descriptor_is_left() {
    roles!(play);
    let (broker, _client) = broker();
    let mut other = Other::start(broker.address(), "waits without descriptors", geteuid().as_raw());
    other.hear("it slept");
    assert!(other.process.end().success());
}
