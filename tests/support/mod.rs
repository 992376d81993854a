//! What the tests with real processes share: the command, children that never outlive a test, and
//! the counts of what a process holds.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod calls;
pub mod filter;
pub mod role;

use std::{
    ffi::OsStr,
    fmt, fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Mutex, MutexGuard, Once, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use fbuf_broker::Embedded;
use fbuf_client::{Address, Client, Sender};
use nix::{
    sys::{
        signal::{SigHandler, Signal},
        socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};

/// Longer than anything here takes on a slow machine.
pub const SOON: Duration = Duration::from_secs(60);

/// Longer than a process takes to end that itself waits for something [`SOON`], and says so if it does not come.
const LATER: Duration = SOON.saturating_mul(2);

/// Notes that the test that calls this cannot run here, and why: the test then returns. `.ci/run` lists these notes,
/// and fails if there is any although it runs as root.
pub fn not_tested(why: &str) {
    let thread = std::thread::current();
    let note = format!("not tested: {}: {why}\n", thread.name().unwrap_or("a test"));
    // Past what keeps the output of tests that pass.
    std::io::stderr().write_all(note.as_bytes()).expect("standard error");
    let Some(list) = std::env::var_os("FBUF_NOT_TESTED") else { return };
    let mut list = fs::OpenOptions::new().append(true).create(true).open(list).expect("the list of what is not tested");
    list.write_all(note.as_bytes()).expect("a line in the list of what is not tested");
}

/// Whether this process can start others as other users. If not, the test is noted as [`not_tested`].
pub fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        not_tested("a process is started as another user, which takes root");
    }
    root
}

/// One test of a program at a time, for as long as each keeps this: for what the kernel counts, or a process has once.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A broker in this process, for processes of this user, and a client of it.
pub fn broker() -> (Embedded, Client) {
    let broker = Embedded::start().expect("a broker");
    let client = Client::connect_to(broker.address()).expect("a client");
    (broker, client)
}

/// Sends these bytes: the number of the message.
pub fn send(sender: &mut Sender, bytes: &[u8]) -> u64 {
    let mut fbuf = sender.allocate_timeout(SOON).expect("an fbuf");
    fbuf.write_all(bytes).expect("room for them");
    sender.write(fbuf).expect("a receiver").sequence
}

/// The command under test.
pub fn fbuf(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    fbuf_at(env!("CARGO_BIN_EXE_fbuf"), arguments)
}

/// The same, from another place.
fn fbuf_at(program: impl AsRef<OsStr>, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).env_remove("FBUF_BROKER").env_remove("NOTIFY_SOCKET");
    command
}

/// The slots of this process, as files that can be opened.
pub fn slots() -> Vec<PathBuf> {
    let entries = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let is_slot = |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.starts_with("/memfd:fbuf-slot (deleted)"));
    entries.map(|entry| entry.path()).filter(is_slot).collect()
}

static HEEDED: Once = Once::new();

/// Has children of this process end by signals, also where a shell that ran it in the background, or nohup(1), had them
/// ignored: children inherit that.
#[allow(unsafe_code, reason = "signal(2)")]
fn heed() {
    for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP, Signal::SIGTERM] {
        // SAFETY: no handler is installed.
        let before = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }.expect("a signal's default");
        if !matches!(before, SigHandler::SigDfl | SigHandler::SigIgn) {
            // SAFETY: it is the handler that was there.
            unsafe { nix::sys::signal::signal(signal, before) }.expect("the handler that was there");
        }
    }
}

/// A child process that is killed when it is dropped.
#[derive(Debug)]
pub struct Process(pub Child);

