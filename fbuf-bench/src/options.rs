//! What can be asked for on the command line.

use std::{io::Write, path::PathBuf, time::Duration};

use bytesize::ByteSize;
use clap::{Args, Subcommand, builder::RangedU64ValueParser};
use fbuf_broker::size;

use crate::{
    Result, pair,
    payload::NUMBER,
    peers::Peer,
    scale,
    suite::{self, Suite},
    terms::{Mode, Wait},
};

/// What to measure.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Half of the time that a message and its answer take
    Latency(Settings),
    /// How many messages, and bytes, get through one way
    Stream(Settings),
    /// As latency, but with pauses in which both sides may sleep, and what that costs in processor time
    Wakeup {
        /// How many messages a second
        #[arg(long, value_name = "RATE", value_delimiter = ',', value_parser = more_than_zero, default_value = "1,100,10000")]
        rate: Vec<f64>,
        /// What both sides do while there is nothing to do
        #[arg(long, value_enum, value_delimiter = ',', default_value = "adaptive,block")]
        wait: Vec<Wait>,
        #[command(flatten)]
        common: Common,
    },
    /// A stream over few and many slots: where the caches are
    Depth(Settings),
    /// One sender to several receivers, and several senders to one receiver
    Fan {
        /// How many
        #[arg(long, value_name = "COUNT", value_delimiter = ',', default_value = "1,2,4,16", value_parser = clap::value_parser!(u32).range(1..))]
        count: Vec<u32>,
        #[command(flatten)]
        common: Common,
    },
    /// What is paid once: to connect, open, link, send the first message, grow
    Once {
        #[command(flatten)]
        common: Common,
    },
    /// What each level of protection costs, beside copying: a message there, a word of each page written
    /// and read, half of a round trip
    Protection {
        /// Bytes of a message
        #[arg(
            long,
            value_name = "BYTES",
            value_delimiter = ',',
            value_parser = size,
            default_value = "4KiB,64KiB,256KiB,1MiB,2MiB,4MiB,16MiB,64MiB"
        )]
        size: Vec<ByteSize>,
        /// In which folder to write fbuf-protection.html, with a plot [default: none is written]
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
        #[command(flatten)]
        common: Common,
    },
    /// What it costs when there are many: to attach beside them and beside one that floods the broker, memory and
    /// descriptors for each, messages as receivers and senders are added, a stream beside idle channels
    Scale {
        /// How many clients, each with a channel of its own, and at most how many receivers or senders of one; no
        /// more than 2,000, for what a user may have
        #[arg(long, value_name = "COUNT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=2000))]
        clients: u32,
        /// In which folder to write fbuf-scale.html, with plots [default: none is written]
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
        #[command(flatten)]
        common: Common,
    },
    /// How many instructions a message takes, both sides together, as valgrind counts them
    Instructions {
        /// Bytes of a message
        #[arg(long, value_name = "BYTES", value_parser = size, default_value = "64")]
        size: ByteSize,
        /// What to measure
        #[arg(
            long,
            value_enum,
            value_name = "NAME",
            value_delimiter = ',',
            default_value = "fbuf,limit,shared-memory"
        )]
        peer: Vec<Peer>,
        /// Give each message of fbuf a tag
        #[arg(long)]
        tag: bool,
        /// Fail if fbuf takes more than so many
        #[arg(long, value_name = "COUNT")]
        most: Option<f64>,
        /// Print one line of JSON for each, and nothing else
        #[arg(long)]
        json: bool,
    },
    /// All of these, and a report with plots
    All {
        /// In which folder to write fbuf-bench.html and fbuf-bench.json
        #[arg(long, value_name = "FOLDER", default_value = ".")]
        out: PathBuf,
        #[command(flatten)]
        common: Common,
    },
    /// Be the second process
    #[command(hide = true)]
    Second,
    /// Be a process with many clients
    #[command(hide = true)]
    Crowd,
    /// Be a process that gives the broker as much to do as it can
    #[command(hide = true)]
    Neighbour,
    /// Be what valgrind runs
    #[command(hide = true)]
    Lockstep {
        peer: Peer,
        size: usize,
        bursts: u64,
        #[arg(long)]
        tag: bool,
    },
}

