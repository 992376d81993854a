//! A stream that broke off is never taken for a complete one, at either end, and a command that waits says what for.

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{ChildStderr, Command, Stdio},
};

use super::{Place, text};
use crate::support::{BrokerProcess, Process, Run, fbuf, is_root, role::as_user, until};

/// Starts a command, and leaves what it says to be read.
fn start(command: &mut Command) -> (Process, BufReader<ChildStderr>) {
    let mut process = Process::start(command.stderr(Stdio::piped()));
    let said = BufReader::new(process.0.stderr.take().unwrap());
    (process, said)
}

/// The first line that it says.
fn line(said: &mut impl BufRead) -> String {
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    line
}

/// How it ends, and all that it says.
fn end(mut process: Process, mut said: BufReader<ChildStderr>) -> (Option<i32>, String) {
    let mut all = String::new();
    said.read_to_string(&mut all).unwrap();
    (process.end().code(), all)
}

/// Waits until so many receivers are open at the broker of the place.
fn receivers(place: &Place, count: usize) {
    let client = fbuf_client::Client::connect_to(place.broker.address()).unwrap();
    until("receivers are open", || client.status().unwrap().len() == count);
}

#[test]
fn an_input_that_fails_is_no_end_of_the_stream() {
    let place = Place::new();
    for (input, sent, received) in [("/", 1, 3), ("/proc/self/mem", 1, 3), ("/dev/null", 0, 0)] {
        let recv = start(place.command(&["recv", "c"]).stdout(Stdio::null()));
        receivers(&place, 1);
        let output = place.command(&["send", "c", input]).run();
        assert_eq!(output.status.code(), Some(sent), "{input}: {}", text(&output.stderr));
        let (status, said) = end(recv.0, recv.1);
        assert_eq!(status, Some(received), "{input}: {said}");
        assert_eq!(said.contains("broke off its stream with code 1"), received == 3, "{input}: {said}");
    }
}

#[test]
fn send_succeeds_only_if_every_receiver_has_written_out_all() {
    let place = Place::new();
    for round in 0..10 {
        for (output, status) in [("/dev/full", 1), ("/dev/null", 0)] {
            let recv = start(&mut place.command(&["recv", "c", output]));
            receivers(&place, 1);
            let sent = place.command(&["send", "c", "/proc/self/status"]).run();
            assert_eq!(end(recv.0, recv.1).0, Some(status), "{output}");
            assert_eq!(sent.status.code(), Some(status), "{output}, round {round}: {}", text(&sent.stderr));
            assert_eq!(text(&sent.stderr).contains("failed before the end"), status == 1, "{}", text(&sent.stderr));
        }
    }
}

#[test]
fn when_one_of_two_receivers_is_gone_the_other_gets_the_rest_and_the_sender_tells() {
    let place = Place::new();
    let send = start(place.command(&["send", "c", "--receivers", "2"]).stdin(Stdio::piped()));
    let recvs = [0, 1].map(|_| start(place.command(&["recv", "c"]).stdout(Stdio::piped())));
    let (mut sending, mut said) = send;
    let mut input = sending.0.stdin.take().unwrap();
    input.write_all(b"x").unwrap();
    let [(mut dying, _), (mut living, told)] = recvs;
    for recv in [&mut dying, &mut living] {
        recv.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    }
    dying.kill();
    // It hears of the death when it sends, and goes on.
    let said = std::thread::spawn(move || (line(&mut said), said));
    until("it says that a receiver is lost", || {
        input.write_all(b"y").unwrap();
        living.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        said.is_finished()
    });
    let (first, said) = said.join().unwrap();
    assert!(first.contains("died before the end"), "{first}");
    input.write_all(b"the rest").unwrap();
    drop(input);
    let (status, rest) = end(sending, said);
    assert!(status == Some(1) && rest.contains("1 of the receivers did not get everything"), "{rest}");
    let mut all = String::new();
    living.0.stdout.as_mut().unwrap().read_to_string(&mut all).unwrap();
    assert_eq!((&all[..], end(living, told)), ("the rest", (Some(0), String::new())));
}

