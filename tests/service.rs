//! `fbuf broker` as a service manager runs it.

mod support;

use std::{
    fs,
    io::{BufRead, Read},
    os::unix::net::UnixDatagram,
    process::Stdio,
    time::{Duration, Instant},
};

use fbuf_broker::{Embedded, Policy, Quota};
use fbuf_client::{Address, ChannelName, Client, ConnectError, Resource};
use nix::sys::signal::Signal;
use support::{BrokerProcess, HandedOver, Holdings, Process, Run, fbuf, until};

#[test]
fn it_is_ready_only_when_it_accepts() {
    let folder = tempfile::tempdir().unwrap();
    let (notified, path) = (folder.path().join("notify"), folder.path().join("broker"));
    let notify = UnixDatagram::bind(&notified).unwrap();
    let mut command = fbuf(["broker", "--socket"]);
    let mut broker = Process::start(command.arg(&path).env("NOTIFY_SOCKET", &notified).stderr(Stdio::null()));
    let mut buffer = [0; 256];
    let length = notify.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"READY=1\n");
    // No waiting, no second try.
    Client::connect_to(&Address::new(&path)).unwrap();
    broker.signal(Signal::SIGINT);
    let length = notify.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"STOPPING=1\n");
    assert!(broker.end().success());
    assert!(!path.exists(), "the socket file stayed");
}

#[test]
fn a_second_broker_is_refused_and_the_first_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let first = BrokerProcess::start(&path);
    let second = fbuf(["broker", "--socket"]).arg(&path).run();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("a broker listens at") && said.contains("already"), "{said}");
    Client::connect_to(&first.address).unwrap();
}

#[test]
fn the_socket_of_a_dead_broker_is_replaced_and_other_files_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    BrokerProcess::start(&path).process.kill();
    assert!(path.exists());
    let broker = BrokerProcess::start(&path);
    Client::connect_to(&broker.address).unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "precious").unwrap();
    let refused = fbuf(["broker", "--socket"]).arg(&file).run();
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no socket"));
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let nowhere = fbuf(["broker", "--socket", "/no/such/folder/broker"]).run();
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("make its folder"));
}

#[test]
fn sockets_that_were_handed_over_are_served_and_stay() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let listener = HandedOver::at(&path);
    let mut broker = Process::start(listener.broker().stderr(Stdio::null()));
    // The queue of the socket holds this until the broker serves.
    let _client = Client::connect_to(&Address::new(&path)).unwrap();
    assert!(listener.metrics().get().contains("\nfbuf_clients 1\n"));
    broker.signal(Signal::SIGTERM);
    assert!(broker.end().success());
    assert!(path.exists(), "the manager's socket file was removed");
}

#[test]
fn the_log_names_clients_channels_and_refusals() {
    let folder = tempfile::tempdir().unwrap();
    let mut broker = BrokerProcess::start(&folder.path().join("broker"));
    let client = Client::connect_to(&broker.address).unwrap();
    let sender = client.sender("pictures").open().unwrap();
    drop((sender, client));
    let mut log = String::new();
    while !log.contains("left") {
        assert_ne!(broker.log.read_line(&mut log).unwrap(), 0, "{log}");
    }
    assert!(log.contains("joined") && log.contains("pictures"), "{log}");
    broker.process.signal(Signal::SIGTERM);
    broker.log.read_to_string(&mut log).unwrap();
    assert!(log.contains("stopping"), "{log}");
}

#[test]
fn a_client_of_another_version_is_told() {
    use fbuf_core::socket::{Arrival, PacketSocket};
    use fbuf_protocol::{Greeting, VERSION, Verdict};
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start(&folder.path().join("broker"));
    let connect = || PacketSocket::connect(&broker.address.to_kernel().unwrap(), support::SOON).unwrap();
    let answer = |socket: &PacketSocket| loop {
        match socket.receive::<64>().unwrap() {
            Arrival::Nothing => std::thread::yield_now(),
            other => break other,
        }
    };
    let newer = connect();
    newer.send_bytes(&Greeting { version: VERSION + 1, verdict: Verdict::Welcome }.to_bytes()).unwrap();
    let Arrival::Message(bytes, _) = answer(&newer) else { panic!("no answer") };
    assert_eq!(Greeting::from_bytes(&bytes), Ok(Greeting { version: VERSION, verdict: Verdict::OtherVersion }));
    assert!(matches!(answer(&newer), Arrival::HangUp));
    // Garbage is hung up on, without an answer.
    for garbage in [&b"GET / HTTP/1.1"[..], &[0; 64], &[0xff; 5000]] {
        let socket = connect();
        socket.send_bytes(garbage).unwrap();
        assert!(matches!(answer(&socket), Arrival::HangUp));
    }
    Client::connect_to(&broker.address).unwrap();
}

