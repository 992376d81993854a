//! Both sides in one thread of one process, a burst in and a burst out: what a message costs in
//! instructions, which no other processor and no noise can change.

use std::process::Command;

use crate::{
    Result,
    payload::{self, Checker},
    peers::{End, Peer, Receiving, Sending, Way},
    terms::{Mode, Terms, name},
};

/// Messages of a burst.
const BURST: u64 = 32;
/// The two numbers of bursts between which the slope is taken.
const BURSTS: [u64; 2] = [6_000, 18_000];
/// How often each is counted.
const COUNTS: usize = 5;

pub(super) fn run<W: Way>(terms: &Terms, bursts: u64) -> Result<()> {
    let (mut sender, handle) = W::Sender::offer(terms)?;
    let mut receiver = W::Receiver::join(terms, handle)?;
    sender.ready()?;
    receiver.ready()?;
    let mut checker = Checker::default();
    for burst in 0..bursts {
        send(&mut sender, burst * BURST)?;
        receive(&mut receiver, &mut checker)?;
    }
    Ok(())
}

// Apart, as in two programs: in one function, each side would have half of the registers.

#[inline(never)]
fn send(sender: &mut impl Sending, first: u64) -> Result<()> {
    for number in first..first + BURST {
        sender.send(|bytes| payload::write(bytes, number, Mode::Untouched))?;
    }
    Ok(())
}

#[inline(never)]
fn receive(receiver: &mut impl Receiving, checker: &mut Checker) -> Result<()> {
    for _ in 0..BURST {
        checker.check(receiver.receive(|bytes| payload::read(bytes, Mode::Untouched))?)?;
    }
    Ok(())
}

/// How many instructions a message of eight untouched bytes takes, both sides together, by
/// callgrind: the slope between two runs, so that what happens once does not count.
pub(crate) fn instructions(peer: Peer, size: usize, tags: bool) -> Result<f64> {
    // What the clock and other threads bring in only adds to a count, so the least of some is the nearest.
    let least = |bursts| {
        let counts = (0..COUNTS).map(|_| count(peer, size, bursts, tags)).collect::<Result<Vec<_>>>()?;
        counts.into_iter().min().ok_or_else(|| crate::Error::from("nothing was counted"))
    };
    let (few, many) = (least(BURSTS[0])?, least(BURSTS[1])?);
    Ok((many as f64 - few as f64) / ((BURSTS[1] - BURSTS[0]) * BURST) as f64)
}

/// How many instructions so many bursts take, with all that happens once.
fn count(peer: Peer, size: usize, bursts: u64, tags: bool) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["bench", "lockstep", &name(peer), &size.to_string(), &bursts.to_string()])
        .args(tags.then_some("--tag"))
        .output()
        .map_err(|error| format!("valgrind, which counts instructions: {error}; install it"))?;
    let report = String::from_utf8_lossy(&output.stderr);
    let collected = report.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse::<u64>().ok());
    match collected {
        Some(count) if output.status.success() => Ok(count),
        _ => Err(crate::Error::from(format!("valgrind counted nothing: {report}"))),
    }
}
