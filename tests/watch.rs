//! What `fbuf ls`, `fbuf top`, a program and Prometheus see of a broker and its clients; and that looking costs
//! processes nothing that exchange messages.

#[path = "support/hostile.rs"]
mod client;
mod support;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Read, Write},
    process::{Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use client::Hostile;
use fbuf_client::{
    Address, AllocateError, Client, EndStatus, EndpointStatus, GetError, Received, Receiver, Sender, Wait,
};
use fbuf_core::{protection::Mechanism, socket::wire::Letter};
use fbuf_protocol::{Role, Slots};
use nix::{
    pty::{Winsize, openpty},
    sys::{
        ptrace::{self, Options},
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, geteuid, gettid},
};
use serde_json::Value;
use support::{
    BrokerProcess, Metrics, Process, Run, SOON, fbuf,
    role::{Other, roles},
    until,
};

const SLOTS: u64 = 8;
/// How often somebody looks.
const LOOKS: u32 = 10;
/// So short that nothing comes meanwhile.
const BRIEFLY: Duration = Duration::from_millis(1);

fn start() -> (BrokerProcess, Metrics, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let (broker, metrics) = BrokerProcess::start_with_metrics(&folder.path().join("broker"), |_| {});
    (broker, metrics, folder)
}

fn send(sender: &mut Sender) {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(10).unwrap();
    sender.write(fbuf).unwrap();
}

fn ls(broker: &Address, arguments: &[&str]) -> String {
    let output = fbuf(["ls", "--socket", &broker.to_string()]).args(arguments).run();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(broker: &Address) -> Vec<Value> {
    json_by(broker, "endpoint")
}

fn json_by(broker: &Address, what: &str) -> Vec<Value> {
    ls(broker, &["--json", "--by", what]).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What stands in a table, in the column that is called so.
fn cell<'a>(heads: &str, row: &'a str, head: &str) -> &'a str {
    let start = heads.find(head).unwrap_or_else(|| panic!("no {head} in {heads}"));
    row.get(start..).unwrap_or("").split("  ").next().unwrap_or("").trim()
}

/// A metric of one endpoint.
fn metric<'a>(answer: &'a str, name: &str, labels: &[&str]) -> &'a str {
    let is_it = |line: &&str| line.starts_with(&format!("{name}{{")) && labels.iter().all(|label| line.contains(label));
    answer
        .lines()
        .find(is_it)
        .and_then(|line| line.rsplit(' ').next())
        .unwrap_or_else(|| panic!("no {name} in {answer}"))
}

/// A sender and a receiver which holds the first of a hundred messages.
fn stream(client: &Client) -> (Sender, Receiver, Received) {
    let mut sender = client.sender("camera/front").slot_size(64).slots(SLOTS as usize).open().unwrap();
    let mut receiver = client.receiver("camera/front").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut held = None;
    for _ in 0..100 {
        send(&mut sender);
        held.get_or_insert(receiver.get_timeout(SOON).unwrap());
    }
    // Whenever it looks around, it says what it has done.
    sender.poll_events();
    let _ = receiver.get_timeout(Duration::from_millis(5));
    (sender, receiver, held.unwrap())
}

#[test]
fn endpoints_say_what_they_do_and_what_they_hold() {
    let (broker, _, _folder) = start();
    let client = Client::connect_to(&broker.address).unwrap();
    let (_sender, _receiver, held) = stream(&client);
    let of = |all: &[EndpointStatus], sends: bool| {
        all.iter().find(|one| matches!(one.end, EndStatus::Sender { .. }) == sends).cloned().unwrap()
    };
    let all = client.status().unwrap();
    assert_eq!(all.len(), 2);
    let (sender, receiver) = (of(&all, true), of(&all, false));
    assert_eq!((sender.channel.as_str(), sender.process.pid), ("camera/front", std::process::id() as i32));
    let (sent, received) = (sender.report.unwrap(), receiver.report.unwrap());
    assert_eq!((sent.messages, sent.bytes, sent.links, sent.slots), (100, 1000, 1, SLOTS));
    assert_eq!((received.messages, received.bytes, received.links, received.held), (100, 1000, 1, 1));
    let oldest = received.oldest.unwrap();
    assert_eq!((oldest.sequence, oldest.behind), (held.sequence(), 99));
    until("it is seen to be held for long", || {
        let report = of(&client.status().unwrap(), false).report.unwrap();
        report.oldest.is_some_and(|oldest| oldest.milliseconds >= 1000)
    });
    drop(held);
    until("it is held no more", || of(&client.status().unwrap(), false).report.is_some_and(|report| report.held == 0));
}