/// A broker that answers as one of another version would: what a user of this one sees.
#[test]
fn a_broker_of_another_version_is_named() {
    use fbuf_core::{process::sys, socket::PacketSocket};
    use fbuf_protocol::{Greeting, Verdict};
    use std::os::fd::AsFd;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker");
    let listener = fbuf_broker::Listener::bind(&Address::new(&path)).unwrap();
    let answering = std::thread::spawn(move || {
        let connection = loop {
            match sys::accept(listener.socket().unwrap().as_fd()) {
                Ok(connection) => break PacketSocket::new(connection).unwrap(),
                Err(_) => std::thread::yield_now(),
            }
        };
        connection.send_bytes(&Greeting { version: 77, verdict: Verdict::OtherVersion }.to_bytes()).unwrap();
        connection
    });
    let error = Client::connect_to(&Address::new(&path)).unwrap_err();
    assert!(matches!(error, ConnectError::OtherVersion { broker: 77, .. }), "{error}");
    drop(answering.join().unwrap());
}

#[test]
fn a_policy_is_checked_and_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let (path, policy) = (folder.path().join("broker"), folder.path().join("policy.toml"));
    let own = nix::unistd::geteuid();
    let write = |receive: &str| {
        let text = format!("[[rule]]\nname = \"readers\"\nusers = [{own}]\nreceive = [{receive:?}]");
        fs::write(&policy, text).unwrap();
    };
    write("news/*");
    let check = || fbuf(["broker", "--check-policy"]).arg(&policy).run();
    let said = check();
    assert!(said.status.success());
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("readers") && said.contains("news/*"), "{said}");

    let mut command = fbuf(["broker", "--socket"]);
    command.arg(&path).arg("--policy").arg(&policy).stderr(Stdio::piped()).env("NO_COLOR", "1");
    let mut broker = Process::start(&mut command);
    let mut log = std::io::BufReader::new(broker.0.stderr.take().unwrap());
    let mut wait_for = |words: &str| {
        let mut line = String::new();
        while !line.contains(words) {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "{words} was not said");
        }
    };
    wait_for("listening");
    let client = Client::connect_to(&Address::new(&path)).unwrap();
    let news = client.receiver("news/today").open().unwrap();
    let refused = client.receiver("mail").open().unwrap_err().to_string();
    assert!(refused.contains("\"mail\"") && refused.contains("readers"), "{refused}");

    write("mail");
    broker.signal(Signal::SIGHUP);
    wait_for("the policy was read again");
    client.receiver("mail").open().unwrap();
    client.receiver("news/today").open().unwrap_err();

    // One that is wrong is said to be, and leaves the one before in force.
    fs::write(&policy, "[[rule]]\nreceive = 7").unwrap();
    broker.signal(Signal::SIGHUP);
    wait_for("stays in force");
    client.receiver("mail").open().unwrap();
    let said = check();
    assert_eq!(said.status.code(), Some(1));
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("line 2"), "{said}");
    drop(news);
}

