//! The second process: hashes what it gets and reports.

use std::{
    fs::File,
    io::{self, BufRead, Read, Write, stdin, stdout},
    os::fd::AsFd,
    str::FromStr,
    time::Duration,
};

use fbuf_client::{Client, GetError, Wait};
use fbuf_core::process::processors::CpuTime;
use nix::sys::{prctl, signal::Signal};
use xxhash_rust::xxh3::Xxh3;

use super::Over;
use crate::Failure;

/// The line by which it says that it is ready.
const READY: &str = "ready\n";

/// The line by which it says what it got.
#[derive(Debug, Clone, Copy)]
pub(super) struct Report {
    pub(super) hash: u128,
    pub(super) bytes: u64,
    pub(super) spent: CpuTime,
}

impl Report {
    fn to_line(self) -> String {
        let Self { hash, bytes, spent } = self;
        format!("{hash:032x} {bytes} {} {}\n", spent.cpu.as_micros(), spent.switches)
    }

    /// Reads both lines from the second process.
    pub(super) fn wait_until_ready(from: &mut impl BufRead) -> Result<(), Failure> {
        let mut line = String::new();
        from.read_line(&mut line)?;
        if line == READY { Ok(()) } else { Err(Failure::new("the second process did not start")) }
    }

    pub(super) fn read(from: &mut impl BufRead) -> Result<Self, Failure> {
        fn next<'a, T: FromStr>(words: &mut impl Iterator<Item = &'a str>) -> Option<T> {
            words.next()?.parse().ok()
        }
        let mut line = String::new();
        from.read_line(&mut line)?;
        let mut words = line.split_ascii_whitespace();
        let parse = |words: &mut std::str::SplitAsciiWhitespace<'_>| {
            Some(Self {
                hash: u128::from_str_radix(words.next()?, 16).ok()?,
                bytes: next(words)?,
                spent: CpuTime { cpu: Duration::from_micros(next(words)?), switches: next(words)? },
            })
        };
        parse(&mut words).ok_or_else(|| Failure::new("the second process died"))
    }
}

pub(super) fn run(over: Over, message: u64, wait: Wait) -> Result<(), Failure> {
    // It does not outlive the first process: it knows no broker but the embedded one there.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let mut hash = Xxh3::new();
    let mut bytes = 0;
    let mut digest = |data: &[u8]| {
        hash.update(data);
        bytes += data.len() as u64;
    };
    let before;
    match over {
        Over::Fbuf => {
            let mut receiver = Client::connect()?.receiver("demo").wait(wait).open()?;
            before = ready()?;
            loop {
                match receiver.get() {
                    Ok(received) => digest(&received),
                    Err(GetError::Ended) => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Over::Pipe | Over::Socket => {
            let mut input = File::from(stdin().as_fd().try_clone_to_owned()?);
            let mut buffer = vec![0; usize::try_from(message)?];
            before = ready()?;
            loop {
                match input.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => digest(&buffer[..count]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
    let report = Report { hash: hash.digest128(), bytes, spent: CpuTime::so_far()?.since(before) };
    stdout().write_all(report.to_line().as_bytes())?;
    Ok(())
}

fn ready() -> io::Result<CpuTime> {
    stdout().write_all(READY.as_bytes())?;
    CpuTime::so_far()
}
