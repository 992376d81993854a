//! Standard input, output and error that are closed, full, non-blocking, or a pipe that nobody reads: for each
//! subcommand that uses them.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write, pipe},
    os::{fd::AsFd, unix::process::ExitStatusExt},
    path::Path,
    process::{Command, Output, Stdio},
};

use fbuf_client::{Address, Client};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc::SIGPIPE,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

use crate::{
    Place,
    support::{Process, Random, Run, fbuf, until},
    text,
};

/// Every command line that prints on standard output and ends.
const PRINTING: [&[&str]; 9] = [
    &["ls"],
    &["ls", "--json"],
    &["ls", "--by", "client"],
    &["broker", "--check-policy", "POLICY"],
    &["doctor"],
    &["demo", "--bytes", "1MB"],
    &["bench", "latency", "--peer", "fbuf", "--size", "64", "--runs", "1", "--seconds", "0.01"],
    &["--help"],
    &["recv", "--version"],
];

const POLICY: &str = "[[rule]]\nname = \"x\"\nusers = [\"root\"]\nsend = [\"*\"]\nreceive = [\"*\"]\n";

/// Runs each of them in turn, with a receiver there to be listed.
fn each_printing(mut run: impl FnMut(Command) -> Output, mut check: impl FnMut(&str, Output)) {
    let place = Place::new();
    fs::write(place.path("policy"), POLICY).unwrap();
    let _there = Process::start(place.command(&["recv", "somewhere"]).stdout(Stdio::null()));
    let listed = || text(&place.command(&["ls"]).run().stdout).contains("somewhere");
    until("a receiver is listed", listed);
    for words in PRINTING {
        let policy = place.path("policy");
        let words = words.iter().map(|&word| if word == "POLICY" { policy.to_str().unwrap() } else { word });
        let words: Vec<_> = words.collect();
        check(&words.join(" "), run(place.command(&words)));
    }
}

/// Has a shell start it, which can close a descriptor.
fn through_shell(command: &Command, redirection: &str) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("exec \"$0\" \"$@\" {redirection}")])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
}

/// What is wrong is said in one line, which is no panic.
fn assert_said(words: &str, output: &Output, status: i32, wanted: &str) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{words}: {output:?}");
    assert!(said.contains(wanted) && said.starts_with("fbuf: ") && said.lines().count() == 1, "{words}: {said}");
}

fn set_nonblocking(pipe: &impl AsFd) {
    fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
}

/// A pipe that nobody will read any more.
fn closed_pipe() -> PipeWriter {
    let (_, writer) = pipe().unwrap();
    until_unread(&writer);
    writer
}

/// Waits until no process has the reader: one that another test starts has it too, until it executes its program.
fn until_unread(writer: &PipeWriter) {
    until("nobody has the reader", || {
        let mut polled = [PollFd::new(writer.as_fd(), PollFlags::empty())];
        poll(&mut polled, PollTimeout::ZERO).unwrap();
        polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
    });
}

#[test]
fn what_is_printed_arrives() {
    each_printing(
        |mut command| command.run(),
        |words, output| {
            assert!(output.status.success() && !output.stdout.is_empty(), "{words}: {output:?}");
            assert_eq!(text(&output.stderr), "", "{words}");
        },
    );
}

#[test]
fn a_pipe_that_nobody_reads_ends_a_command_as_sigpipe_does() {
    each_printing(
        |mut command| Process(command.stdout(closed_pipe()).stderr(Stdio::piped()).spawn().unwrap()).output(),
        |words, output| {
            assert_eq!(output.status.signal(), Some(SIGPIPE), "{words}: {output:?}");
            assert_eq!(text(&output.stderr), "", "{words}");
        },
    );
}

#[test]
fn a_full_disk_is_an_error() {
    each_printing(
        |mut command| {
            let full = File::options().write(true).open("/dev/full").unwrap();
            Process(command.stdout(full).stderr(Stdio::piped()).spawn().unwrap()).output()
        },
        |words, output| assert_said(words, &output, 1, "standard output cannot be written: No space left on device"),
    );
}

#[test]
fn a_closed_standard_output_is_an_error() {
    each_printing(
        |command| through_shell(&command, ">&-").run(),
        |words, output| assert_said(words, &output, 1, "standard output is closed"),
    );
    let place = Place::new();
    let received = through_shell(&place.command(&["recv", "c"]), ">&-").run();
    assert_said("recv", &received, 1, "standard output is closed");
}

