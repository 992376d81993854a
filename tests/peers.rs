//! Which endpoints of other users an endpoint is linked with: those that fit, and that it accepts. The others are not
//! paired, none of them is refused, and the users of both ends can see why.

#[path = "support/mod.rs"]
mod support;

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use fbuf_broker::{Embedded, Policy, Quota};
use fbuf_client::{Client, Mismatch, Protection, Receiver, Resource, Sender};
use nix::unistd::geteuid;
use support::{
    BrokerProcess, Process, Run, SOON, fbuf, is_root,
    role::{Other, roles},
    until,
};

/// Users that tests as other ones.
const OTHER: u32 = 65_533;
const ANOTHER: u32 = 65_532;
/// How long an end waits for a peer before it asks why there is none.
const MOMENT: Duration = Duration::from_millis(50);

/// What a child does.
fn play(role: &str) {
    let (role, size) = role.split_once(' ').unwrap_or((role, ""));
    let client = Client::connect().unwrap();
    match role {
        "sender" => {
            let mut sender = client.sender("c").slot_size(size.parse().unwrap()).slots(1).open().unwrap();
            while sender.wait_for_receivers_timeout(1, MOMENT).is_err() {
                sender.unpaired().unwrap().iter().for_each(|one| println!("it is {one}"));
            }
            send(&mut sender);
            println!("it has sent");
        }
        "receiver" | "strict" => {
            let require = if role == "receiver" { Protection::Volatile } else { Protection::Sealed };
            let mut receiver = client.receiver("c").require(require).keep_waiting().open().unwrap();
            println!("it is open");
            loop {
                match receiver.get_timeout(MOMENT) {
                    Ok(message) => println!("it got {} bytes", message.len()),
                    Err(_) => receiver.unpaired().unwrap().iter().for_each(|one| println!("it is {one}")),
                }
            }
        }
        other => panic!("no such role: {other}"),
    }
    loop {
        std::thread::park();
    }
}

fn send(sender: &mut Sender) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(8).unwrap();
    sender.write(fbuf).unwrap();
}

fn broker() -> Embedded {
    Embedded::start_with(Policy::own().allow(OTHER).allow(ANOTHER)).unwrap()
}

/// A message comes from a process of this user, and from no other.
fn get_from(receiver: &mut Receiver, peer: &Other, uid: u32) {
    let message = receiver.get_timeout(SOON).unwrap();
    let process = message.sender().process;
    assert_eq!((process.uid, process.pid as u32), (uid, peer.process.pid()), "what the kernel says");
    assert!(receiver.peers().all(|peer| peer.process.uid == uid));
}

#[test]
fn a_receiver_is_linked_with_senders_of_the_users_that_it_names_and_no_others() {
    roles!(play);
    if !is_root() {
        return;
    }
    let broker = broker();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("c").from_users([OTHER]).keep_waiting().open().unwrap();
    let mut another = Other::start(broker.address(), "sender 64", ANOTHER);
    let told = another.hear("not paired");
    let number = receiver.endpoint();
    assert!(told.contains(&format!("receiver {number} (pid {} of user 0)", std::process::id())), "{told}");
    assert!(told.ends_with("names the users of its senders, and user 65532 is none of them"), "{told}");
    let mut other = Other::start(broker.address(), "sender 64", OTHER);
    other.hear("it has sent");
    get_from(&mut receiver, &other, OTHER);
    let unpaired = receiver.unpaired().unwrap();
    assert!(
        matches!(unpaired[..], [one] if one.sends && one.why == Mismatch::FromUsers { user: ANOTHER }),
        "{unpaired:?}"
    );
    // The command lists it as well.
    let listed = fbuf(["ls"]).env("FBUF_BROKER", broker.address().to_string()).run();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let line = format!("receiver {number} of \"c\" is not paired with sender ");
    assert!(listed.contains(&line) && listed.contains("names the users of its senders"), "{listed}");
}

#[test]
fn a_sender_is_linked_with_receivers_of_the_users_that_it_names_and_no_others() {
    roles!(play);
    if !is_root() {
        return;
    }
    let broker = broker();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut another = Other::start(broker.address(), "receiver", ANOTHER);
    let mut other = Other::start(broker.address(), "receiver", OTHER);
    let mut sender = client.sender("c").slot_size(64).slots(2).to_users([OTHER]).open().unwrap();
    let told = another.hear("not paired");
    assert!(told.ends_with("names the users of its receivers, and user 65532 is none of them"), "{told}");
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender);
    other.hear("it got 8 bytes");
    assert_eq!(sender.peers().map(|peer| peer.process.uid).collect::<Vec<_>>(), [OTHER]);
}

