//! Links that peers of another user leave behind, which the broker counts no more: by closing their endpoints and keeping
//! their ends, or by coming and going while the other end's program does something else. They cost a process no more than
//! endpoints do that are open.

#[path = "support/hostile.rs"]
mod hostile;
mod support;

use std::{
    env,
    io::{BufRead, BufReader, Write, stdin},
    os::unix::process::CommandExt,
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use fbuf_client::{Address, Client, GetError, Receiver};
use fbuf_core::{
    board::BoardTable,
    lane::{LaneTable, capacity_for},
    limits::MAX_ENDS_OF_USER,
    link::{Hello, LinkMessage, NewSegment, Welcome},
    memory::Map,
    protection::{Mechanism, Protection},
    socket::Arrival,
};
use fbuf_protocol::{Limits, Role, Slots};
use hostile::Hostile;
use support::{BrokerProcess, Holdings, Process, SOON, is_root, until};

/// The users of the attacker, and of one that comes later.
const OTHER: u32 = 65_533;
const LATER: u32 = 65_532;
/// How often the attacker is linked in each role: more than twice as often as it may have endpoints.
const TIMES: usize = 2 * MAX_ENDS_OF_USER + 20;
const SLOTS: u32 = 4;

/// What this program does when it is run again; nothing in the process that tests.
#[test]
fn role() {
    match env::var("FBUF_TEST_ROLE").as_deref() {
        Ok("honest") => honest(),
        Ok("leaves") => attack(false),
        Ok("keeps") => attack(true),
        Ok("later") => {
            let client = Client::connect().unwrap();
            let mut receiver = client.receiver("sent").open().unwrap();
            let mut sender = client.sender("received").slot_size(64).slots(1).open().unwrap();
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            println!("linked");
            let fbuf = sender.allocate_timeout(SOON).unwrap();
            assert_eq!(sender.write(fbuf).unwrap().receivers, 1);
            receiver.get_timeout(SOON).unwrap();
            println!("through");
        }
        _ => {}
    }
}

/// Has a receiver and a sender, which it looks at only when it is told to.
fn honest() {
    let client = Client::connect().unwrap();
    let mut receiver = client.receiver("received").stay().open().unwrap();
    let mut sender = client.sender("sent").slot_size(64).slots(SLOTS.into()).open().unwrap();
    println!("open");
    let heed = |receiver: &mut Receiver, sender: &mut fbuf_client::Sender| {
        sender.look();
        matches!(receiver.try_get(), Ok(Some(_)))
    };
    let mut lines = stdin().lines();
    while let Some(Ok(word)) = lines.next() {
        match &word[..] {
            "count" => {
                // All that came is read.
                for _ in 0..10 * TIMES {
                    heed(&mut receiver, &mut sender);
                }
                println!("{} senders and {} receivers", receiver.peers().count(), sender.peers().count());
            }
            _ => {
                while !heed(&mut receiver, &mut sender) {}
                let fbuf = sender.allocate_timeout(SOON).unwrap();
                sender.write(fbuf).unwrap();
                assert!(!matches!(receiver.try_get(), Err(GetError::Exhausted { .. })));
                println!("got");
            }
        }
    }
}

/// Is linked again and again, and each time closes its endpoint, and keeps its end of the link or not.
fn attack(keeps: bool) {
    let broker = Address::default_for_user();
    let receiver = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };
    let (slot_bytes, max_slots) = (64, SLOTS.into());
    let sender = Role::Sender { slot_bytes, max_slots, mechanism: Mechanism::Copy, slots: Slots::Segments };
    let mut kept = Vec::new();
    for _ in 0..TIMES {
        for role in [receiver, sender] {
            let is_receiver = matches!(role, Role::Receiver { .. });
            let hostile = Hostile::join(&broker, if is_receiver { "sent" } else { "received" }, role);
            // Its peer may have hung up.
            let say = |message| drop(hostile.link.send(&fbuf_core::wire::encode(&message).unwrap()));
            if is_receiver {
                let board = BoardTable::create("fbuf-test", SLOTS as usize).unwrap().1.into();
                say(LinkMessage::Hello(Hello { board, skip_above: None, fences: false, wants_slots: false }));
            } else if keeps {
                // A welcome before the hello would be a violation; and a hello that is not received, the last.
                until("it is greeted, or turned away", || {
                    !matches!(hostile.link.receive::<1024>().unwrap(), Arrival::Nothing)
                });
                let lane = LaneTable::create("fbuf-test", capacity_for(SLOTS, false)).unwrap().1.into();
                let memory = Map::create("fbuf-test", 4096).unwrap().1.into();
                let segments = vec![NewSegment { memory, slots: SLOTS }];
                say(LinkMessage::Welcome(Welcome { lane, first_sequence: 0, segments, slots: Vec::new() }));
            }
            let Hostile { link, .. } = hostile;
            kept.extend(keeps.then_some(link));
        }
    }
    println!("{} of {} hung up", kept.iter().filter(|link| link.hung_up()).count(), kept.len());
    let _ = stdin().read_line(&mut String::new());
}

