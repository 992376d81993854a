//! `fbuf top` in terminals: small ones, one that cannot move its cursor, one with a process that is killed, one that closes.

use std::{
    fs::File,
    io::{Read, Write},
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    pty::{OpenptyResult, Winsize, openpty},
    sys::{
        signal::Signal,
        termios::{LocalFlags, tcgetattr},
    },
};

use crate::{
    Place,
    support::{BrokerProcess, Process, Run, fbuf, not_tested, until},
    text,
};

/// A terminal of 12 lines. No child inherits the other side of it, which would keep it open.
fn terminal(columns: u16) -> OpenptyResult {
    let size = Winsize { ws_row: 12, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let terminal = openpty(&size, None).unwrap();
    fcntl(&terminal.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    fcntl(&terminal.slave, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    terminal
}

/// `fbuf top`, in a terminal of its own.
struct Top {
    process: Process,
    /// The terminal, as the program on it has it, so that it stays when that ends.
    terminal: OwnedFd,
    keys: File,
    columns: u16,
    screen: Arc<Mutex<vt100::Parser>>,
}

impl Top {
    fn start(mut top: Command, columns: u16) -> Self {
        let terminal = terminal(columns);
        if !top.get_envs().any(|(name, _)| name == "TERM") {
            top.env("TERM", "xterm");
        }
        let [input, output, error] = [(); 3].map(|()| terminal.slave.try_clone().unwrap());
        // In a session of its own, that terminal is the one that it controls.
        let mut command = Command::new("setsid");
        command.args(["--ctty"]).arg(top.get_program()).args(top.get_args());
        for (name, value) in top.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let process = Process::start(command.stdin(input).stdout(output).stderr(error));
        drop(command);
        let screen = Arc::new(Mutex::new(vt100::Parser::new(12.try_into().unwrap(), columns.try_into().unwrap(), 0)));
        let keys = File::from(terminal.master);
        let (mut shown, seen) = (keys.try_clone().unwrap(), screen.clone());
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // An error when the terminal is closed.
            while let Ok(count @ 1..) = shown.read(&mut bytes) {
                seen.lock().unwrap().process(&bytes[..count]);
            }
        });
        Self { process, terminal: terminal.slave, keys, columns, screen }
    }

    fn rows(&self) -> Vec<String> {
        self.screen.lock().unwrap().screen().rows(0, self.columns).collect()
    }

    fn shows(&self, wanted: &str) -> bool {
        self.rows().iter().any(|row| row.contains(wanted))
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Whether a shell could go on in this terminal.
    fn is_usable(&self) -> bool {
        let flags = tcgetattr(&self.terminal).unwrap().local_flags;
        let parser = self.screen.lock().unwrap();
        let screen = parser.screen();
        flags.contains(LocalFlags::ICANON | LocalFlags::ECHO) && !screen.alternate_screen() && !screen.hide_cursor()
    }
}

fn top(place: &Place) -> Command {
    place.command(&["top", "--every", "0.1"])
}

#[test]
fn nothing_is_zero_and_not_less() {
    let place = Place::new();
    let mut top = Top::start(top(&place), 120);
    until("there is a summary", || top.shows("1 client, 0 channels, 0 endpoints, 0 links; 0 messages/s, 0 bytes/s"));
    assert!(!top.is_usable(), "top does not have the terminal");
    top.press("q");
    assert!(top.process.end().success());
    until("the terminal is given back", || top.is_usable());
}

#[test]
fn a_narrow_window_shows_whole_numbers() {
    let place = Place::new();
    let name = "a/long/name/of/a/channel";
    let _receive = Process::start(place.command(&["recv", name]).stdout(Stdio::null()));
    let wide = Top::start(top(&place), 220);
    until("the whole name is shown", || wide.rows().iter().any(|row| row.starts_with(name)));
    // But for those in which nothing stands.
    until("all columns are shown", || wide.shows("program") && wide.shows("sleeps/s") && wide.shows("violations"));
    let narrow = Top::start(top(&place), 40);
    until("names and rates are shown", || narrow.rows().iter().any(|row| row.starts_with("a/long/name/of/a")));
    let rows = narrow.rows();
    let row = rows.iter().find(|row| row.starts_with("a/long")).unwrap();
    let columns: Vec<_> = rows.iter().find(|row| row.starts_with("channel")).unwrap().split_whitespace().collect();
    assert_eq!(columns, ["channel", "end", "messages/s"], "{rows:#?}");
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["a/long/name/of/a/…", "receiver", "0"], "{rows:#?}");
    // The summary is broken where words end.
    assert!(rows.iter().any(|row| row.contains("have forgotten a message")), "{rows:#?}");
}

#[test]
fn keys_are_heard_while_the_broker_is_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start(&folder.path().join("broker"));
    let mut command = fbuf(["top", "--every", "0.1", "--socket"]);
    command.arg(folder.path().join("broker"));
    let mut top = Top::start(command, 120);
    until("there is a summary", || top.shows("1 client"));
    broker.process.signal(Signal::SIGSTOP);
    until("it says that the broker does not answer", || top.shows("the broker"));
    assert!(!top.shows("1 client"), "{:#?}", top.rows());
    top.press("q");
    assert!(top.process.end().success());
    broker.process.signal(Signal::SIGCONT);
}

