//! The command, as a user runs it: what it copies, what it prints and where, what it says when something is wrong.

mod errors;
mod signals;
mod standard;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod terminal;

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::Path,
    process::Stdio,
};

use fbuf_broker::Embedded;
use support::{BrokerProcess, Process, Random, Run, fbuf, until};

struct Place {
    broker: Embedded,
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { broker: Embedded::start().unwrap(), folder: tempfile::tempdir().unwrap() }
    }

    fn command(&self, words: &[&str]) -> std::process::Command {
        let mut command = fbuf(words);
        command.env("FBUF_BROKER", self.broker.address().to_string());
        command
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

#[test]
fn a_copy_is_complete_when_send_exits() {
    let place = Place::new();
    let mut random = Random(3);
    for size in [0, 1, 1 << 20, (1 << 20) + 1, 33_333_333] {
        let (original, copy) = (place.path("original"), place.path("copy"));
        fs::write(&original, random.bytes(size)).unwrap();
        // fbuf recv c > copy & fbuf send c original; cmp original copy
        let mut receive = Process::start(place.command(&["recv", "c"]).stdout(File::create(&copy).unwrap()));
        let sent = place.command(&["send", "c"]).arg(&original).run_to_its_end();
        assert!(sent.success());
        assert!(fs::read(&original).unwrap() == fs::read(&copy).unwrap(), "{size} bytes differ");
        assert!(receive.end().success());
    }
}

#[test]
fn the_sender_may_start_first_and_files_may_be_named() {
    let place = Place::new();
    let (original, copy) = (place.path("original"), place.path("copy"));
    fs::write(&original, Random(4).bytes(5_000_000)).unwrap();
    let mut send = Process::start(place.command(&["send", "c"]).stdin(File::open(&original).unwrap()));
    let received = place.command(&["recv", "c"]).arg(&copy).run_to_its_end();
    assert!(received.success() && send.end().success());
    assert!(fs::read(&original).unwrap() == fs::read(&copy).unwrap());
}

#[test]
fn the_exit_status_tells_a_sender_that_died_from_one_that_ended() {
    let place = Place::new();
    let mut send = Process::start(place.command(&["send", "c"]).stdin(Stdio::piped()));
    let mut receive = Process::start(place.command(&["recv", "c"]).stdout(Stdio::piped()).stderr(Stdio::piped()));
    send.0.stdin.as_mut().unwrap().write_all(b"half of").unwrap();
    let mut half = [0; 7];
    receive.0.stdout.as_mut().unwrap().read_exact(&mut half).unwrap();
    assert_eq!(&half, b"half of");
    send.kill();
    assert_eq!(receive.end().code(), Some(3));
    let mut said = String::new();
    receive.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("died before it ended its stream"), "{said}");
}

#[test]
fn send_says_so_when_its_receiver_dies() {
    let place = Place::new();
    let mut send = Process::start(place.command(&["send", "c"]).stdin(Stdio::piped()).stderr(Stdio::piped()));
    let mut receive = Process::start(place.command(&["recv", "c"]).stdout(Stdio::piped()));
    let mut input = send.0.stdin.take().unwrap();
    input.write_all(b"x").unwrap();
    receive.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    receive.kill();
    drop(input);
    assert_eq!(send.end().code(), Some(1));
    let mut said = String::new();
    send.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("died before the end"), "{said}");
}

#[test]
fn errors_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("no-broker");
    let run = |words: &[&str]| {
        let output = fbuf(words).arg("--socket").arg(&missing).run();
        assert_eq!(output.status.code(), Some(1));
        text(&output.stderr)
    };
    let said = run(&["recv", "c"]);
    assert!(said.contains("no-broker") && said.contains("start `fbuf broker`"), "{said}");
    // Something that listens there and is no broker.
    let _listener = std::os::unix::net::UnixListener::bind(&missing).unwrap();
    let said = run(&["recv", "c"]);
    assert!(said.contains("does not answer like a broker"), "{said}");
    let place = Place::new();
    let output = place.command(&["send", "a\nb", "/dev/null"]).run();
    assert!(text(&output.stderr).contains("control character"), "{}", text(&output.stderr));
    let output = place.command(&["send", "c", "/dev/null", "--slot-size", "100TiB"]).run();
    assert!(text(&output.stderr).contains("--slot-size can be"), "{}", text(&output.stderr));
    let output = place.command(&["send", "c", "/no/such/file"]).run();
    assert!(text(&output.stderr).contains("/no/such/file"), "{}", text(&output.stderr));
}