#[test]
fn both_ends_are_asked_before_they_are_linked() {
    roles!(play);
    if !is_root() {
        return;
    }
    let broker = broker();
    let client = Client::connect_to(broker.address()).unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let accept = |asked: &Arc<Mutex<Vec<u32>>>| {
        let asked = asked.clone();
        move |peer: &fbuf_client::Peer| {
            asked.lock().unwrap().push(peer.process.uid);
            // A question that panics is answered with no.
            assert_eq!(peer.process.uid, OTHER);
            true
        }
    };
    let mut receiver = client.receiver("c").accept(accept(&asked)).keep_waiting().open().unwrap();
    let _another = Other::start(broker.address(), "sender 64", ANOTHER);
    until("the sender is introduced", || asked.lock().unwrap().contains(&ANOTHER));
    let mut other = Other::start(broker.address(), "sender 64", OTHER);
    other.hear("it has sent");
    get_from(&mut receiver, &other, OTHER);
    drop((receiver, other));
    asked.lock().unwrap().clear();
    let _another = Other::start(broker.address(), "receiver", ANOTHER);
    let mut sender = client.sender("c").slot_size(64).slots(2).accept(accept(&asked)).open().unwrap();
    until("the receiver is introduced", || asked.lock().unwrap().contains(&ANOTHER));
    let mut other = Other::start(broker.address(), "receiver", OTHER);
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender);
    other.hear("it got 8 bytes");
    assert_eq!(sender.peers().map(|peer| peer.process.uid).collect::<Vec<_>>(), [OTHER]);
}

#[test]
fn a_receiver_is_linked_with_large_slots_of_another_user_only_if_it_says_so() {
    roles!(play);
    if !is_root() {
        return;
    }
    const LARGE: usize = 5 << 20;
    let broker = broker();
    let client = Client::connect_to(broker.address()).unwrap();
    let careful = client.receiver("c").keep_waiting().open().unwrap();
    let mut other = Other::start(broker.address(), format!("sender {LARGE}"), OTHER);
    let told = other.hear("not paired");
    assert!(
        told.ends_with("slots of 5242880 bytes, and the receiver accepts slots of 4194304 bytes at most"),
        "{told}"
    );
    assert_eq!(careful.peers().count(), 0);
    let mut generous = client.receiver("c").max_slot_size(LARGE).max_slots(1).keep_waiting().open().unwrap();
    other.hear("it has sent");
    get_from(&mut generous, &other, OTHER);
    // Of the own user all is accepted, unless the receiver says less; then it is an error.
    let own = client.sender("own").slot_size(LARGE).slots(1).open().unwrap();
    client.receiver("own").open().unwrap();
    let refused = client.receiver("own").max_slot_size(LARGE - 1).open().unwrap_err().to_string();
    assert!(
        refused.contains(&format!("sender {}", own.endpoint())) && refused.contains("accepts slots of 5242879 bytes"),
        "{refused}"
    );
}

#[test]
fn a_receiver_that_requires_more_keeps_no_other_user_off_the_channel() {
    roles!(play);
    if !is_root() {
        return;
    }
    // The sender's messages are volatile for all: it is trusted.
    let broker = Embedded::start_with(Policy::own().trust(geteuid().as_raw()).allow(OTHER)).unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut strict = Other::start(broker.address(), "strict", OTHER);
    strict.hear("it is open");
    let mut sender = client.sender("c").slot_size(64).slots(2).open().unwrap();
    let mut pleased = client.receiver("c").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender);
    assert_eq!(pleased.get_timeout(SOON).unwrap().len(), 8);
    let told = strict.hear("not paired");
    assert!(told.ends_with("requires sealed messages, and the sender's would be volatile"), "{told}");
    // Within one user it is a mistake, and refused.
    let refused = client.receiver("c").require(Protection::Sealed).open().unwrap_err().to_string();
    assert!(refused.contains("requires sealed"), "{refused}");
}