#[test]
fn a_signal_that_ends_it_gives_the_terminal_back() {
    let place = Place::new();
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
        let mut top = Top::start(top(&place), 120);
        until("there is a summary", || top.shows("1 client"));
        assert!(!top.is_usable(), "top does not have the terminal");
        top.process.signal(signal);
        assert_eq!(top.process.end().signal(), Some(signal as i32));
        until("the terminal is given back", || top.is_usable());
    }
}

#[test]
fn a_terminal_that_is_closed_ends_it_without_a_panic() {
    let place = Place::new();
    let command = top(&place);
    let arguments: Vec<_> = command.get_args().map(|word| word.to_str().unwrap()).collect();
    let program = command.get_program().to_str().unwrap();
    // Also where the signal that says so is ignored.
    for (before, is_ignored) in [("", false), ("trap '' HUP;", true)] {
        let terminal = terminal(120);
        let mut session = Command::new("setsid");
        session.args(["--ctty", "sh", "-c", &format!("{before} exec \"$0\" \"$@\""), program]).args(&arguments);
        session.env("FBUF_BROKER", place.broker.address().to_string()).env("TERM", "xterm");
        let [input, output] = [(); 2].map(|()| terminal.slave.try_clone().unwrap());
        let mut process = Process::start(session.stdin(input).stdout(output).stderr(terminal.slave));
        drop(session);
        let (mut master, mut shown) = (File::from(terminal.master), Vec::new());
        let mut part = [0; 4096];
        while !text(&shown).contains("endpoints") {
            let count = master.read(&mut part).unwrap();
            shown.extend_from_slice(&part[..count]);
        }
        drop(master);
        let ended = process.end();
        // It may find its terminal closed before the signal comes.
        let (signal, status) = (ended.signal(), ended.code());
        assert!(status == Some(1) || !is_ignored && signal == Some(Signal::SIGHUP as i32), "{ended:?}");
    }
}

#[test]
fn a_terminal_without_a_cursor_and_no_terminal_are_refused() {
    let place = Place::new();
    let output = top(&place).run();
    assert!(text(&output.stderr).contains("needs a terminal: for scripts"), "{output:?}");
    for term in ["dumb", ""] {
        let mut command = top(&place);
        command.env("TERM", term);
        let mut top = Top::start(command, 200);
        assert_eq!(top.process.end().code(), Some(1));
        until("it says why", || top.shows("that can move its cursor"));
        assert!(top.is_usable());
    }
}

#[test]
fn there_are_no_colours_where_none_are_wanted() {
    let place = Place::new();
    let mut command = top(&place);
    command.env("NO_COLOR", "1");
    let top = Top::start(command, 120);
    until("there is a summary", || top.shows("1 client"));
    let parser = top.screen.lock().unwrap();
    let screen = parser.screen();
    let cells = (0..12).flat_map(|row| (0..120).filter_map(move |column| screen.cell(row, column)));
    assert!(cells.into_iter().all(|cell| cell.fgcolor() == vt100::Color::Default));
}

#[test]
fn an_open_that_takes_long_shows_that_it_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let broker = BrokerProcess::start(&folder.path().join("broker"));
    let command = |channel: &str| {
        let mut command = fbuf(["send", channel, "-", "--socket"]);
        command.arg(folder.path().join("broker")).env("TERM", "xterm");
        command
    };
    let quick = Top::start(command("quick"), 120);
    let is_open = || {
        let mut list = fbuf(["ls", "--socket"]);
        text(&list.arg(folder.path().join("broker")).run().stdout).contains("quick")
    };
    until("the quick one is open", is_open);
    assert!(!quick.shows("is opened"), "{:#?}", quick.rows());
    // As if there were much more to reserve.
    let traced = folder.path().join("trace");
    let slow = format!("strace -f -o {} -e trace=fallocate -e inject=fallocate:delay_enter=2500000", traced.display());
    let program = command("slow");
    if !Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
        not_tested("an open is slowed down with strace(1), which is not here");
        return;
    }
    let mut words = slow.split(' ');
    let mut traced = Command::new(words.next().unwrap());
    traced.args(words).arg(program.get_program()).args(program.get_args()).env("TERM", "xterm");
    let slow = Top::start(traced, 120);
    until("it says so", || slow.shows("the channel \"slow\" is opened, and its memory reserved: "));
    until("it is open, and the line is cleared", || !slow.shows("is opened"));
    drop(broker);
}
