//! What processes and endpoints are called where people watch: by the program that the kernel knows and the label that it gives,
//! neither of which harms a terminal, or the series of other users.

#[path = "support/hostile.rs"]
mod client;
mod support;

use std::{
    fs::{self, Permissions},
    io::Read,
    os::unix::fs::PermissionsExt,
    process::Stdio,
};

use fbuf_client::{Client, OpenError, Receiver, Sender};
use fbuf_core::{
    limits::{MAX_ENDPOINTS, MAX_REQUESTS},
    protection::Protection,
};
use fbuf_protocol::{ClientTransport, ControlClient, Limits, Open, Page, Report, Role, Wire, name::Label};
use serde_json::Value;
use support::{
    BrokerProcess, Metrics, Process, Run, SOON, fbuf,
    role::{Other, roles},
    until,
};
use tarpc::context;
use tokio::task::JoinSet;

/// A user with more labels than there can be series, and one with another.
const HOSTILE: u32 = 65_531;
const HONEST: u32 = 65_530;
const LABELS: usize = 10_000;
/// Endpoints on a channel: a user may not have many on one.
const ON_A_CHANNEL: usize = 100;
/// A name that would turn what follows it red, and around.
const NAME: &str = "\u{1b}[31m\u{202e}x";

/// What a child does.
fn play(role: &str) {
    match role {
        "labels" => open_all(LABELS),
        "named" => {
            fs::write("/proc/self/comm", NAME).unwrap();
            let client = Client::connect().unwrap();
            let _receiver = client.receiver("named").open().unwrap();
            println!("open");
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        }
        "honest" => {
            let (mut sender, mut receiver) = pair(&Client::connect().unwrap(), "mine");
            exchange(&mut sender, &mut receiver, 10);
            sender.poll_events();
            println!("open");
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
            exchange(&mut sender, &mut receiver, 5);
        }
        other => panic!("no such role: {other}"),
    }
}

/// Opens receivers with so many labels, says that each has received all there is, and keeps them until its input ends.
fn open_all(count: usize) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let address = fbuf_client::Address::new(std::env::var_os("FBUF_BROKER").unwrap());
    let labels: Vec<_> = (0..count).collect();
    let clients = labels.chunks(MAX_ENDPOINTS).map(|labels| {
        let socket = client::greet(&address);
        runtime.block_on(async {
            let transport = ClientTransport::new(fbuf_protocol::runtime::watch(socket).unwrap());
            let control = ControlClient::new(tarpc::client::Config::default(), transport).spawn();
            for some in labels.chunks(MAX_REQUESTS) {
                let opened = some.iter().map(|&number| {
                    let open = Open {
                        channel: (number / ON_A_CHANNEL).to_string(),
                        role: Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT },
                        label: Label::new(number.to_string()).ok().map(Wire),
                        users: None,
                        earlier: None,
                    };
                    let control = control.clone();
                    async move { control.open(context::current(), number as u64, open).await.unwrap().unwrap() }
                });
                opened.collect::<JoinSet<_>>().join_all().await;
            }
            let report = Report { messages: u64::MAX, held: u64::MAX, ..Report::default() };
            let reports: Vec<_> = labels.iter().map(|&number| (number as u64, report)).collect();
            for page in Page::split(&reports) {
                control.report(context::current(), page, false).await.unwrap();
            }
            control
        })
    });
    let clients: Vec<_> = clients.collect();
    println!("open");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(clients);
}

fn pair(client: &Client, label: &str) -> (Sender, Receiver) {
    let receiver = client.receiver("labelled").label(label).open().unwrap();
    let mut sender = client.sender("labelled").label(label).slot_size(64).slots(4).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    (sender, receiver)
}

fn exchange(sender: &mut Sender, receiver: &mut Receiver, messages: usize) {
    for _ in 0..messages {
        support::send(sender, b"0123456789");
        drop(receiver.get_timeout(SOON).unwrap());
    }
}

/// The values of a metric, of those series that have all of this in them.
fn values(answer: &str, name: &str, labels: &[&str]) -> Vec<f64> {
    let series = answer.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    let with_labels = series.filter(|line| labels.iter().all(|label| line.contains(label)));
    with_labels.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect()
}

fn started_for_others(folder: &tempfile::TempDir) -> (BrokerProcess, Metrics) {
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let (broker, metrics) = BrokerProcess::start_with_metrics(&folder.path().join("broker"), |command| {
        for user in [HOSTILE, HONEST] {
            command.args(["--allow", &user.to_string()]);
        }
    });
    (broker.forget_log(), metrics)
}

