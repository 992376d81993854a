//! What can be asked for on the command line, and the order in which it is done.

use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, Subcommand};
use fbuf_broker::Embedded;

use crate::{
    Result,
    outcome::{Outcome, Spread},
    pair,
    peers::Peer,
    processors, table,
    terms::{Mode, Terms, Wait, Work, name},
    work,
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
    /// How many instructions a message takes, both sides together, as valgrind counts them
    Instructions {
        /// Bytes of a message
        #[arg(long, value_name = "BYTES", default_value = "64")]
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
    },
    /// Be the second process
    #[command(hide = true)]
    Second,
    /// Be what valgrind runs
    #[command(hide = true)]
    Lockstep { peer: Peer, size: usize, bursts: u64 },
}

#[derive(Debug, Args)]
struct Settings {
    /// Bytes of a message [default: 64, 4 KiB, 64 KiB, 1 MiB; of latency also 16 MiB]
    #[arg(long, value_name = "BYTES", value_delimiter = ',')]
    size: Vec<ByteSize>,
    /// What to measure [default: all that there are]
    #[arg(long, value_enum, value_name = "NAME", value_delimiter = ',')]
    peer: Vec<Peer>,
    /// How much of a message is touched
    #[arg(long, value_enum, value_delimiter = ',', default_value = "untouched")]
    mode: Vec<Mode>,
    /// What both sides do while there is nothing to do
    #[arg(long, value_enum, value_delimiter = ',', default_value = "spin")]
    wait: Vec<Wait>,
    /// How many slots to give to those that let one choose [default: their own; for `limit` in a
    /// stream, what is best]
    #[arg(long)]
    slots: Option<u32>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    /// How many runs, of all peers in turn
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// For how long each run is measured
    #[arg(long, value_name = "SECONDS", default_value_t = 0.3)]
    seconds: f64,
    /// Print one line of JSON for each run, and nothing else
    #[arg(long)]
    json: bool,
}

/// Does it.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        What::Latency(settings) => {
            measure(settings, Work::Echo { every: Duration::ZERO }, &[64, 4096, 65536, 1 << 20, 16 << 20])
        }
        What::Stream(settings) => measure(settings, Work::Stream, &[64, 4096, 65536, 1 << 20]),
        What::Instructions { size, peer } => instructions(size.as_u64().try_into()?, peer),
        What::Second => pair::second(),
        &What::Lockstep { peer, size, bursts } => {
            let broker = Embedded::start()?;
            let terms = Terms {
                peer,
                work: Work::Stream,
                size,
                mode: Mode::Untouched,
                wait: Wait::Spin,
                slots: peer.takes_slots().then_some(1024),
                time: Duration::ZERO,
                processors: [None; 2],
                broker: broker.address().to_string(),
            };
            work::run_in_lockstep(&terms, bursts)
        }
    }
}

fn measure(settings: &Settings, work: Work, sizes: &[usize]) -> Result<()> {
    let sizes = settings.sizes(sizes)?;
    let time = settings.common.time()?;
    // Its thread may run anywhere: it starts before this one is pinned.
    let broker = Embedded::start()?;
    let processors = processors::two();
    processors::pin(processors[0]);
    let all = <Peer as clap::ValueEnum>::value_variants();
    let peers = if settings.peer.is_empty() { all } else { &settings.peer };
    for &wait in &settings.wait {
        for &mode in &settings.mode {
            for &size in &sizes {
                let able = |peer: Peer| peer.waits().contains(&wait) && peer.carries(size);
                let mut terms: Vec<_> = peers
                    .iter()
                    .filter(|&&peer| able(peer))
                    .map(|&peer| Terms {
                        peer,
                        work,
                        size,
                        mode,
                        wait,
                        slots: settings.slots.filter(|_| peer.takes_slots()),
                        time,
                        processors,
                        broker: broker.address().to_string(),
                    })
                    .collect();
                for terms in &mut terms {
                    if terms.peer == Peer::Limit && terms.slots.is_none() && work == Work::Stream {
                        terms.slots = Some(best_depth(terms)?);
                    }
                }
                if let [one] = &settings.peer[..]
                    && !able(*one)
                {
                    return Err(format!(
                        "{} was asked for with {} and waiting by {}: it does not do that",
                        name(*one),
                        table::bytes(size),
                        name(wait)
                    )
                    .into());
                }
                in_turn(&terms, &settings.common)?;
            }
        }
    }
    Ok(())
}

fn instructions(size: usize, peers: &[Peer]) -> Result<()> {
    println!("instructions for a message of {}, untouched, both sides together", table::bytes(size));
    for &peer in peers {
        println!("  {:<16}{:>8.1}", name(peer), work::lockstep::instructions(peer, size)?);
    }
    Ok(())
}

/// Runs all of them in turn, as often as was asked for.
fn in_turn(all: &[Terms], common: &Common) -> Result<()> {
    let mut outcomes = Vec::new();
    for run in 0..common.runs {
        for terms in all {
            let result = work::run(terms).map_err(|error| format!("{}: {error}", name(terms.peer)))?;
            let outcome = Outcome::new(terms, run, &result);
            if common.json {
                println!("{}", serde_json::to_string(&outcome)?);
            }
            outcomes.push(outcome);
        }
    }
    if !common.json {
        table::print(&outcomes);
    }
    Ok(())
}

/// With how many slots the bare ring streams best.
fn best_depth(terms: &Terms) -> Result<u32> {
    let mut best = (0.0, 0);
    for slots in depths(terms.size) {
        let terms = Terms { slots: Some(slots), time: terms.time / 3, ..terms.clone() };
        let mut figures = Vec::new();
        for run in 0..3 {
            figures.push(Outcome::new(&terms, run, &work::run(&terms)?).headline());
        }
        if let Some(Spread { median, .. }) = Spread::of(figures)
            && median > best.0
        {
            best = (median, slots);
        }
    }
    Ok(best.1)
}

/// The numbers of slots that are worth trying with messages of this size: 2 to a million, and at most
/// 64 MiB.
fn depths(size: usize) -> impl Iterator<Item = u32> {
    (1..=20).map(|power| 1 << power).filter(move |&slots| slots as usize * size <= 64 << 20)
}

impl Settings {
    fn sizes(&self, default: &[usize]) -> Result<Vec<usize>> {
        if self.size.is_empty() {
            return Ok(default.to_vec());
        }
        self.size
            .iter()
            .map(|size| {
                let bytes = usize::try_from(size.as_u64())?;
                if bytes == 0 || !bytes.is_multiple_of(crate::payload::NUMBER) {
                    return Err(
                        format!("messages of {bytes} bytes were asked for: they must be a multiple of 8").into()
                    );
                }
                Ok(bytes)
            })
            .collect()
    }
}

impl Common {
    fn time(&self) -> Result<Duration> {
        Duration::try_from_secs_f64(self.seconds).map_err(|error| format!("--seconds {}: {error}", self.seconds).into())
    }
}
