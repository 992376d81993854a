//! `fbuf demo`: the same bytes between the same two processes, through fbufs, a pipe and a Unix
//! socket. The second process hashes what it gets; the first compares.

mod receiving;
mod sending;
mod source;

use std::path::PathBuf;

use bytesize::ByteSize;
use clap::ValueEnum;
use fbuf_broker::size;
use fbuf_core::process::processors::pin;

use crate::{Failure, WaitArgument};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to send [default: generated data]
    file: Option<PathBuf>,
    /// How much to generate
    #[arg(long, value_name = "BYTES", value_parser = size, default_value = "4GiB", conflicts_with = "file")]
    bytes: ByteSize,
    /// How much each message holds
    #[arg(long, value_name = "BYTES", value_parser = size, default_value = "1MiB")]
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