#[test]
fn processes_are_told_apart_by_their_programs_and_labels() {
    roles!(play);
    let folder = tempfile::tempdir().unwrap();
    let (broker, metrics) = BrokerProcess::start_with_metrics(&folder.path().join("broker"), |_| {});
    let socket = broker.address.to_string();
    let mut receiving = fbuf(["recv", "c", "--label", "archive", "--socket", &socket]);
    let _receiving = Process::start(receiving.stdout(Stdio::null()));
    let mut sending = fbuf(["send", "c", "--label", "camera/1", "--socket", &socket]);
    let _sending = Process::start(sending.stdin(Stdio::piped()));
    let named = Other::start(&broker.address, "named", nix::unistd::geteuid().as_raw());
    let ls = |arguments: &[&str]| {
        let output = fbuf(["ls", "--socket", &socket]).args(arguments).run();
        String::from_utf8(output.stdout).unwrap()
    };
    let mut lines: Vec<Value> = Vec::new();
    until("all three are open", || {
        lines = ls(&["--json"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        lines.len() == 3
    });
    let names: Vec<_> = ["sender", "receiver"].map(|end| lines.iter().find(|line| line["end"] == end)).into();
    let names: Vec<_> = names.into_iter().flatten().map(|line| (&line["program"], &line["label"])).collect();
    assert_eq!(names, [(&"fbuf".into(), &"camera/1".into()), (&"fbuf".into(), &"archive".into())]);
    let text = ls(&[]);
    let shown = "\u{fffd}[31m\u{fffd}x";
    assert!(text.contains("camera/1") && text.contains("archive") && text.contains(shown), "{text}");
    assert!(ls(&["--by", "client"]).contains(shown));
    let answer = metrics.get();
    for text in [&text, &answer, &ls(&["--json"])] {
        assert!(!text.contains(['\u{1b}', '\u{202e}']), "{text}");
    }
    let labels = [r#"channel="c""#, r#"program="fbuf""#, r#"label="archive""#, r#"end="receiver""#];
    assert_eq!(values(&answer, "fbuf_links", &labels), [1.0], "{answer}");
    drop(named);
}

#[test]
fn labels_that_cannot_be_are_refused_before_anything_is_opened() {
    let (broker, client) = support::broker();
    for label in ["", "two words", NAME, &"x".repeat(65)] {
        let [one, other] =
            [client.sender("c").label(label).open().map(drop), client.receiver("c").label(label).open().map(drop)]
                .map(Result::unwrap_err);
        assert!(matches!(one, OpenError::Label(_)) && one.to_string() == other.to_string(), "{one}");
    }
    let refused = fbuf(["send", "c", "--label", "two words", "--socket", &broker.address().to_string()])
        .stdin(Stdio::null())
        .run();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("U+0020"), "{said}");
    assert_eq!(client.status().unwrap(), []);
}

#[test]
fn counters_go_on_when_endpoints_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, metrics) = BrokerProcess::start_with_metrics(&folder.path().join("broker"), |_| {});
    let sent = || {
        let (answer, labels) = (metrics.get(), [r#"end="sender""#, r#"label="x""#]);
        [values(&answer, "fbuf_messages_total", &labels), values(&answer, "fbuf_endpoints", &labels)].concat()
    };
    for round in 1..=3 {
        // Nobody asks meanwhile, and each ends with its process's connection.
        let (mut sender, mut receiver) = pair(&Client::connect_to(&broker.address).unwrap(), "x");
        exchange(&mut sender, &mut receiver, 10);
        drop((sender, receiver));
        until("all that was sent is counted", || sent() == [10.0 * f64::from(round), 0.0]);
    }
}

#[test]
fn ten_thousand_labels_of_a_user_are_few_series_and_change_none_of_another() {
    roles!(play);
    if !support::is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (broker, metrics) = started_for_others(&folder);
    let mut hostile = Other::start(&broker.address, "labels", HOSTILE);
    hostile.hear("open");
    let mut honest = Other::start(&broker.address, "honest", HONEST);
    honest.hear("open");
    let answer = metrics.get();
    let [of_hostile, of_honest] = [HOSTILE, HONEST].map(|user| format!("uid=\"{user}\""));
    let endpoints = |labels: &[&str]| values(&answer, "fbuf_endpoints", labels);
    assert_eq!(endpoints(&[&of_hostile]).iter().sum::<f64>(), LABELS as f64);
    assert!(endpoints(&[&of_hostile]).len() <= 128, "{} series", endpoints(&[&of_hostile]).len());
    assert_eq!(endpoints(&[&of_hostile, r#"other="true""#]).len(), 1);
    let mine =
        |answer: &str| values(answer, "fbuf_messages_total", &[&of_honest, r#"label="mine""#, r#"end="sender""#]);
    assert_eq!(mine(&answer), [10.0]);
    assert_eq!(endpoints(&[&of_honest]), [1.0, 1.0]);
    assert!(answer.lines().count() < 5000, "{} lines", answer.lines().count());
    // What has ended is counted still, and labels that are not used any more make place for others.
    for mut process in [honest.process, hostile.process] {
        drop(process.0.stdin.take());
        assert!(process.end().success());
    }
    until("both have gone", || values(&metrics.get(), "fbuf_endpoints", &[]).iter().sum::<f64>() == 0.0);
    assert_eq!(mine(&metrics.get()), [15.0]);
}
