//! Signals: as the first process of a PID namespace (a container's command), and in commands that have started others.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    Place,
    support::{Process, Run, fbuf, not_tested, until},
    text,
};

/// The children of a process.
fn children(process: u32) -> Vec<u32> {
    let told = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    told.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// As the first process of a PID namespace, through unshare(1), which ends with its status.
fn first_process(command: &Command) -> Command {
    let mut unshare = Command::new("unshare");
    unshare.args(["--pid", "--fork", "--"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        value.map(|value| unshare.env(name, value));
    }
    unshare.stdin(Stdio::null());
    unshare
}

fn can_unshare() -> bool {
    let tried = Command::new("unshare").args(["--pid", "--fork", "true"]).stderr(Stdio::null()).status();
    let can = tried.is_ok_and(|status| status.success());
    if !can {
        not_tested("a command is the first process of a PID namespace, which unshare(1) does not make here");
    }
    can
}

#[test]
fn the_first_process_of_a_namespace_ends_by_signals() {
    if !can_unshare() {
        return;
    }
    let place = Place::new();
    let socket = place.path("broker");
    // A process that does nothing about signals does not hear them there.
    let mut deaf = Process::start(&mut first_process(Command::new("sleep").arg("1000")));
    let commands: [(&[&str], i32); 3] =
        [(&["recv", "taken/first"], 143), (&["send", "given/first", "-"], 143), (&["broker"], 0)];
    for (words, status) in commands {
        let mut command = place.command(words);
        if words == ["broker"] {
            command.arg("--socket").arg(&socket);
        }
        let mut unshare = Process::start(first_process(&command).stderr(Stdio::null()));
        // Not before: a signal that comes before it is awaited is dropped.
        let is_there = || match words {
            ["broker"] => socket.exists(),
            _ => text(&place.command(&["ls"]).run().stdout).contains(words[1]),
        };
        until("it is there", is_there);
        let inside = Pid::from_raw(children(unshare.pid())[0] as i32);
        kill(inside, Signal::SIGTERM).unwrap();
        assert_eq!(unshare.end().code(), Some(status), "{words:?}");
    }
    let inside = Pid::from_raw(children(deaf.pid())[0] as i32);
    kill(inside, Signal::SIGTERM).unwrap();
    assert!(!deaf.has_ended(), "a signal without a handler ended the first process of a namespace");
    kill(inside, Signal::SIGKILL).unwrap();
    deaf.end();
}

#[test]
fn elsewhere_a_signal_is_what_ended_a_command() {
    let place = Place::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut receive = Process::start(place.command(&["recv", "c"]).stdout(Stdio::null()));
        until("it is there", || text(&place.command(&["ls"]).run().stdout).contains("receiver"));
        receive.signal(signal);
        assert_eq!(receive.end().signal(), Some(signal as i32));
        until("it is gone", || text(&place.command(&["ls"]).run().stdout).contains("no endpoint"));
    }
}

#[test]
fn a_demo_that_cannot_be_leaves_no_process() {
    for words in [&["--message", "2GiB"][..], &["--message", "0"], &["--over", "pipe", "--message", "16EiB"]] {
        let child = fbuf(["demo", "--bytes", "1MB"]).args(words).stderr(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        let output = Process(child).output();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("--message can be 1B to 1GiB") && said.lines().count() == 1, "{said}");
        assert_eq!(children(pid), Vec::<u32>::new());
    }
    let output = fbuf(["demo", "/dev/zero"]).run();
    assert!(text(&output.stderr).contains("no regular file"), "{output:?}");
}

#[test]
fn the_second_process_of_a_demo_does_not_outlive_the_first() {
    let place = Place::new();
    let command = place.command(&["demo", "--receive", "--over", "fbuf"]);
    let mut first = Command::new("sh");
    first.args(["-c", "\"$0\" \"$@\" & read _"]).arg(command.get_program()).args(command.get_args());
    first.env("FBUF_BROKER", place.broker.address().to_string()).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut first = Process::start(&mut first);
    let is_there = || text(&place.command(&["ls"]).run().stdout).contains("receiver");
    until("it is there", is_there);
    first.kill();
    until("it is gone", || !is_there());
}