#[test]
fn commands_that_wait_say_with_which_endpoints_they_are_not_paired() {
    roles!(play);
    if !is_root() {
        return;
    }
    let broker = broker();
    let command = |arguments: &[&str]| {
        let mut command = fbuf(arguments);
        command.env("FBUF_BROKER", broker.address().to_string()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::start(&mut command);
        let said = BufReader::new(process.0.stderr.take().unwrap()).lines().map(Result::unwrap);
        (process, said)
    };
    let (_receiving, mut said) = command(&["recv", "c", "--from-users", "*"]);
    assert!(said.next().unwrap().contains("waiting for a sender"));
    // Its slots are larger than a receiver accepts of another user.
    let mut large = Other::start(broker.address(), format!("sender {}", 8 << 20), OTHER);
    large.hear("not paired");
    let told = said.next().unwrap();
    assert!(told.contains("not paired with sender") && told.contains("of user 65533"), "{told}");
    assert!(told.ends_with("; receive with `--max-slot-size 8388608`"), "{told}");
    // One that fits is linked, and the command waits no more.
    Other::start(broker.address(), "sender 64", ANOTHER).hear("it has sent");

    let client = Client::connect_to(broker.address()).unwrap();
    let _only = client.receiver("d").from_users([OTHER]).open().unwrap();
    let (_sending, mut said) = command(&["send", "d"]);
    assert!(said.next().unwrap().contains("waiting for a receiver"));
    let told = said.next().unwrap();
    assert!(told.contains("not paired with receiver") && told.contains("names the users of its senders"), "{told}");
}

#[test]
fn a_pair_that_a_quota_forbids_is_linked_when_another_link_has_ended() {
    roles!(play);
    if !is_root() {
        return;
    }
    let quota = Quota::default().with(Resource::Links, 1);
    let broker = Embedded::start_with(Policy::own().allow(OTHER).with_quota(quota)).unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let [linked, mut apart] = [(); 2].map(|()| {
        let mut receiver = Other::start(broker.address(), "receiver", OTHER);
        receiver.hear("it is open");
        receiver
    });
    // The user with two endpoints pays, and has room for one link; the sender is not refused for that.
    let mut sender = client.sender("c").slot_size(64).slots(2).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let pid = |peer: &Other| peer.process.pid() as i32;
    let unpaired = sender.unpaired().unwrap();
    let told = matches!(unpaired[..], [one] if one.why == Mismatch::Quota { user: OTHER } && one.peer.process.pid == pid(&apart));
    assert!(told, "{unpaired:?}");
    apart.hear("user 65533 has as many links as the quota allows");
    assert_eq!(sender.peers().map(|peer| peer.process.pid).collect::<Vec<_>>(), [pid(&linked)]);
    drop(linked);
    until("the other one is introduced, alone", || {
        sender.poll_events();
        sender.peers().map(|peer| peer.process.pid).eq([pid(&apart)])
    });
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    assert_eq!(sender.unpaired().unwrap(), []);
    send(&mut sender);
    apart.hear("it got 8 bytes");
}

/// Has a broker have no descriptor left, or as many as it likes.
fn limit(broker: &BrokerProcess, descriptors: u64) {
    let pid = broker.process.pid().to_string();
    let set = Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={descriptors}:")]).status();
    assert!(set.unwrap().success());
}

#[test]
fn pairs_wait_while_the_broker_has_no_descriptor_and_no_endpoint_is_refused() {
    roles!(play);
    use std::os::unix::fs::PermissionsExt;
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut broker = BrokerProcess::start_with(&folder.path().join("broker"), |command| {
        command.args(["--allow", &OTHER.to_string()]);
    });
    let client = Client::connect_to(&broker.address).unwrap();
    let mut other = Other::start(&broker.address, "receiver", OTHER);
    other.hear("it is open");
    let mut own = client.receiver("c").keep_waiting().open().unwrap();
    // All numbers below are in use.
    limit(&broker, 3);
    let mut sender = client.sender("c").slot_size(64).slots(2).open().unwrap();
    let why = sender.unpaired().unwrap().into_iter().map(|one| one.why).collect::<Vec<_>>();
    assert_eq!(why, [Mismatch::Exhausted; 2], "of another user, and of the own");
    other.hear("the broker cannot make the socket of their link");
    let mut log = String::new();
    until("the log names what it lacks", || {
        broker.log.read_line(&mut log).unwrap();
        log.contains("socketpair: Too many open files") && log.contains("ulimit -n")
    });
    // As `fbuf ls` shows it, which cannot connect now.
    let shown = client.status().unwrap().into_iter().filter(|one| one.endpoint == sender.endpoint());
    let shown: Vec<_> = shown.map(|one| (one.unpaired, one.first_unpaired.map(|one| one.why))).collect();
    assert_eq!(shown, [(2, Some(Mismatch::Exhausted))]);
    assert_eq!(sender.peers().count(), 0);
    limit(&broker, 1024);
    sender.wait_for_receivers_timeout(2, SOON).unwrap();
    assert_eq!(sender.unpaired().unwrap(), []);
    send(&mut sender);
    assert_eq!(own.get_timeout(SOON).unwrap().len(), 8);
    other.hear("it got 8 bytes");
}
