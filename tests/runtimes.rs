//! Wherever a program calls from: on the threads of an async runtime, in tasks, in destructors of thread-locals, and
//! while the process exits.

mod support;

use std::{
    cell::RefCell,
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    process::{Command, Stdio},
    sync::{Mutex, OnceLock, mpsc},
    thread,
};

use fbuf_broker::Embedded;
use fbuf_client::{Client, GetError, OpenError, Peer, Receiver, Sender};
use support::{Run, SOON};
use tokio::runtime::{Builder, Runtime};

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// All that may block or join a thread: a broker, a connection, a message, and the drop of each.
fn use_everything() {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(2).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let fbuf = sender.allocate_timeout(SOON).unwrap();
    sender.write(fbuf).unwrap();
    drop(receiver.get_timeout(SOON).unwrap());
    assert_eq!(client.status().unwrap().len(), 2);
    drop(sender);
    assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    drop((receiver, client));
    // Without a broker, connecting fails in words.
    let address = broker.address().clone();
    drop(broker);
    assert!(Client::connect_to(&address).unwrap_err().to_string().contains("there is no broker"));
}

#[test]
fn a_runtime_cannot_run_another_on_its_threads() {
    // What these tests are about: the obvious way to connect panics there.
    let panicked = catch_unwind(|| current_thread().block_on(async { current_thread().block_on(async {}) }));
    assert!(panicked.is_err());
}

#[test]
fn everything_works_in_async_functions_of_either_runtime() {
    for runtime in [current_thread(), multi_thread()] {
        runtime.block_on(async { use_everything() });
    }
}

#[test]
fn everything_works_in_spawned_tasks() {
    for runtime in [current_thread(), multi_thread()] {
        runtime.block_on(async { tokio::spawn(async { use_everything() }).await.unwrap() });
        runtime.block_on(async { tokio::task::spawn_blocking(use_everything).await.unwrap() });
    }
}

#[test]
fn what_a_task_owns_is_dropped_with_its_runtime() {
    for runtime in [current_thread(), multi_thread()] {
        let broker = Embedded::start().unwrap();
        let client = Client::connect_to(broker.address()).unwrap();
        let mut sender = client.sender("c").open().unwrap();
        let mut receiver = client.receiver("c").open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        runtime.spawn(async move {
            let _owned = (broker, client, sender);
            std::future::pending::<()>().await;
        });
        runtime.block_on(tokio::task::yield_now());
        drop(runtime);
        assert_eq!(receiver.get_timeout(SOON).unwrap_err(), GetError::Ended);
    }
}

thread_local! {
    static LOCAL: RefCell<Option<AtTheEnd>> = const { RefCell::new(None) };
}

/// Uses everything when it is dropped.
struct AtTheEnd(std::sync::mpsc::Sender<()>);

impl Drop for AtTheEnd {
    fn drop(&mut self) {
        use_everything();
        self.0.send(()).unwrap();
    }
}

#[test]
fn everything_works_in_the_destructor_of_a_thread_local() {
    let (done, end) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        // Before and after the thread-locals of others are gone: those that come first go last.
        LOCAL.with(|local| *local.borrow_mut() = Some(AtTheEnd(done)));
        use_everything();
    });
    thread.join().unwrap();
    end.recv().expect("it ended without a panic");
}

/// All that a process can have open.
type Everything = (Embedded, Client, Sender, Receiver);

static KEPT: OnceLock<Mutex<Option<Everything>>> = OnceLock::new();

extern "C" fn at_exit() {
    drop(KEPT.get().unwrap().lock().unwrap().take());
    use_everything();
    println!("used at exit");
}