#[test]
fn the_policy_that_is_installed_serves_root_alone_and_its_examples_are_understood() {
    use fbuf_broker::policy::{Policy, User};
    let text = include_str!("../packaging/policy.toml");
    let serves = |policy: &Policy, id| policy.serves(&User::new(id, vec![id]));
    let policy = Policy::parse(text).unwrap();
    assert!(serves(&policy, 0) && !serves(&policy, 1001));
    // The examples are what follows a rule that is commented out, up to the next line that is empty.
    let mut inside = false;
    let lines = text.lines().map(|line| {
        inside = (inside || ["# [[rule]]", "# [[channel]]"].contains(&line)) && !line.is_empty();
        if inside { line.trim_start_matches(['#', ' ']) } else { line }
    });
    let mut examples = lines.collect::<Vec<_>>().join("\n");
    // Users and groups that need not be here.
    for name in ["\"camera\"", "\"video\"", "\"decoder\"", "\"display\"", "\"adm\""] {
        assert!(examples.contains(name), "{name}");
        examples = examples.replace(name, "1002");
    }
    let policy = Policy::parse(&examples).unwrap();
    assert!(policy.is_confidential(&ChannelName::new("keys/1").unwrap()), "{examples}");
    assert!([0, 1001, 1002].iter().all(|&id| serves(&policy, id)) && !serves(&policy, 1003), "{examples}");
}

/// Much more is logged than a pipe holds.
#[test]
fn a_log_that_nobody_reads_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_with(&folder.path().join("broker"), |command| {
        command.env("RUST_LOG", "trace");
    });
    for number in 0..300 {
        let client = Client::connect_to(&broker.address).unwrap();
        client.receiver(&number.to_string()).open().unwrap();
    }
    // Its unit lets it have no other.
    assert_eq!(Holdings::of(broker.process.pid()).threads, 1);
}

#[test]
fn who_connects_without_end_does_not_fill_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let (mut broker, start) = (BrokerProcess::start(&folder.path().join("broker")), Instant::now());
    for _ in 0..300 {
        Client::connect_to(&broker.address).unwrap();
    }
    broker.process.signal(Signal::SIGTERM);
    let mut log = String::new();
    broker.log.read_to_string(&mut log).unwrap();
    let lines = log.lines().filter(|line| line.contains("joined") || line.contains("left")).count();
    // A hundred in each five seconds.
    let most = 100 * (2 + start.elapsed().as_secs() as usize / 5);
    assert!((100..=most).contains(&lines), "{lines} lines of 600");
}

/// A second's worth may come at once; what comes then is taken as often as the quota says.
#[test]
fn connections_are_requests() {
    const RATE: u32 = 20;
    let quota = Quota::default().with_requests_per_second(RATE);
    let address = Address::new(format!("@fbuf-test-pace-{}", std::process::id()));
    let broker = Embedded::start_at(address, Policy::own().with_quota(quota)).unwrap();
    let start = Instant::now();
    let clients: Vec<_> = (0..RATE + 10).map(|_| Client::connect_to(broker.address()).unwrap()).collect();
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_secs(1) * 10 / RATE, "{} connections in {elapsed:?}", clients.len());
}

/// Many more introductions than a mailbox holds, for a client that reads them.
#[test]
fn a_client_with_many_ends_is_linked_with_all() {
    const MANY: usize = 300;
    let broker = Embedded::start().unwrap();
    let [one, other] = [(); 2].map(|()| Client::connect_to(broker.address()).unwrap());
    let receivers: Vec<_> = (0..MANY).map(|_| one.receiver("c").keep_waiting().open().unwrap()).collect();
    let mut linked: Vec<_> = receivers.into_iter().map(|receiver| (receiver, false)).collect();
    let mut sender = other.sender("c").slot_size(8).slots(2).open().unwrap();
    until("all are linked", || {
        sender.poll_events();
        linked.iter_mut().for_each(|(receiver, is_linked)| {
            let _ = receiver.try_get();
            *is_linked = receiver.senders() == 1;
        });
        sender.receivers() == MANY && linked.iter().all(|&(_, is_linked)| is_linked)
    });
}

#[test]
fn a_refused_connection_is_told_by_which_rule() {
    let quota = Quota::default().with_rule("few").with(Resource::Connections, 1);
    let address = Address::new(format!("@fbuf-test-few-{}", std::process::id()));
    let broker = Embedded::start_at(address, Policy::own().with_quota(quota)).unwrap();
    let _one = Client::connect_to(broker.address()).unwrap();
    let said = Client::connect_to(broker.address()).unwrap_err().to_string();
    assert!(said.contains("1 connections of 1") && said.contains("rule \"few\""), "{said}");
}