/// A broker that serves another user, and a command that this user, or that other one, runs at it.
#[test]
fn no_other_user_feeds_a_receiver_or_is_lost_by_a_sender_that_did_not_name_it() {
    const OTHER: u32 = 65_533;
    if !is_root() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start_short(folder.path(), 1024, [OTHER]);
    let (client, program) = (fbuf_client::Client::connect_to(&broker.address).unwrap(), folder.path().join("fbuf"));
    std::fs::copy(fbuf([""]).get_program(), &program).unwrap();
    let run = |words: &[&str], user: Option<u32>| {
        let mut command = Command::new(&program);
        command.args(words).env("FBUF_BROKER", broker.address.to_string()).current_dir("/");
        user.map(|user| as_user(&mut command, user));
        start(command.stdin(Stdio::piped()).stdout(Stdio::piped()))
    };
    let open = |count| until("they are open", || client.status().unwrap().len() == count);

    // A sender of the other user ends without a word, and one more has something to say.
    let (mut recv, mut told) = run(&["recv", "c"], None);
    open(1);
    let (mut empty, mut said) = run(&["send", "c"], Some(OTHER));
    drop(empty.0.stdin.take());
    assert!(line(&mut said).contains("waiting for a receiver of your user or root"));
    assert!(line(&mut said).ends_with("; receive with `--from-users 65533`\n"));
    assert!(line(&mut told).contains("waiting for a sender of your user or root (--from-users accepts others)"));
    assert!(line(&mut told).ends_with("; receive with `--from-users 65533`\n"));
    empty.kill();
    // A receiver of the other user comes, and is killed.
    let (mut lost, mut said) = run(&["recv", "c"], Some(OTHER));
    assert!(line(&mut said).contains("waiting for a sender"));
    let (mut send, said) = run(&["send", "c"], None);
    let mut input = send.0.stdin.take().unwrap();
    input.write_all(b"x").unwrap();
    recv.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    lost.kill();
    open(2);
    input.write_all(b"yz").unwrap();
    drop(input);
    assert_eq!(end(send, said), (Some(0), String::new()));
    let mut rest = String::new();
    recv.0.stdout.as_mut().unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!((&rest[..], recv.end().code()), ("yz", Some(0)));

    // Both name each other: one by its id, the other all.
    let (mut recv, _told) = run(&["recv", "d", "--from-users", "root,65533"], None);
    let (mut send, said) = run(&["send", "d", "--to-users", "*"], Some(OTHER));
    send.0.stdin.take().unwrap().write_all(b"x").unwrap();
    assert_eq!(end(send, said).0, Some(0));
    let mut all = String::new();
    recv.0.stdout.as_mut().unwrap().read_to_string(&mut all).unwrap();
    assert_eq!((&all[..], recv.end().code()), ("x", Some(0)));
}

#[test]
fn a_receiver_that_joins_late_does_not_take_what_it_gets_for_all() {
    let place = Place::new();
    let (mut send, _) = start(place.command(&["send", "c"]).stdin(Stdio::piped()));
    let [(mut first, _), (mut late, mut told)];
    let mut input = send.0.stdin.take().unwrap();
    let recv = || start(place.command(&["recv", "c"]).stdout(Stdio::piped()));
    let get = |recv: &mut Process| recv.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    (first, _) = recv();
    input.write_all(b"x").unwrap();
    get(&mut first);
    (late, told) = recv();
    receivers(&place, 3);
    // The sender lets it in when it sends.
    until("it is let in", || {
        input.write_all(b"x").unwrap();
        get(&mut first);
        let client = fbuf_client::Client::connect_to(place.broker.address()).unwrap();
        client.status().unwrap().iter().filter(|end| end.report.is_some_and(|report| report.links == 1)).count() > 1
    });
    drop(input);
    assert!(line(&mut told).contains("the beginning is missing"));
    let mut rest = Vec::new();
    late.0.stdout.as_mut().unwrap().read_to_end(&mut rest).unwrap();
    assert_eq!((late.end().code(), send.end().code(), first.end().code()), (Some(3), Some(0), Some(0)));
}