#[test]
fn a_non_blocking_standard_output_is_waited_for() {
    each_printing(
        |mut command| {
            let (mut reader, writer) = pipe().unwrap();
            set_nonblocking(&writer);
            // As little room as a pipe can have, and none at first.
            fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
            (&writer).write_all(&[b'x'; 4096]).unwrap();
            let child = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
            drop(command);
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            let mut output = Process(child).output();
            output.stdout = read.split_off(4096);
            output
        },
        |words, output| {
            assert!(output.status.success() && !output.stdout.is_empty(), "{words}: {output:?}");
            assert_eq!(text(&output.stderr), "", "{words}");
        },
    );
}

#[test]
fn standard_error_that_cannot_be_written_changes_no_status() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let place = Place::new();
    let status = |stderr: Stdio| place.command(&["send", "a\nb", "/dev/null"]).stderr(stderr).run_to_its_end().code();
    assert_eq!([status(full().into()), status(closed_pipe().into())], [Some(1); 2]);
    let status = |stderr: Stdio| fbuf(["no-such-command"]).stderr(stderr).run_to_its_end().code();
    assert_eq!([status(full().into()), status(closed_pipe().into())], [Some(2); 2]);
    let closed = through_shell(&fbuf(["no-such-command"]), "2>&-").run_to_its_end();
    assert_eq!(closed.code(), Some(2));
    // It says how messages are protected, before it sends them.
    let mut receive = Process::start(place.command(&["recv", "c"]).stdout(Stdio::null()));
    let sent = place.command(&["send", "c", "/dev/null", "--protection", "sealed"]).stderr(full()).run_to_its_end();
    assert!(sent.success() && receive.end().success());
    // It says that its sender has died, which its status says too.
    for (stderr, is_said) in [(Stdio::piped(), true), (full().into(), false), (closed_pipe().into(), false)] {
        let mut receive = place.command(&["recv", "c"]);
        let mut receive = Process::start(receive.stdout(Stdio::piped()).stderr(stderr));
        let mut send = Process::start(place.command(&["send", "c"]).stdin(Stdio::piped()).stderr(Stdio::null()));
        send.0.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        receive.0.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        send.kill();
        assert_eq!(receive.end().code(), Some(3));
        let mut said = String::new();
        receive.0.stderr.take().map(|mut stderr| stderr.read_to_string(&mut said).unwrap());
        assert_eq!(said.contains("died before it ended its stream"), is_said, "{said}");
    }
}

/// A pipe between a sender and a receiver, both of which have their end non-blocking.
fn copy_through(place: &Place, input: PipeReader, output: PipeWriter) -> [Process; 2] {
    set_nonblocking(&input);
    set_nonblocking(&output);
    let receive = Process::start(place.command(&["recv", "c", "-"]).stdout(output));
    let send = Process::start(place.command(&["send", "c", "-"]).stdin(input));
    [send, receive]
}

#[test]
fn non_blocking_pipes_are_waited_for() {
    let place = Place::new();
    let ((input, mut feed), (mut drain, output)) = (pipe().unwrap(), pipe().unwrap());
    let processes = copy_through(&place, input, output);
    let data = Random(8).bytes(700_000);
    // Nothing comes at first, and nobody reads at first.
    until("both wait", || text(&place.command(&["ls", "--json"]).run().stdout).contains("\"links\":1"));
    let expected = data.clone();
    let feeding = std::thread::spawn(move || feed.write_all(&data).unwrap());
    let mut back = vec![0; expected.len()];
    for part in back.chunks_mut(1000) {
        drain.read_exact(part).unwrap();
    }
    feeding.join().unwrap();
    assert_eq!(drain.read(&mut [0]).unwrap(), 0, "there is more than was sent");
    assert!(back == expected);
    assert!(processes.into_iter().all(|mut process| process.end().success()));
}

#[test]
fn a_closed_standard_input_is_no_empty_stream() {
    let place = Place::new();
    let sent = through_shell(&place.command(&["send", "c"]), "<&-").run();
    assert_said("send", &sent, 1, "standard input is closed");
    // An empty one is one.
    let mut receive = Process::start(place.command(&["recv", "c"]).stdout(Stdio::null()));
    assert!(place.command(&["send", "c"]).stdin(Stdio::null()).run_to_its_end().success());
    assert!(receive.end().success());
    // A file needs none of them.
    let mut receive = Process::start(&mut through_shell(&place.command(&["recv", "c", "/dev/null"]), "<&- >&-"));
    let sent = through_shell(&place.command(&["send", "c", "/dev/null"]), "<&- >&-").run_to_its_end();
    assert!(sent.success() && receive.end().success());
}