impl Process {
    pub fn start(command: &mut Command) -> Self {
        HEEDED.call_once(heed);
        Self(command.spawn().expect("the command starts"))
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn kill(&mut self) {
        self.0.kill().expect("SIGKILL");
        self.0.wait().expect("its end");
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid() as i32), signal).expect("a signal");
    }

    pub fn has_ended(&mut self) -> bool {
        self.0.try_wait().expect("its state").is_some()
    }

    /// Waits until it ends, of its own accord; fails if it does not, and says what it does instead.
    pub fn end(&mut self) -> ExitStatus {
        self.end_within(LATER)
    }

    pub fn end_within(&mut self, time: Duration) -> ExitStatus {
        // As what waits without a limit does: it need not wait for more to be said to it.
        drop(self.0.stdin.take());
        // One that was waited for before has ended.
        let state = self.change(WaitPidFlag::WEXITED, time);
        assert!(state.is_some(), "process {} has not ended after {time:?}: {}", self.pid(), self.doing());
        self.0.wait().expect("its end")
    }

    /// How it ends, and all that it says on pipes until then.
    pub fn output(mut self) -> Output {
        let stdout = self.0.stdout.take().map(Reading::begin);
        let stderr = self.0.stderr.take().map(Reading::begin);
        let status = self.end();
        let end = |reading: Option<Reading>| reading.map(Reading::end).unwrap_or_default();
        Output { status, stdout: end(stdout), stderr: end(stderr) }
    }

    /// Waits until it is stopped, by whomever; fails if it is not.
    pub fn until_stopped(&self) {
        let state = self.change(WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED, SOON);
        assert!(matches!(state, Some(Ok(WaitStatus::Stopped(..)))), "{state:?}: {}", self.doing());
    }

    /// What waitid(2) says if it says something within this time; it can be asked again.
    fn change(&self, what: WaitPidFlag, time: Duration) -> Option<nix::Result<WaitStatus>> {
        let (say, said) = mpsc::channel();
        let id = Id::Pid(Pid::from_raw(self.pid() as i32));
        let waiting = thread::spawn(move || say.send(waitid(id, what | WaitPidFlag::WNOWAIT)));
        let state = said.recv_timeout(time).ok()?;
        // Threads of this process are counted.
        waiting.join().expect("no panic").expect("it is waited for");
        Some(state)
    }

    /// What it does, as the kernel tells it.
    fn doing(&self) -> String {
        let read = |file| fs::read_to_string(format!("/proc/{}/{file}", self.pid())).unwrap_or_default();
        let status = read("status");
        let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or("gone");
        format!("`{}` is {}, in {}", read("cmdline").replace('\0', " ").trim(), state.trim(), read("wchan"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is read of a pipe until no process has its other end.
struct Reading {
    thread: thread::JoinHandle<Vec<u8>>,
    ended: mpsc::Receiver<()>,
}

impl Reading {
    fn begin(mut pipe: impl Read + Send + 'static) -> Self {
        let (say, ended) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut read = Vec::new();
            pipe.read_to_end(&mut read).expect("a pipe");
            // Nobody listens any more if it took too long.
            let _ = say.send(());
            read
        });
        Self { thread, ended }
    }

    fn end(self) -> Vec<u8> {
        self.ended.recv_timeout(SOON).expect("the end of what it says: no other process has that pipe");
        self.thread.join().expect("no panic")
    }
}

/// Runs a command to its end, and fails if that does not come.
pub trait Run {
    /// How it ends, and all that it says.
    fn run(&mut self) -> Output;
    /// How it ends. What it says goes where it was told to.
    fn run_to_its_end(&mut self) -> ExitStatus;
}

impl Run for Command {
    fn run(&mut self) -> Output {
        Process::start(self.stdout(Stdio::piped()).stderr(Stdio::piped())).output()
    }

    fn run_to_its_end(&mut self) -> ExitStatus {
        Process::start(self).end()
    }
}

/// A copy of this process that has all that this one has, and does nothing until this is dropped.
#[derive(Debug)]
pub struct Fork(nix::unistd::Pid);

impl Fork {
    #[allow(unsafe_code, reason = "fork(2)")]
    pub fn here() -> Self {
        let (started, starts) = nix::unistd::pipe().expect("a pipe");
        // SAFETY: the child does nothing but wait until it is killed.
        match unsafe { nix::unistd::fork() }.expect("a child") {
            nix::unistd::ForkResult::Child => {
                let _ = nix::unistd::write(&starts, b"x");
                loop {
                    nix::unistd::pause();
                }
            }
            nix::unistd::ForkResult::Parent { child } => {
                // The handlers of fork have run in it.
                nix::unistd::read(&started, &mut [0]).expect("its word");
                Self(child)
            }
        }
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        // It waits to be killed.
        let _ = nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(self.0, None);
    }
}

/// A `fbuf broker` in a folder, as a process of its own, and its log.
pub struct BrokerProcess {
    pub process: Process,
    pub address: Address,
    pub log: BufReader<Box<dyn Read + Send>>,
}

impl BrokerProcess {
    /// Starts it and waits until it listens.
    pub fn start(socket: &Path) -> Self {
        Self::start_with(socket, |_| {})
    }

    /// The same, started in a particular way.
    pub fn start_with(socket: &Path, set: impl FnOnce(&mut Command)) -> Self {
        let mut command = fbuf([OsStr::new("broker"), OsStr::new("--socket"), socket.as_os_str()]);
        set(&mut command);
        let mut process = Process::start(command.stderr(Stdio::piped()).env("NO_COLOR", "1"));
        let log: Box<dyn Read + Send> = Box::new(process.0.stderr.take().expect("its log"));
        let mut log = BufReader::new(log);
        let mut line = String::new();
        while !line.contains("listening") {
            line.clear();
            assert_ne!(log.read_line(&mut line).expect("its log"), 0, "the broker ended");
        }
        Self { process, address: Address::new(socket), log }
    }

    /// The same, with at most so many descriptors, for root and these users. Its log is forgotten.
    pub fn start_short(folder: &Path, descriptors: u64, users: impl IntoIterator<Item = u32>) -> Self {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).expect("a folder that others can enter");
        let broker = Self::start_with(&folder.join("broker"), |command| {
            let mut limited = Command::new("prlimit");
            limited.arg(format!("--nofile={descriptors}:{descriptors}")).arg(command.get_program());
            limited.args(command.get_args());
            for user in users {
                limited.args(["--allow", &user.to_string()]);
            }
            limited.env_remove("FBUF_BROKER").env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
            *command = limited;
        });
        broker.forget_log()
    }

    /// The same, which can be asked for metrics.
    pub fn start_with_metrics(socket: &Path, set: impl FnOnce(&mut Command)) -> (Self, Metrics) {
        let mut broker = Self::start_with(socket, |command| {
            command.args(["--metrics", "127.0.0.1:0"]);
            set(command);
        });
        let mut line = String::new();
        while !line.contains("metrics") {
            line.clear();
            assert_ne!(broker.log.read_line(&mut line).expect("its log"), 0, "the broker ended");
        }
        let address = line.trim_end().rsplit('=').next().expect("an address").to_owned();
        (broker, Metrics(address))
    }

    /// Has its log read, and forgotten: it would wait for a reader when the pipe is full.
    pub fn forget_log(mut self) -> Self {
        let log = std::mem::replace(&mut self.log, BufReader::new(Box::new(std::io::empty())));
        std::thread::spawn(move || std::io::copy(&mut { log }, &mut std::io::sink()));
        self
    }
}