#[test]
fn a_command_that_waits_for_longer_than_a_second_says_what_for_and_where() {
    let place = Place::new();
    let address = place.broker.address().to_string();
    let (_recv, mut said) = start(&mut place.command(&["recv", "a"]));
    let at = |channel| format!("on the channel {channel:?} at the broker {address}\n");
    assert_eq!(
        line(&mut said),
        format!("fbuf: waiting for a sender of your user or root (--from-users accepts others) {}", at("a"))
    );
    let (_send, mut said) = start(place.command(&["send", "b"]).stdin(Stdio::piped()));
    assert_eq!(
        line(&mut said),
        format!("fbuf: waiting for a receiver of your user or root (--to-users accepts others) {}", at("b"))
    );
    let (_send, mut said) = start(place.command(&["send", "c", "--receivers", "2"]).stdin(Stdio::piped()));
    let all = "waiting for 2 receivers of your user or root (--to-users accepts others), of which 0 are linked,";
    assert_eq!(line(&mut said), format!("fbuf: {all} {}", at("c")));
    let (_send, mut said) = start(place.command(&["send", "f", "--to-users", "*"]).stdin(Stdio::piped()));
    assert_eq!(line(&mut said), format!("fbuf: waiting for a receiver {}", at("f")));

    // Linked, and nothing comes.
    let (send, _) = start(place.command(&["send", "d"]).stdin(Stdio::piped()));
    let (_recv, mut said) = start(place.command(&["recv", "d"]).stdout(Stdio::null()));
    assert_eq!(line(&mut said), format!("fbuf: waiting for the first message of process {} {}", send.pid(), at("d")));

    // A pipe takes the first of five messages; the receiver holds the second, and the third is in the other slot.
    const MESSAGE: usize = 64 << 10;
    let file = place.path("file");
    std::fs::write(&file, vec![1; 5 * MESSAGE]).unwrap();
    let words = ["send", "e", file.to_str().unwrap(), "--slot-size", "64KiB", "--slots", "2"];
    let (mut send, mut said) = start(&mut place.command(&words));
    let (mut recv, _) = start(place.command(&["recv", "e"]).stdout(Stdio::piped()));
    let all = format!("fbuf: waiting for one of 2 slots, in use by process {} (2), {}", recv.pid(), at("e"));
    assert_eq!(line(&mut said), all);
    let mut output = recv.0.stdout.take().unwrap();
    output.read_exact(&mut [0; 3 * MESSAGE]).unwrap();
    let rest = format!("fbuf: waiting for process {} (1) to write out the rest {}", recv.pid(), at("e"));
    assert_eq!(line(&mut said), rest);
    output.read_to_end(&mut Vec::new()).unwrap();
    assert!(send.end().success() && recv.end().success());
}

#[test]
fn a_lossy_send_waits_for_no_receiver_and_none_takes_what_it_has_got_for_all() {
    let place = Place::new();
    const MESSAGE: usize = 64 << 10;
    let file = place.path("file");
    std::fs::write(&file, vec![1; 100 * MESSAGE]).unwrap();
    let (mut recv, told) = start(place.command(&["recv", "c"]).stdout(Stdio::piped()));
    receivers(&place, 1);
    // The pipe takes the first message, if that is written out before the others are sent; four wait.
    let words = ["send", "c", file.to_str().unwrap(), "--slot-size", "64KiB", "--slots", "8", "--lossy"];
    let sent = place.command(&words).run();
    let said = text(&sent.stderr);
    let left_out: usize = said.split(' ').find_map(|word| word.parse().ok()).expect("how many were left out");
    assert_eq!((sent.status.code(), (90..=96).contains(&left_out)), (Some(0), true), "{said}");
    let mut written = Vec::new();
    recv.0.stdout.take().unwrap().read_to_end(&mut written).unwrap();
    assert_eq!(written.len(), (100 - left_out) * MESSAGE);
    let (status, told) = end(recv, told);
    assert!(status == Some(3) && told.contains(&format!("{left_out} messages are missing")), "{told}");
}