#[test]
fn a_receiver_whose_output_nobody_reads_ends_as_by_sigpipe() {
    let place = Place::new();
    let (reader, writer) = pipe().unwrap();
    let output = writer.try_clone().unwrap();
    let receive = place.command(&["recv", "c"]).stdout(output).stderr(Stdio::piped()).spawn().unwrap();
    let mut send = place.command(&["send", "c"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    send.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    (&reader).read_exact(&mut [0]).unwrap();
    drop(reader);
    until_unread(&writer);
    send.stdin.take().unwrap().write_all(b"y").unwrap();
    let [received, sent] = [receive, send].map(|process| Process(process).output());
    assert_eq!(received.status.signal(), Some(SIGPIPE), "{received:?}");
    // Each may have had to wait for the other.
    assert!(text(&received.stderr).lines().all(|line| line.starts_with("fbuf: waiting for a ")), "{received:?}");
    assert_eq!(sent.status.code(), Some(1), "{sent:?}");
    assert!(text(&sent.stderr).contains("failed before the end"), "{sent:?}");
}

#[test]
fn a_receiver_whose_disk_is_full_says_so() {
    let place = Place::new();
    let receive = place.command(&["recv", "c", "/dev/full"]).stderr(Stdio::piped()).spawn().unwrap();
    let _send = Process::start(place.command(&["send", "c", "/bin/sh"]).stderr(Stdio::null()));
    let output = Process(receive).output();
    assert_said("recv", &output, 1, "/dev/full cannot be written: No space left on device");
}

#[test]
fn a_file_is_left_as_it_is_if_nothing_can_be_received() {
    let place = Place::new();
    let kept = place.path("kept");
    fs::write(&kept, "kept").unwrap();
    for (channel, is_kept) in [("a\nb", true), ("c", false)] {
        let mut receive = Process::start(place.command(&["recv", channel]).arg(&kept).stderr(Stdio::null()));
        if !is_kept {
            assert!(place.command(&["send", channel, "/dev/null"]).run_to_its_end().success());
        }
        assert_eq!(receive.end().success(), !is_kept);
        assert_eq!(fs::read(&kept).unwrap(), if is_kept { &b"kept"[..] } else { b"" });
    }
}

/// A channel that is misspelt costs nobody a file; and what comes replaces it, also if it is less, or nothing.
#[test]
fn a_file_is_left_as_it_is_until_something_comes() {
    let place = Place::new();
    let (file, input) = (place.path("file"), place.path("input"));
    let receive = || Process::start(&mut place.command(&["recv", "c", file.to_str().unwrap()]));
    fs::write(&file, "what was there before").unwrap();
    let mut nobody_comes = receive();
    until("it waits", || text(&place.command(&["ls"]).run().stdout).contains("receiver"));
    nobody_comes.kill();
    assert_eq!(fs::read(&file).unwrap(), b"what was there before");
    for content in ["new", ""] {
        fs::write(&input, content).unwrap();
        let mut receiver = receive();
        assert!(place.command(&["send", "c", input.to_str().unwrap()]).run().status.success());
        assert!(receiver.end().success());
        assert_eq!(fs::read_to_string(&file).unwrap(), content);
    }
}

#[test]
fn a_sender_that_waits_for_no_receiver_says_that_there_is_none() {
    let place = Place::new();
    let input = place.path("input");
    fs::write(&input, "x").unwrap();
    let output = place.command(&["send", "c", input.to_str().unwrap(), "--receivers", "0"]).run();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("there is no receiver"), "{}", text(&output.stderr));
}

#[test]
fn a_command_line_that_is_not_understood_is_explained_in_one_line() {
    for (words, wanted) in [
        (&["recv"][..], "the following required arguments were not provided: <CHANNEL>; usage: fbuf recv"),
        (&["send", "c", "--protecton", "sealed"], "a similar argument exists: '--protection'"),
        (&["send", "c", "--protection", "sealt"], "[possible values: volatile, leased, sealed]"),
    ] {
        assert_said(words[0], &fbuf(words).run(), 2, wanted);
    }
}

#[test]
fn a_file_in_place_of_the_channel_is_an_error() {
    let place = Place::new();
    let file = place.path("file");
    fs::write(&file, "x").unwrap();
    let channel = file.to_str().unwrap();
    let output = place.command(&["send", channel]).run();
    assert_said("send", &output, 2, &format!("no channel was given, only the file {channel}: say `fbuf send CHANNEL"));
    // The same without a slash, where nothing was given to send,
    let mut here = place.command(&["send", "file"]);
    let output = here.current_dir(place.folder.path()).run();
    assert_said("send", &output, 2, "no channel was given");
    // but a channel may be called like a file.
    for (words, piped) in [(vec!["send", "file"], true), (vec!["send", channel, "-"], false)] {
        let mut receive = Process::start(place.command(&["recv", words[1]]).stdout(Stdio::null()));
        let mut send = place.command(&words);
        send.current_dir(place.folder.path()).stdin(if piped { Stdio::piped() } else { Stdio::null() });
        let mut send = Process::start(&mut send);
        drop(send.0.stdin.take());
        assert!(send.end().success() && receive.end().success());
    }
}

#[test]
fn a_file_that_cannot_be_opened_is_refused_before_a_receiver_is_waited_for() {
    let place = Place::new();
    assert_said("send", &place.command(&["send", "c", "/no/such"]).run(), 1, "/no/such cannot be read: No");
}

/// Waits until the broker writes a line with this in it.
fn line_with(log: &mut impl BufRead, wanted: &str) {
    let mut line = String::new();
    while !line.contains(wanted) {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "the log ended before {wanted:?}");
    }
}