#[test]
fn ls_lists_every_endpoint_for_people_and_for_scripts() {
    let (broker, _, _folder) = start();
    let ls = |arguments: &[&str]| ls(&broker.address, arguments);
    assert_eq!((ls(&[]).as_str(), ls(&["--json"]).as_str()), ("no endpoint is open\n", ""));
    let client = Client::connect_to(&broker.address).unwrap();
    let (_sender, _receiver, _held) = stream(&client);
    // More than go into one message.
    let _others: Vec<_> = (0..70).map(|number| client.receiver(&format!("c{number}")).open().unwrap()).collect();
    let text = ls(&[]);
    assert!(text.starts_with("channel ") && text.lines().count() == 73, "{text}");
    let lines = json(&broker.address);
    assert_eq!(lines.len(), 72);
    let sender = lines.iter().find(|line| line["end"] == "sender").unwrap();
    assert_eq!((&sender["channel"], &sender["max_slots"]), (&"camera/front".into(), &SLOTS.into()));
    assert_eq!((&sender["report"]["messages"], &sender["report"]["links"]), (&100.into(), &1.into()));
    let receiver = lines.iter().find(|line| line["end"] == "receiver" && line["channel"] == "camera/front").unwrap();
    assert_eq!((&receiver["report"]["held"], &receiver["report"]["oldest_behind"]), (&1.into(), &99.into()));
    assert_eq!(receiver["report"]["forgotten"], false);
    let refused = fbuf(["top", "--socket", &broker.address.to_string()]).run();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("fbuf ls --json"));
}