/// Where a broker answers questions for metrics.
#[derive(Debug)]
pub struct Metrics(pub String);

impl Metrics {
    pub fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.0).expect("a connection")
    }

    /// The answer to a request; none, if the connection ends before.
    pub fn try_ask(&self, request: &str) -> Option<String> {
        let mut connection = self.connect();
        connection.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).ok()?;
        Some(answer).filter(|answer| !answer.is_empty())
    }

    /// The answer to a request.
    pub fn ask(&self, request: &str) -> String {
        self.try_ask(request).expect("an answer")
    }

    /// The answer to the one request that there is.
    pub fn get(&self) -> String {
        self.ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    }

    /// What is charged to a user, as the broker counts it.
    pub fn used_by(&self, user: u32) -> Vec<String> {
        let answer = self.get();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let uid = format!("uid=\"{user}\"");
        let used = answer.lines().filter(|line| line.starts_with("fbuf_used{") && line.contains(&uid));
        used.map(str::to_owned).collect()
    }
}

/// A socket at a path for clients, and one for metrics, for brokers to be handed over, as by socket activation.
#[derive(Debug)]
pub struct HandedOver {
    clients: OwnedFd,
    metrics: TcpListener,
}

impl HandedOver {
    pub fn at(path: &Path) -> Self {
        let flags = SockFlag::SOCK_CLOEXEC;
        let clients = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).expect("a socket");
        bind(clients.as_raw_fd(), &UnixAddr::new(path).expect("a path")).expect("its name");
        listen(&clients, Backlog::new(50).expect("a length")).expect("a queue");
        Self { clients, metrics: TcpListener::bind("127.0.0.1:0").expect("a socket") }
    }

    pub fn metrics(&self) -> Metrics {
        Metrics(self.metrics.local_addr().expect("its address").to_string())
    }

    /// A broker that serves them.
    pub fn broker(&self) -> Command {
        self.broker_of(Path::new(env!("CARGO_BIN_EXE_fbuf")))
    }

    /// The same, of another binary.
    pub fn broker_of(&self, program: &Path) -> Command {
        let mut command = fbuf_at("sh", ["-c", "exec 3<&0 4<&1 0</dev/null 1>/dev/null; exec \"$0\" broker"]);
        command.arg(program).env("LISTEN_FDS", "2").env("LISTEN_FDS_FIRST_FD", "3");
        command.stdin(self.clients.try_clone().expect("a descriptor"));
        command.stdout(OwnedFd::from(self.metrics.try_clone().expect("a descriptor")));
        command
    }
}