struct Other {
    process: Process,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Other {
    fn start(broker: &Address, role: &str, user: u32) -> Self {
        let mut command = Command::new("/proc/self/exe");
        command.args(["--exact", "role", "--nocapture", "--test-threads=1"]).current_dir("/");
        command.env("FBUF_TEST_ROLE", role).env("FBUF_BROKER", broker.to_string()).uid(user).gid(user);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(&mut command);
        let (input, output) = (process.0.stdin.take().unwrap(), process.0.stdout.take().unwrap());
        Self { process, input, output: BufReader::new(output) }
    }

    fn tell(&mut self, word: &str) {
        writeln!(self.input, "{word}").unwrap();
    }

    /// The numbers in the line that ends like this.
    fn says(&mut self, words: &str) -> Vec<usize> {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "it has ended, and not said {words:?}");
            if line.trim_end().ends_with(words) {
                return line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            }
        }
    }

    fn descriptors(&self) -> usize {
        Holdings::of(self.process.pid()).descriptors
    }
}

/// A sender and a receiver that nobody looks at, beside an attacker, and how many descriptors they have more when it is
/// done.
fn attacked_by(role: &str, then: impl FnOnce(&BrokerProcess, Other, Other, usize)) {
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_short(folder.path(), 4096, [OTHER, LATER]);
    let mut honest = Other::start(&broker.address, "honest", 0);
    honest.says("open");
    let before = honest.descriptors();
    let attacker = Other::start(&broker.address, role, OTHER);
    then(&broker, honest, attacker, before);
}

#[test]
fn links_that_are_kept_cost_no_more_than_endpoints() {
    attacked_by("keeps", |broker, mut honest, mut attacker, before| {
        let [hung_up, all] = attacker.says("hung up")[..] else { panic!("not two numbers") };
        assert_eq!((all, hung_up), (2 * TIMES, 2 * (TIMES - MAX_ENDS_OF_USER)));
        assert!(honest.descriptors() <= before + 2 * MAX_ENDS_OF_USER + 4, "{} were {before}", honest.descriptors());
        honest.tell("count");
        assert_eq!(honest.says("receivers").first(), Some(&MAX_ENDS_OF_USER));
        // Whoever else comes is linked.
        let mut later = Other::start(&broker.address, "later", LATER);
        later.says("linked");
        honest.tell("get");
        honest.says("got");
        later.says("through");
        drop(attacker);
        honest.tell("count");
        until("links are gone that end", || honest.descriptors() <= before + 4);
    });
}

#[test]
fn peers_that_come_and_go_while_nobody_looks_are_forgotten_and_keep_nobody_out() {
    attacked_by("leaves", |broker, mut honest, mut attacker, before| {
        attacker.says("hung up");
        assert!(honest.descriptors() <= before + 2 * MAX_ENDS_OF_USER + 4, "{} were {before}", honest.descriptors());
        // Not even of the same user.
        let mut later = Other::start(&broker.address, "later", OTHER);
        honest.tell("get");
        later.says("linked");
        honest.says("got");
        later.says("through");
    });
}
