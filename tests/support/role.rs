//! Other processes of a test, each in a role: they are this program again.
//!
//! A child runs the test that started it, or another one of the same program: each of these turns to [`roles!`] first,
//! where a child plays its role, and goes no further. So there is no test that tests nothing, and no other program that
//! another user would have to find.

use std::{
    fmt::Display,
    io::{BufRead, BufReader, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{ChildStdout, Command, Stdio},
    str::FromStr,
    sync::OnceLock,
    time::Duration,
};

use fbuf_client::Address;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::geteuid,
};

use super::Process;

/// Where a child finds its role.
const ROLE: &str = "FBUF_TEST_ROLE";

/// What a child says first. What comes before is the harness's, and has the name of a test in it.
const BEGIN: &str = "the role begins";

/// A test that turns to [`roles!`] first.
static ENTRY: OnceLock<String> = OnceLock::new();

/// The first line of a test that starts children. In a child it calls the function with the name of the role, and the test is
/// over. All tests of a program name the same function.
#[allow(unused_macros, reason = "each test binary uses a part of it")]
macro_rules! roles {
    ($play:path) => {
        fn this_test() {}
        if $crate::support::role::begin(std::any::type_name_of_val(&this_test), $play) {
            return;
        }
    };
}
#[allow(unused_imports, reason = "each test binary uses a part of it")]
pub(crate) use roles;

/// Whether this process is a child, which has played its role then.
pub fn begin(test: &str, play: impl FnOnce(&str)) -> bool {
    if let Ok(role) = std::env::var(ROLE) {
        // The test harness has begun a line.
        println!("\n{BEGIN}");
        play(&role);
        return true;
    }
    // As the harness knows it: without the name of the program.
    let test = test.split_once("::").and_then(|(_, test)| test.strip_suffix("::this_test"));
    ENTRY.get_or_init(|| test.expect("the path of a function in the test").to_owned());
    false
}

/// This program, in a role. Another user can run it, wherever it lies.
pub fn command(role: impl Display) -> Command {
    command_of("/proc/self/exe", role)
}

/// The same, of a copy of this program.
pub fn command_of(program: impl AsRef<std::ffi::OsStr>, role: impl Display) -> Command {
    let entry = ENTRY.get().expect("the test begins with `roles!`");
    let mut command = Command::new(program);
    // On the main thread.
    command.args(["--exact", entry, "--nocapture", "--test-threads=1"]);
    command.current_dir("/").env_remove("FBUF_BROKER").env(ROLE, role.to_string()).stdin(Stdio::null());
    command
}

/// A child in a role. Its lines are read.
#[derive(Debug)]
pub struct Other {
    pub process: Process,
    output: BufReader<ChildStdout>,
    has_begun: bool,
}

impl Other {
    /// Starts it as a user, with a broker.
    pub fn start(broker: &Address, role: impl Display, user: u32) -> Self {
        Self::of(as_user(command(role).env("FBUF_BROKER", broker.to_string()), user))
    }

    /// Starts a [`command`].
    pub fn of(command: &mut Command) -> Self {
        let mut process = Process::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let output = BufReader::new(process.0.stdout.take().expect("its output"));
        Self { process, output, has_begun: false }
    }

    /// Sends it a line.
    pub fn tell(&mut self, words: &str) {
        let input = self.process.0.stdin.as_mut().expect("its input");
        writeln!(input, "{words}").expect("a line for it");
    }

    /// The next line that has this in it.
    pub fn hear(&mut self, words: &str) -> String {
        self.next_with(words).unwrap_or_else(|| panic!("it ended before it said {words:?}"))
    }

    /// The same; nothing, if it ends before.
    pub fn next_with(&mut self, words: &str) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line).expect("its output") == 0 {
                return None;
            }
            let line = line.trim_end();
            if self.has_begun && line.contains(words) {
                return Some(line.to_owned());
            }
            self.has_begun |= line == BEGIN;
        }
    }

    /// The numbers in the next line that has this in it.
    pub fn numbers<T: FromStr>(&mut self, words: &str) -> Vec<T> {
        self.hear(words).split_whitespace().filter_map(|word| word.parse().ok()).collect()
    }

    /// The first of them.
    pub fn number<T: FromStr>(&mut self, words: &str) -> T {
        self.numbers(words).into_iter().next().unwrap_or_else(|| panic!("a number beside {words:?}"))
    }

    /// Whether it says anything for so long.
    pub fn has_more_within(&self, time: Duration) -> bool {
        let output = self.output.get_ref().as_fd();
        let mut polled = [PollFd::new(output, PollFlags::POLLIN)];
        let time = PollTimeout::try_from(time).expect("a time");
        !self.output.buffer().is_empty() || poll(&mut polled, time).expect("its output") > 0
    }
}

/// Has a command run as a user: root can be another one.
pub fn as_user(command: &mut Command, user: u32) -> &mut Command {
    if user != geteuid().as_raw() {
        command.uid(user).gid(user);
    }
    command
}