/// What a stream or a latency is measured with.
#[derive(Debug, Args)]
pub(crate) struct Settings {
    /// Bytes of a message [default: 64, 4 KiB, 64 KiB, 1 MiB; for latency also 16 MiB]
    #[arg(long, value_name = "BYTES", value_delimiter = ',', value_parser = size)]
    pub(crate) size: Vec<ByteSize>,
    /// What to measure [default: all that there are; for depth, fbuf and limit]
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',')]
    pub(crate) peer: Vec<Peer>,
    /// How much of a message is touched [default: untouched; for depth, touched]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub(crate) mode: Vec<Mode>,
    /// What both sides do while there is nothing to do
    #[arg(long, value_enum, value_delimiter = ',', default_value = "spin")]
    pub(crate) wait: Vec<Wait>,
    /// How many slots to give to those that let one choose [default: their own; for `limit` in a
    /// stream, what is best]
    #[arg(long, value_name = "COUNT", value_delimiter = ',')]
    pub(crate) slots: Vec<u32>,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// How often, how long, and what to print.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Common {
    /// How many runs, of all peers in turn
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(crate) runs: usize,
    /// For how long each run is measured
    #[arg(long, value_name = "SECONDS", value_parser = more_than_zero, default_value = "0.3")]
    seconds: f64,
    /// Print one line of JSON for each run, and nothing else
    #[arg(long)]
    pub(crate) json: bool,
}

/// Reads a number that is more than zero.
fn more_than_zero(text: &str) -> std::result::Result<f64, &'static str> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    number.ok_or("give a number that is more than zero")
}

/// Does it.
pub(crate) fn run(arguments: &Arguments, output: &mut dyn Write) -> Result<()> {
    match &arguments.what {
        What::Latency(settings) => Suite::new(settings.common, output)?.latency(settings),
        What::Stream(settings) => Suite::new(settings.common, output)?.stream(settings),
        What::Wakeup { rate, wait, common } => Suite::new(*common, output)?.wakeup(rate, wait),
        What::Depth(settings) => Suite::new(settings.common, output)?.depth(settings),
        What::Fan { count, common } => Suite::new(*common, output)?.fan(count),
        What::Once { common } => Suite::new(*common, output)?.once(),
        What::Protection { size, out, common } => {
            Suite::new(*common, output)?.protection(&checked(size)?, out.as_deref())
        }
        What::Scale { clients, out, common } => scale::run(*clients, *common, out.as_deref(), output),
        What::All { out, common } => Suite::new(*common, output)?.all(out),

        What::Instructions { size, peer, tag, most, json } => {
            let counts = suite::instructions(size.as_u64().try_into()?, peer, *tag, *json, output)?;
            let fbuf = counts.iter().find(|(peer, _)| *peer == Peer::Fbuf).map(|(_, count)| *count);
            match (fbuf, most) {
                (Some(count), Some(most)) if count > *most => {
                    Err(format!("a message takes {count:.1} instructions, where {most} were allowed").into())
                }
                _ => Ok(()),
            }
        }

        What::Second => pair::second(),
        What::Crowd => scale::crowd(),
        What::Neighbour => scale::neighbour(),
        &What::Lockstep { peer, size, bursts, tag } => suite::lockstep(peer, size, bursts, tag),
    }
}

impl Settings {
    /// Those with which `fbuf bench` measures everything.
    pub(crate) fn default_with(common: Common) -> Self {
        let (size, peer, mode, slots) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { size, peer, mode, wait: vec![Wait::Spin], slots, common }
    }

    pub(crate) fn sizes(&self, default: &[usize]) -> Result<Vec<usize>> {
        if self.size.is_empty() {
            return Ok(default.to_vec());
        }
        checked(&self.size)
    }
}

/// Sizes that a message can have.
fn checked(sizes: &[ByteSize]) -> Result<Vec<usize>> {
    let checked = |size: &ByteSize| {
        let bytes = usize::try_from(size.as_u64())?;
        if bytes == 0 || !bytes.is_multiple_of(NUMBER) {
            return Err(format!("messages of {bytes} bytes were asked for: they must be a multiple of 8").into());
        }
        Ok(bytes)
    };
    sizes.iter().map(checked).collect()
}

impl Common {
    pub(crate) fn time(&self) -> Result<Duration> {
        Duration::try_from_secs_f64(self.seconds).map_err(|error| format!("--seconds {}: {error}", self.seconds).into())
    }
}