/// Waits until a broker listens, which is after there is the file of its socket.
fn until_it_listens(socket: &Path) {
    until("it listens", || Client::connect_to(&Address::new(socket)).is_ok());
}

/// A broker with this as its standard error, which links a sender with a receiver.
fn assert_serves_with_log(stderr: impl Into<Stdio>) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("broker");
    let mut broker = Process::start(fbuf(["broker", "--socket"]).arg(&socket).stderr(stderr));
    until_it_listens(&socket);
    let command = |words: &[&str]| {
        let mut command = fbuf(words);
        command.arg("--socket").arg(&socket);
        command
    };
    let mut receive = Process::start(command(&["recv", "c"]).stdout(Stdio::null()));
    assert!(command(&["send", "c", "/dev/null"]).run_to_its_end().success() && receive.end().success());
    assert!(!broker.has_ended());
    broker.signal(Signal::SIGTERM);
    assert!(broker.end().success());
}

#[test]
fn a_broker_serves_on_whatever_becomes_of_its_log() {
    assert_serves_with_log(File::options().write(true).open("/dev/full").unwrap());
    assert_serves_with_log(closed_pipe());
    let (_unread, writer) = pipe().unwrap();
    let size = fcntl(&writer, FcntlArg::F_GETPIPE_SZ).unwrap() as usize;
    (&writer).write_all(&vec![b'x'; size]).unwrap();
    assert_serves_with_log(writer);
    // A terminal that has been closed.
    let terminal = nix::pty::openpty(None, None).unwrap();
    drop(terminal.master);
    assert_serves_with_log(terminal.slave);
}

#[test]
fn a_log_that_is_read_again_says_how_many_lines_are_missing() {
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = pipe().unwrap();
    let size = fcntl(&writer, FcntlArg::F_GETPIPE_SZ).unwrap() as usize;
    (&writer).write_all(&vec![b'x'; size]).unwrap();
    let mut command = fbuf(["broker", "--socket"]);
    let broker = Process::start(command.arg(folder.path().join("broker")).stderr(writer));
    drop(command);
    until_it_listens(&folder.path().join("broker"));
    // It serves after it has tried to write its first line, for which there is no room.
    let mut list = fbuf(["ls", "--socket"]);
    assert!(list.arg(folder.path().join("broker")).stdout(Stdio::null()).run_to_its_end().success());
    let mut log = BufReader::new(reader);
    log.read_exact(&mut vec![0; size]).unwrap();
    broker.signal(Signal::SIGHUP);
    line_with(&mut log, "lines of this log could not be written");
    line_with(&mut log, "the policy was read again");
}

#[test]
fn a_log_has_colours_only_where_they_are_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let colours = |name: &str, value: &str| {
        let terminal = nix::pty::openpty(None, None).unwrap();
        let mut command = fbuf(["broker", "--socket"]);
        command.arg(folder.path().join("broker")).env("TERM", "xterm").env_remove("NO_COLOR").env(name, value);
        let broker = Process::start(command.stderr(terminal.slave));
        drop(command);
        let mut log = BufReader::new(File::from(terminal.master));
        let mut line = String::new();
        while !line.contains("listening") {
            log.read_line(&mut line).unwrap();
        }
        drop(broker);
        line.contains('\x1b')
    };
    assert!(colours("NO_COLOR", ""), "an empty one says nothing");
    assert!(!colours("NO_COLOR", "1") && !colours("TERM", "dumb") && !colours("TERM", ""));
}
