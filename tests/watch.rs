//! What `fbuf ls`, a program and Prometheus see of a broker and its clients.

mod support;

use std::{
    io::{BufRead, Read, Write},
    net::TcpStream,
    time::Duration,
};

use fbuf_client::{Client, EndStatus, EndpointStatus, Receiver, Sender};
use serde_json::Value;
use support::{BrokerProcess, SOON, fbuf, until};

const SLOTS: u64 = 8;

fn start() -> (BrokerProcess, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_with(&folder.path().join("broker"), |command| {
        command.args(["--metrics", "127.0.0.1:0"]);
    });
    (broker, folder)
}

/// A sender and a receiver which holds the first of a hundred messages.
fn stream(client: &Client) -> (Sender, Receiver, fbuf_client::Received) {
    let mut sender = client.sender("camera/front").slot_size(64).slots(SLOTS).open().unwrap();
    let mut receiver = client.receiver("camera/front").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut held = None;
    for _ in 0..100 {
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.resize(10).unwrap();
        sender.write(fbuf).unwrap();
        held.get_or_insert(receiver.get_timeout(SOON).unwrap());
    }
    // Whenever it looks around, it says what it has done.
    sender.look();
    let _ = receiver.get_timeout(Duration::from_millis(5));
    (sender, receiver, held.unwrap())
}

#[test]
fn endpoints_say_what_they_do_and_what_they_hold() {
    let (broker, _folder) = start();
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
    let (broker, _folder) = start();
    let ls = |arguments: &[&str]| {
        let output = fbuf(["ls", "--socket", &broker.address.to_string()]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!((ls(&[]).as_str(), ls(&["--json"]).as_str()), ("no endpoint is open\n", ""));
    let client = Client::connect_to(&broker.address).unwrap();
    let (_sender, _receiver, _held) = stream(&client);
    // More than go into one message.
    let _others: Vec<_> = (0..70).map(|number| client.receiver(&format!("c{number}")).open().unwrap()).collect();
    let text = ls(&[]);
    assert!(text.starts_with("channel ") && text.lines().count() == 73, "{text}");
    let lines: Vec<Value> = ls(&["--json"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 72);
    let sender = lines.iter().find(|line| line["end"] == "sender").unwrap();
    assert_eq!((&sender["channel"], &sender["max_slots"]), (&"camera/front".into(), &SLOTS.into()));
    assert_eq!((&sender["report"]["messages"], &sender["report"]["links"]), (&100.into(), &1.into()));
    let receiver = lines.iter().find(|line| line["end"] == "receiver" && line["channel"] == "camera/front").unwrap();
    assert_eq!((&receiver["report"]["held"], &receiver["report"]["oldest_behind"]), (&1.into(), &99.into()));
    assert_eq!(receiver["report"]["forgotten"], false);
    let refused = fbuf(["top", "--socket", &broker.address.to_string()]).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("fbuf ls --json"));
}

#[test]
fn prometheus_can_read_it() {
    let (mut broker, _folder) = start();
    let mut log = String::new();
    while !log.contains("address=") {
        assert_ne!(broker.log.read_line(&mut log).unwrap(), 0, "{log}");
    }
    let address = log.rsplit("address=").next().unwrap().trim().to_owned();
    let client = Client::connect_to(&broker.address).unwrap();
    let (_sender, _receiver, _held) = stream(&client);
    let ask = |request: &str| {
        let mut connection = TcpStream::connect(&address).unwrap();
        connection.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("application/openmetrics-text"), "{answer}");
    let value = |name: &str, end: &str| {
        let line = answer.lines().find(|line| line.starts_with(&format!("{name}{{")) && line.contains(end));
        line.unwrap_or_else(|| panic!("{name} is missing in {answer}")).rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!(value("fbuf_messages_total", "end=\"sender\""), "100");
    assert_eq!(value("fbuf_held", "end=\"receiver\""), "1");
    assert_eq!(value("fbuf_used", "resource=\"slots\""), SLOTS.to_string());
    assert!(answer.contains("\nfbuf_clients 1") && answer.contains("# EOF"), "{answer}");
    assert!(ask("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(ask("garbage\r\n\r\n").starts_with("HTTP/1.1 400"));
    Client::connect_to(&broker.address).unwrap();
}