#[test]
fn global_options_stand_before_or_after_the_subcommand_that_they_mean_something_to() {
    let place = Place::new();
    let address = place.broker.address().to_string();
    for words in [["--socket", &address, "ls"], ["ls", "--socket", &address]] {
        let output = fbuf(words).run();
        assert!(output.status.success(), "{output:?}");
    }
    for words in [&["demo", "--bytes", "1"][..], &["bench", "once"], &["broker"]] {
        let output = fbuf(["--socket", "/x", "--broker-user", "1"]).args(words).run();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(text(&output.stderr).starts_with("fbuf: "), "{output:?}");
    }
}

#[test]
fn the_demo_compares_hashes_and_prints_a_row_for_each_way() {
    for (words, messages) in [(&["--bytes", "20MB"][..], "20"), (&["--bytes", "1MB", "--message", "999"], "1002")] {
        let output = fbuf(["demo"]).args(words).run();
        let (said, errors) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{errors}");
        assert_eq!(errors, "", "there is a progress bar in a pipe");
        for over in ["fbuf", "pipe", "socket"] {
            let row = said.lines().find(|line| line.starts_with(over)).expect(over);
            assert_eq!(row.split_whitespace().nth(4), Some(messages), "{said}");
        }
        assert!(said.contains("All hashes are equal"), "{said}");
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("data");
    fs::write(&file, Random(5).bytes(3_000_000)).unwrap();
    let output = fbuf(["demo"]).arg(&file).run();
    assert!(output.status.success() && text(&output.stdout).contains("3000000"));
}

#[test]
fn streaming_goes_on_when_the_broker_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&socket);
    let command = |words: &[&str]| {
        let mut command = fbuf(words);
        command.arg("--socket").arg(&socket);
        command
    };
    let mut receive = Process::start(command(&["recv", "c"]).stdout(Stdio::piped()));
    let mut send = Process::start(command(&["send", "c"]).stdin(Stdio::piped()));
    let (mut input, mut output) = (send.0.stdin.take().unwrap(), receive.0.stdout.take().unwrap());
    let data = Random(6).bytes(20_000_000);
    let (first, second) = data.split_at(1000);
    input.write_all(first).unwrap();
    let mut back = vec![0; first.len()];
    output.read_exact(&mut back).unwrap();
    assert!(back == first);
    broker.process.kill();
    let expected = second.to_vec();
    let reading = std::thread::spawn(move || {
        let mut back = Vec::new();
        output.read_to_end(&mut back).unwrap();
        assert!(back == expected);
    });
    input.write_all(second).unwrap();
    drop(input);
    assert!(send.end().success() && receive.end().success());
    reading.join().unwrap();
}

#[test]
fn nothing_is_left_in_any_file_system() {
    let entries = |path: &str| {
        let mut names: Vec<_> = fs::read_dir(path)
            .map(|entries| entries.flatten().map(|entry| entry.file_name()).collect())
            .unwrap_or_default();
        names.retain(|name: &std::ffi::OsString| name.to_string_lossy().contains("fbuf"));
        names
    };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("broker");
    let mut broker = BrokerProcess::start(&socket);
    let mut command = fbuf(["send", "c", "--socket"]);
    let mut send = Process::start(command.arg(&socket).stdin(Stdio::piped()));
    let mut command = fbuf(["recv", "c", "--socket"]);
    let mut receive = Process::start(command.arg(&socket).stdout(Stdio::piped()));
    send.0.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    receive.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    // While it runs, the socket is all there is; killed, that stays, and the next broker replaces it.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    send.kill();
    receive.kill();
    broker.process.kill();
    assert_eq!(entries("/dev/shm"), Vec::<std::ffi::OsString>::new());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    let mut broker = BrokerProcess::start(&socket);
    broker.process.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(broker.process.end().success());
    until("the socket is gone", || !Path::new(&socket).exists());
}