#[test]
fn prometheus_can_read_it() {
    let (broker, metrics, _folder) = start();
    let client = Client::connect_to(&broker.address).unwrap();
    let (_sender, _receiver, _held) = stream(&client);
    let answer = metrics.get();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("application/openmetrics-text"), "{answer}");
    let value = |name, label| metric(&answer, name, &[label]);
    assert_eq!(value("fbuf_messages_total", "end=\"sender\""), "100");
    assert_eq!(value("fbuf_held", "end=\"receiver\""), "1");
    assert_eq!(value("fbuf_used", "resource=\"slots\""), SLOTS.to_string());
    assert!(answer.contains("\nfbuf_clients 1") && answer.contains("# EOF"), "{answer}");
    assert!(metrics.ask("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(metrics.ask("garbage\r\n\r\n").starts_with("HTTP/1.1 400"));
    Client::connect_to(&broker.address).unwrap();
}

/// Endpoints to which everything happens that is counted: on a channel for each.
struct Troubles {
    /// Its one slot is kept.
    waits: (Sender, Receiver, Received),
    skips: (Sender, Receiver),
    sleeps: Receiver,
    /// Its sender says what no sender says.
    hears: (Receiver, Hostile),
    keeps: (Sender, Receiver, Received),
}

impl Troubles {
    fn begin(client: &Client, broker: &Address) -> Self {
        let pair = |channel: &str, slots, max_backlog: Option<usize>| {
            let receiver = client.receiver(channel);
            let receiver = max_backlog.into_iter().fold(receiver, |receiver, count| receiver.max_backlog(count));
            let (mut sender, receiver) =
                (client.sender(channel).slot_size(64).slots(slots).open().unwrap(), receiver.open().unwrap());
            sender.wait_for_receivers_timeout(1, SOON).unwrap();
            (sender, receiver)
        };
        let (mut waiting, mut keeping) = pair("waits", 1, None);
        send(&mut waiting);
        let kept = keeping.get_timeout(SOON).unwrap();
        let mut hearing = client.receiver("hears").keep_waiting().open().unwrap();
        let (mechanism, slots) = (Mechanism::Shared, Slots::Segments);
        let hostile = Hostile::join(broker, "hears", Role::sender(64, 4, mechanism, slots));
        hostile.link.send(&Letter { bytes: b"\xffgarbage".to_vec(), descriptors: Vec::new() }).unwrap();
        let heard = hearing.get_timeout(SOON).unwrap_err();
        assert!(matches!(heard, GetError::PeerViolation { .. }), "{heard:?}");
        Self {
            waits: (waiting, keeping, kept),
            skips: pair("skips", 4, Some(2)),
            sleeps: client.receiver("sleeps").wait(Wait::Block).open().unwrap(),
            hears: (hearing, hostile),
            keeps: stream(client),
        }
    }

    /// Has it all happen once more.
    fn go_on(&mut self) {
        assert_eq!(self.waits.0.allocate_timeout(BRIEFLY).unwrap_err(), AllocateError::TimedOut { slots: 1 });
        (0..4).for_each(|_| send(&mut self.skips.0));
        while self.skips.1.try_get().unwrap().is_some() {}
        assert_eq!(self.sleeps.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
        send(&mut self.keeps.0);
        self.keeps.1.get_timeout(SOON).unwrap();
    }

    /// Has them say what they have done.
    fn say(&mut self) {
        [&mut self.waits.0, &mut self.skips.0, &mut self.keeps.0].into_iter().for_each(Sender::poll_events);
        for receiver in [&mut self.skips.1, &mut self.sleeps, &mut self.hears.0, &mut self.keeps.1] {
            assert_eq!(receiver.get_timeout(BRIEFLY).unwrap_err(), GetError::TimedOut);
        }
    }

    /// How many there are of one client.
    fn endpoints(&self) -> u64 {
        // Two on each channel, but for those where one sleeps, or hears from a client of its own.
        2 + 2 + 1 + 1 + 2
    }

    /// Channel, end, what is counted there, and how often it has happened.
    fn counts(&self) -> [(&'static str, &'static str, &'static str, u64); 9] {
        let (waiting, skipped) = (self.waits.0.counters(), self.skips.0.counters().skipped);
        [
            ("waits", "sender", "waits", waiting.waits),
            ("waits", "sender", "sleeps", waiting.sleeps),
            ("waits", "receiver", "held", 1),
            ("skips", "sender", "left_out", skipped),
            ("skips", "receiver", "left_out", self.skips.1.counters().missed),
            ("sleeps", "receiver", "sleeps", self.sleeps.counters().sleeps),
            ("hears", "receiver", "violations", 1),
            ("camera/front", "receiver", "held", 1),
            ("camera/front", "receiver", "oldest_behind", self.keeps.0.counters().messages - 1),
        ]
    }
}

/// `fbuf top`, in a terminal of its own.
struct Top {
    process: Process,
    keys: File,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Top {
    const SIZE: (u16, u16) = (30, 200);

    fn start(broker: &Address) -> Self {
        let (ws_row, ws_col) = Self::SIZE;
        let terminal = openpty(&Winsize { ws_row, ws_col, ws_xpixel: 0, ws_ypixel: 0 }, None).unwrap();
        let top = fbuf(["top", "--every", "0.1", "--socket", &broker.to_string()]);
        // Without the terminal that this process may have.
        let mut command = Command::new("setsid");
        command.arg(top.get_program()).args(top.get_args()).env("TERM", "xterm");
        let [input, output] = [(); 2].map(|()| terminal.slave.try_clone().unwrap());
        let process = Process::start(command.stdin(input).stdout(output).stderr(Stdio::inherit()));
        let keys = File::from(terminal.master);
        let [rows, columns] = [ws_row, ws_col].map(|count| count.try_into().unwrap());
        let (mut shown, screen) =
            (keys.try_clone().unwrap(), Arc::new(Mutex::new(vt100::Parser::new(rows, columns, 0))));
        let seen = screen.clone();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // An error when the terminal is closed.
            while let Ok(count @ 1..) = shown.read(&mut bytes) {
                seen.lock().unwrap().process(&bytes[..count]);
            }
        });
        Self { process, keys, screen }
    }

    fn rows(&self) -> Vec<String> {
        self.screen.lock().unwrap().screen().rows(0, Self::SIZE.1).collect()
    }
}

#[test]
fn what_happens_to_endpoints_is_seen_in_every_view() {
    let (broker, metrics, _folder) = start();
    let client = Client::connect_to(&broker.address).unwrap();
    let mut troubles = Troubles::begin(&client, &broker.address);
    (0..3).for_each(|_| troubles.go_on());
    let mut all = Vec::new();
    until("everything is reported, and a message may be forgotten", || {
        troubles.say();
        all = json(&broker.address);
        let report = |channel: &str, end: &str| {
            let it = all.iter().find(|line| line["channel"] == channel && line["end"] == end);
            it.unwrap_or_else(|| panic!("no {end} on {channel} in {all:?}"))["report"].clone()
        };
        let is_seen = |(channel, end, count, times): (&str, &str, &str, u64)| report(channel, end)[count] == times;
        troubles.counts().into_iter().all(is_seen) && report("camera/front", "receiver")["forgotten"] == true
    });
    let counts = troubles.counts();
    assert!(counts.iter().all(|&(.., times)| times > 0), "{counts:?}");

    let text = ls(&broker.address, &[]);
    let heads = text.lines().next().unwrap();
    let row = |channel: &str, end: &str| {
        let is_it = |row: &&str| cell(heads, row, "channel") == channel && cell(heads, row, "end") == end;
        text.lines().find(is_it).unwrap_or_else(|| panic!("no {end} on {channel} in {text}"))
    };
    for (channel, end, count, times) in counts.into_iter().filter(|(_, _, count, _)| *count != "oldest_behind") {
        assert_eq!(cell(heads, row(channel, end), &count.replace('_', " ")), times.to_string(), "{count} in {text}");
    }
    let oldest = cell(heads, row("camera/front", "receiver"), "oldest");
    assert!(oldest.contains(" s, 102 behind, forgotten?"), "{oldest}");

    // Clients without endpoints are clients, too.
    let _idle = Client::connect_to(&broker.address).unwrap();
    until("only these are left", || metrics.get().contains("\nfbuf_clients 3\n"));
    let clients = json_by(&broker.address, "client");
    let of_this = clients.iter().filter(|client| client["pid"] == std::process::id());
    let mut endpoints: Vec<_> = of_this.map(|client| client["endpoints"].as_u64().unwrap()).collect();
    endpoints.sort_unstable();
    assert_eq!(endpoints, [0, 1, troubles.endpoints()], "{clients:?}");
    let channels = json_by(&broker.address, "channel");
    let channel = channels.iter().find(|channel| channel["channel"] == "camera/front").unwrap();
    let sent = troubles.keeps.0.counters().messages;
    assert_eq!(
        (&channel["senders"], &channel["receivers"], &channel["report"]["links"]),
        (&1.into(), &1.into(), &1.into())
    );
    assert_eq!((&channel["report"]["messages"], &channel["report"]["held"]), (&sent.into(), &1.into()));
    assert_eq!((&channel["report"]["slots"], &channel["report"]["forgotten"]), (&SLOTS.into(), &true.into()));
    let answer = metrics.get();
    let of = |name: &str, channel: &str, end: &str| {
        metric(&answer, name, &[&format!("channel=\"{channel}\""), &format!("end=\"{end}\"")]).to_owned()
    };
    for (channel, end, count, times) in counts.into_iter().filter(|(_, _, count, _)| *count != "oldest_behind") {
        let total = if count == "held" { "" } else { "_total" };
        assert_eq!(of(&format!("fbuf_{count}{total}"), channel, end), times.to_string(), "{count} in {answer}");
    }
    assert_eq!(of("fbuf_forgotten", "camera/front", "receiver"), "1");
    assert_eq!(of("fbuf_forgotten", "waits", "receiver"), "0");

    let mut top = Top::start(&broker.address);
    let wanted = [
        ("waits", "sender", "waits/s"),
        ("skips", "sender", "left out/s"),
        ("sleeps", "receiver", "sleeps/s"),
        ("hears", "receiver", "violations"),
        ("camera/front", "receiver", "held"),
    ];
    let mut missing = wanted.to_vec();
    until("all of it is in a frame", || {
        troubles.go_on();
        troubles.say();
        let rows = top.rows();
        let Some(heads) = rows.iter().find(|row| row.starts_with("channel")) else { return false };
        missing.retain(|&(channel, end, head)| {
            let row = rows
                .iter()
                .find(|row| cell(heads, row, "channel") == channel && cell(heads, row, "end").starts_with(end));
            row.is_none_or(|row| matches!(cell(heads, row, head), "" | "0"))
        });
        missing.is_empty() && rows[0].contains("1 may have forgotten")
    });
    top.keys.write_all(b"\t\t").unwrap();
    until("clients are in a frame, one of which has no endpoint", || {
        let rows = top.rows();
        let Some(heads) = rows.iter().find(|row| row.starts_with("process")) else { return false };
        let own = std::process::id().to_string();
        let of_own = rows.iter().filter(|row| cell(heads, row, "process") == own);
        let mut endpoints: Vec<_> = of_own.map(|row| cell(heads, row, "endpoints").to_owned()).collect();
        endpoints.sort_unstable();
        endpoints == ["0".to_owned(), "1".to_owned(), troubles.endpoints().to_string()]
    });
    top.keys.write_all(b"q").unwrap();
    assert!(top.process.end().success());
}

/// What `fbuf ls --json` and `fbuf top` say of the links of the one sender.
fn links_of_sender(broker: &Address, top: &Top) -> (Option<u64>, Option<u64>) {
    let all = json(broker);
    let listed = all.iter().find(|line| line["end"] == "sender").and_then(|line| line["report"]["links"].as_u64());
    let rows = top.rows();
    let shown = rows.iter().find(|row| row.starts_with("channel")).and_then(|heads| {
        let row = rows.iter().find(|row| cell(heads, row, "end").starts_with("sender"))?;
        cell(heads, row, "links").parse().ok()
    });
    (listed, shown)
}

#[test]
fn links_are_shown_as_they_are_although_a_sender_waits_for_its_input() {
    let (broker, _, _folder) = start();
    let address = broker.address.to_string();
    let words = |end| [end, "c", "--socket", &address].map(str::to_owned);
    let mut sending = Process::start(fbuf(words("send")).stdin(Stdio::piped()).stderr(Stdio::null()));
    let receive = || {
        let mut process = Process::start(fbuf(words("recv")).stdout(Stdio::piped()).stderr(Stdio::null()));
        let output = process.0.stdout.take().unwrap();
        (process, output)
    };
    let (mut first, mut output) = receive();
    let input = sending.0.stdin.as_mut().unwrap();
    input.write_all(b"x").unwrap();
    output.read_exact(&mut [0]).unwrap();
    // From here on the only thread that sends is inside read(2), and does not look at its sockets.
    let top = Top::start(&broker.address);
    until("both say that it is linked", || links_of_sender(&broker.address, &top) == (Some(1), Some(1)));
    first.kill();
    until("both say that it is not", || links_of_sender(&broker.address, &top) == (Some(0), Some(0)));
    assert!(!sending.has_ended());
}

/// What a child does: it exchanges messages with itself, never waits, and says which thread does so.
fn play(_: &str) {
    let client = Client::connect().unwrap();
    let mut receiver = client.receiver("stream").open().unwrap();
    let mut sender = client.sender("stream").slot_size(64).slots(SLOTS as usize).open().unwrap();
    sender.wait_for_receivers(1).unwrap();
    for round in 0u64.. {
        send(&mut sender);
        drop(receiver.get().unwrap());
        if round == 1000 {
            println!("thread {}", gettid());
        }
    }
}

/// How often this thread of another process makes which system call, until enough have been counted.
fn count_calls(thread: Pid, mut is_enough: impl FnMut(u64) -> bool) -> BTreeMap<String, u64> {
    let (mut calls, mut count, mut is_inside) = (BTreeMap::new(), 0, false);
    while is_inside || !is_enough(count) {
        ptrace::syscall(thread, None).unwrap();
        match waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap() {
            WaitStatus::PtraceSyscall(_) => {
                is_inside = !is_inside;
                if is_inside {
                    let call = fs::read_to_string(format!("/proc/{thread}/syscall")).unwrap();
                    *calls.entry(call.split(' ').next().unwrap().to_owned()).or_default() += 1;
                    count += 1;
                }
            }
            WaitStatus::PtraceEvent(..) | WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
            other => panic!("{other:?}"),
        }
    }
    calls
}

/// What the kernel says of a thread of this process.
fn field(thread: Pid, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
}

#[test]
fn looking_costs_those_nothing_who_exchange_messages() {
    roles!(play);
    let (broker, _, _folder) = start();
    let client = Client::connect_to(&broker.address).unwrap();
    let report = |channel: &str, end: &str, count: &str| {
        let all = json(&broker.address);
        all.iter().find(|line| line["channel"] == channel && line["end"] == end)?["report"][count].as_u64()
    };
    let mut asleep = client.receiver("asleep").wait(Wait::Block).open().unwrap();
    let (tell, told) = mpsc::channel();
    let sleeping = thread::spawn(move || {
        tell.send(gettid()).unwrap();
        drop(asleep.get().unwrap());
    });
    let sleeper = told.recv().unwrap();
    until("one sleeps", || {
        report("asleep", "receiver", "sleeps") == Some(1) && field(sleeper, "State:").starts_with('S')
    });
    let woken = field(sleeper, "voluntary_ctxt_switches:");

    let mut other = Other::start(&broker.address, "stream", geteuid().as_raw());
    let streams = Pid::from_raw(other.number("thread "));
    ptrace::seize(streams, Options::PTRACE_O_TRACESYSGOOD).expect("permission to trace a child");
    ptrace::interrupt(streams).unwrap();
    waitpid(streams, Some(WaitPidFlag::__WALL)).unwrap();
    // It looks at its sockets now and then.
    let alone = count_calls(streams, |count| count >= 10);
    let watched = thread::scope(|scope| {
        let watching = scope.spawn(|| {
            for _ in 0..LOOKS {
                let before = report("stream", "sender", "messages");
                until("it says something new", || report("stream", "sender", "messages") > before);
            }
        });
        count_calls(streams, |_| watching.is_finished())
    });
    // One that is traced could not end.
    ptrace::detach(streams, None).unwrap();
    let more: u64 = watched.iter().filter(|(call, _)| !alone.contains_key(*call)).map(|(_, times)| times).sum();
    // Whoever reads a report in the very moment in which it is written has to be woken.
    assert!(more <= 1, "alone it makes the calls {alone:?}, and while somebody looks {watched:?}");
    assert_eq!(field(sleeper, "voluntary_ctxt_switches:"), woken, "one that sleeps was woken by a look");
    let mut sender = client.sender("asleep").slot_size(64).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    send(&mut sender);
    sleeping.join().unwrap();
}