/// What a process holds, as the kernel counts it: compared exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holdings {
    /// Descriptors that are open.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Mappings of shared memory of fbuf.
    pub mappings: usize,
}

impl Holdings {
    pub fn of(process: u32) -> Self {
        let count = |what| fs::read_dir(format!("/proc/{process}/{what}")).expect("/proc").count();
        let maps = fs::read_to_string(format!("/proc/{process}/maps")).expect("/proc");
        Self { descriptors: count("fd"), threads: count("task"), mappings: count_mappings(&maps) }
    }

    pub fn here() -> Self {
        Self::of(std::process::id())
    }

    /// As [`Self::here`], but of threads those that the library started, and that stay: those of a test harness come and
    /// go, and those that close what others have passed end by themselves.
    pub fn of_library() -> Self {
        let tasks = fs::read_dir("/proc/self/task").expect("/proc").flatten();
        // One may have ended meanwhile.
        let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
        Self {
            threads: names.filter(|name| name.starts_with("fbuf-") && name != "fbuf-close\n").count(),
            ..Self::here()
        }
    }
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} descriptors, {} threads, {} mappings", self.descriptors, self.threads, self.mappings)
    }
}

/// Memory of a process that is resident, in KiB. Allocators keep some.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Of its own.
    pub private: u64,
    /// Mapped, and shared with others.
    pub shared: u64,
}

impl Memory {
    pub fn of(process: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{process}/status")).expect("/proc");
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
            value.trim().trim_end_matches(" kB").parse().expect("a number")
        };
        Self { private: field("RssAnon:"), shared: field("RssShmem:") }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} + {} KiB", self.private, self.shared)
    }
}

/// How many mappings of fbuf these lines of /proc/…/maps tell of. Where pages of one differ in what is allowed,
/// there are several lines of it, each of which goes on where the one before ends, in memory and in the file.
fn count_mappings(maps: &str) -> usize {
    let (mut count, mut last) = (0, None);
    let number = |word| u64::from_str_radix(word, 16).expect("a number");
    for line in maps.lines().filter(|line| line.contains("/memfd:fbuf")) {
        let words: Vec<_> = line.split_whitespace().collect();
        let (begin, end) = words[0].split_once('-').expect("addresses");
        let (begin, end, offset) = (number(begin), number(end), number(words[2]));
        count += usize::from(last != Some((words[4], begin, offset)));
        last = Some((words[4], end, offset + end - begin));
    }
    count
}

/// Looks again and again until it is so. For what another process does, and no call waits for.
pub fn until(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < SOON, "still waiting: {what}");
        std::thread::yield_now();
    }
}

/// What it is once it has not changed over many looks. For what threads and processes do that nobody waits for.
pub fn settled<T: PartialEq>(mut look: impl FnMut() -> T) -> T {
    let (mut last, mut same) = (look(), 0);
    while same < 1000 {
        let now = look();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

/// Looks again and again until it is what it should be.
pub fn until_is<T: PartialEq + std::fmt::Debug>(what: &str, wanted: &T, mut look: impl FnMut() -> T) {
    let start = Instant::now();
    loop {
        let found = look();
        if found == *wanted {
            return;
        }
        assert!(start.elapsed() < SOON, "{what}: still {found:?}, where {wanted:?} was before");
        std::thread::yield_now();
    }
}

/// Numbers that look random and are the same each time (xorshift64*).
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.below(256) as u8).collect()
    }
}

/// How many threads of a process close something.
pub fn closers(process: u32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
    // One may have ended meanwhile.
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| name.trim() == "fbuf-close").count()
}