/// How a process ends that has everything open: the one in which the next test runs it.
#[test]
fn a_process_that_ends() {
    let Ok(how) = env::var("FBUF_TEST_ENDS") else { return };
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let sender = client.sender("c").open().unwrap();
    let receiver = client.receiver("c").open().unwrap();
    let all = (broker, client, sender, receiver);
    match &*how {
        "static" => *KEPT.get_or_init(Mutex::default).lock().unwrap() = Some(all),
        "atexit" => {
            *KEPT.get_or_init(Mutex::default).lock().unwrap() = Some(all);
            #[allow(unsafe_code, reason = "atexit(3)")]
            // SAFETY: the handler is a function of this program, which stays loaded.
            let registered = unsafe { nix::libc::atexit(at_exit) };
            assert_eq!(registered, 0);
        }
        "leaked" => std::mem::forget(all),
        how => panic!("{how} is no way to end"),
    }
    println!("open");
    std::process::exit(0);
}

#[test]
fn a_process_ends_in_silence_whatever_it_has_open() {
    for how in ["static", "atexit", "leaked"] {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["a_process_that_ends", "--exact", "--nocapture"]).env("FBUF_TEST_ENDS", how);
        let output = command.stdin(Stdio::null()).run();
        let (said, complained) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(output.status.success() && complained.is_empty(), "{how}: {}, {complained}", output.status);
        assert!(said.contains("open") && said.contains("used at exit") == (how == "atexit"), "{how}: {said}");
    }
}

/// What a predicate holds is dropped on the thread of the client, which cannot wait for its own end.
#[test]
fn a_predicate_may_hold_the_last_handle_of_its_client() {
    struct Held {
        client: Option<Client>,
        others_are_gone: Mutex<mpsc::Receiver<()>>,
        tell: mpsc::Sender<bool>,
    }
    impl Drop for Held {
        fn drop(&mut self) {
            let last = self.others_are_gone.lock().unwrap().recv_timeout(SOON).is_ok();
            let is_there = thread::current().name() == Some("fbuf-control");
            let dropped = catch_unwind(AssertUnwindSafe(|| drop(self.client.take())));
            let _ = self.tell.send(last && is_there && dropped.is_ok());
        }
    }
    let broker = Embedded::start().unwrap();
    let watcher = Client::connect_to(broker.address()).unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let ((are_gone, others_are_gone), (tell, told)) = (mpsc::channel(), mpsc::channel());
    let held = Held { client: Some(client.clone()), others_are_gone: Mutex::new(others_are_gone), tell };
    let accept = move |_: &Peer| held.client.as_ref().is_some_and(Client::is_connected);
    let receiver = client.receiver("c").accept(accept).open().unwrap();
    drop((client, receiver));
    are_gone.send(()).unwrap();
    assert_eq!(told.recv_timeout(SOON), Ok(true), "it was dropped elsewhere, or its drop panicked");
    support::until("the connection is over", || watcher.clients().unwrap().len() == 1);
}

/// The answer would come on the thread on which the predicate runs.
#[test]
fn a_predicate_that_asks_its_own_client_is_told_that_it_cannot() {
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let other = Client::connect_to(broker.address()).unwrap();
    let (tell, told) = mpsc::channel();
    let (asked, another) = (client.clone(), other.clone());
    let accept = move |_: &Peer| {
        let said = [
            asked.status().map(drop),
            asked.clients().map(drop),
            asked.receiver("d").open().map(drop),
            asked.sender("d").slot_size(8).slots(1).open().map(drop),
        ];
        let is_told = said.iter().all(|said| matches!(said, Err(OpenError::InPredicate)));
        let _ = tell.send(is_told && another.status().is_ok());
        true
    };
    let mut receiver = client.receiver("c").accept(accept).open().unwrap();
    let mut sender = other.sender("c").slot_size(8).slots(1).open().unwrap();
    assert_eq!(told.recv_timeout(SOON), Ok(true));
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let fbuf = sender.allocate().unwrap();
    sender.write(fbuf).unwrap();
    assert!(receiver.get_timeout(SOON).is_ok());
    assert!(client.status().is_ok(), "it answers on other threads");
}
