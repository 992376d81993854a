//! `fbuf demo`: the same bytes between the same two processes, through fbufs, a pipe and a Unix
//! socket. The second process hashes what it gets; the first compares.

mod receiving;
mod sending;
mod source;

use std::{io, path::PathBuf};

use bytesize::ByteSize;
use clap::ValueEnum;
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::resource::{UsageWho, getrusage},
    sys::time::TimeValLike,
    unistd::Pid,
};

use crate::{Failure, WaitArgument};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to send [default: generated data]
    file: Option<PathBuf>,
    /// How much to generate
    #[arg(long, value_name = "BYTES", default_value = "4GiB", conflicts_with = "file")]
    bytes: ByteSize,
    /// How much each message holds
    #[arg(long, value_name = "BYTES", default_value = "1MiB")]
    message: ByteSize,
    /// What to send it over
    #[arg(long, value_enum, value_delimiter = ',', default_value = "fbuf,pipe,socket")]
    over: Vec<Over>,
    /// What both sides do while there is nothing to do
    #[arg(long, value_enum, default_value = "adaptive")]
    wait: WaitArgument,
    /// Be the second process
    #[arg(long, hide = true)]
    receive: bool,
    /// Where to run as the second process
    #[arg(long, hide = true)]
    processor: Option<usize>,
}

/// A way between two processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Over {
    /// Fbufs
    Fbuf,
    /// A pipe
    Pipe,
    /// A Unix stream socket
    Socket,
}

impl Over {
    fn name(self) -> &'static str {
        match self {
            Self::Fbuf => "fbuf",
            Self::Pipe => "pipe",
            Self::Socket => "socket",
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    if arguments.receive {
        let over = *arguments.over.first().ok_or_else(|| Failure::new("--receive needs one --over"))?;
        pin(arguments.processor);
        receiving::run(over, arguments.message.as_u64(), arguments.wait.into())
    } else {
        sending::run(arguments)
    }
}

/// What one side spent.
#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    cpu_microseconds: i64,
    switches: i64,
}

impl Spent {
    fn so_far() -> io::Result<Self> {
        let usage = getrusage(UsageWho::RUSAGE_SELF)?;
        Ok(Self {
            cpu_microseconds: usage.user_time().num_microseconds() + usage.system_time().num_microseconds(),
            switches: usage.voluntary_context_switches() + usage.involuntary_context_switches(),
        })
    }

    fn since(self, before: Self) -> Self {
        Self {
            cpu_microseconds: self.cpu_microseconds - before.cpu_microseconds,
            switches: self.switches - before.switches,
        }
    }
}

/// The processors this process may use; two of them, if there are, one for each side.
fn processors() -> [Option<usize>; 2] {
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else { return [None; 2] };
    let mut processors = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu) == Ok(true));
    match (processors.next(), processors.next()) {
        (Some(one), Some(other)) => [Some(one), Some(other)],
        _ => [None; 2],
    }
}

/// Keeps this process on one processor. Without it the figures are noisier, and no less true.
fn pin(processor: Option<usize>) {
    let mut one = CpuSet::new();
    if let Some(cpu) = processor
        && one.set(cpu).is_ok()
    {
        let _ = sched_setaffinity(Pid::from_raw(0), &one);
    }
}
