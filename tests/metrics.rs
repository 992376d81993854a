//! Metrics are answered although any process may ask for them, as often and as slowly as it likes: what that takes up is bounded.

mod support;

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use fbuf_client::Client;
use support::{BrokerProcess, Holdings, Metrics, SOON, settled, until, until_is};
use tokio::{net::TcpSocket, runtime::Builder};

/// Of how many connections at once there is one answered, as the server has it.
const MOST: usize = 16;
const ASKED: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

fn start() -> (BrokerProcess, Metrics, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let (broker, metrics) = BrokerProcess::start_with_metrics(&folder.path().join("broker"), |_| {});
    (broker.forget_log(), metrics, folder)
}

/// Whether the other side has closed it, with or without an answer before.
fn has_ended(mut connection: &TcpStream) -> bool {
    connection.set_nonblocking(true).unwrap();
    let mut bytes = [0; 4096];
    loop {
        match connection.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != ErrorKind::WouldBlock,
        }
    }
}

#[test]
fn connections_that_say_nothing_are_few_and_end_soon() {
    let (broker, metrics, _folder) = start();
    assert!(metrics.get().starts_with("HTTP/1.1 200"));
    let before = settled(|| Holdings::of(broker.process.pid()));
    let idle: Vec<_> = (0..4 * MOST).map(|_| metrics.connect()).collect();
    let mut most = 0;
    until("all but a few are closed at once", || {
        most = most.max(Holdings::of(broker.process.pid()).descriptors);
        idle.iter().filter(|one| !has_ended(one)).count() <= MOST
    });
    // And one that is just being closed.
    assert!(most <= before.descriptors + MOST + 1, "{most} descriptors, and {before} before");
    until("the others are closed", || idle.iter().all(has_ended));
    assert!(metrics.get().starts_with("HTTP/1.1 200"));
    until_is("what they took is given back", &before, || Holdings::of(broker.process.pid()));
}

/// A connection for which the kernel keeps little that is not read.
fn narrow(metrics: &Metrics) -> TcpStream {
    let runtime = Builder::new_current_thread().enable_io().build().unwrap();
    let connection = runtime.block_on(async {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect(metrics.0.parse().unwrap()).await.unwrap().into_std().unwrap()
    });
    connection.set_nonblocking(false).unwrap();
    connection
}

/// The answer is longer than what the kernel keeps for a connection that is not read.
#[test]
fn connections_that_do_not_read_their_answer_end_soon() {
    let (broker, metrics, _folder) = start();
    let client = Client::connect_to(&broker.address).unwrap();
    let channel = |number| format!("{number:0>255}");
    let _endpoints: Vec<_> = (0..240).map(|number| client.receiver(&channel(number)).open().unwrap()).collect();
    let length = metrics.get().len();
    let stalled: Vec<_> = (0..MOST)
        .map(|_| {
            let mut connection = narrow(&metrics);
            connection.write_all(ASKED.as_bytes()).unwrap();
            connection
        })
        .collect();
    let begin = Instant::now();
    until("there is a place again", || metrics.try_ask(ASKED).is_some_and(|answer| answer.starts_with("HTTP/1.1 200")));
    assert!(begin.elapsed() < SOON / 4, "{:?}", begin.elapsed());
    for mut connection in stalled {
        let mut answer = Vec::new();
        let _ = connection.read_to_end(&mut answer);
        assert!(answer.len() < length, "all {length} bytes fit into the buffers of the kernel");
    }
}

#[test]
fn all_that_ask_within_a_moment_get_the_same_text() {
    let (broker, metrics, _folder) = start();
    let (begin, mut texts, mut asked) = (Instant::now(), BTreeSet::new(), 0);
    while begin.elapsed() < Duration::from_secs(2) {
        // Something else is the case each time.
        let client = Client::connect_to(&broker.address).unwrap();
        let channel = format!("c{asked}");
        let _receiver = client.receiver(&channel).open().unwrap();
        let answer = metrics.get();
        texts.insert(answer.split_once("\r\n\r\n").unwrap().1.to_owned());
        asked += 1;
    }
    // One is made at most every 400 ms.
    let most = begin.elapsed().as_millis() / 400 + 1;
    assert!(texts.len() as u128 <= most, "{} texts of {asked} in {:?}", texts.len(), begin.elapsed());
}
