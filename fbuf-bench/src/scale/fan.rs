//! What a message costs as receivers are added, and senders: each a process, all of one kind on one processor.

use std::time::Duration;

use fbuf_core::process::processors;

use super::{
    Extent,
    broker::BrokerProcess,
    figure::{Figure, Subject, Unit, several},
};
use crate::{
    Result,
    peers::Peer,
    terms::{Means, Mode, Terms, Wait, Work},
    work::{self, Figures},
};

/// How many receivers, or senders.
const COUNTS: [u32; 4] = [1, 4, 16, 64];
/// Bytes of a message.
pub(super) const SIZE: usize = 64;

/// A stream of short messages, for a broker at an address.
pub(super) fn terms(address: &str, work: Work, others: u32, extent: Extent) -> Terms {
    Terms {
        peer: Peer::Fbuf,
        work,
        size: SIZE,
        mode: Mode::Untouched,
        // Those that share a processor must not look for what only another of them can bring.
        wait: Wait::Block,
        slots: Some(1024),
        means: Means::Volatile,
        others,
        time: extent.time,
        processors: processors::two(),
        broker: address.to_owned(),
    }
}

/// Runs it with this side on the first of the two processors, while other threads may run anywhere.
pub(super) fn run(terms: &Terms) -> Result<(f64, work::Run)> {
    let run = std::thread::scope(|scope| {
        let pinned = scope.spawn(|| {
            processors::pin(terms.processors[0]);
            work::run(terms)
        });
        pinned.join().unwrap_or_else(|_| Err("the side that was measured panicked".into()))
    })?;
    match run.figures {
        Figures::Stream(stream) => Ok((stream.messages_per_s, run)),
        Figures::Latency(_) => Err("a stream was to be measured".into()),
    }
}

pub(super) fn measure(extent: Extent) -> Result<Vec<Figure>> {
    let broker = BrokerProcess::start(None)?;
    let mut figures = Vec::new();
    for (subject, work, who) in [(Subject::FanOut, Work::Stream, "receiver"), (Subject::FanIn, Work::FanIn, "sender")] {
        let counts = Extent::up_to(&COUNTS, extent.clients.min(COUNTS[COUNTS.len() - 1]));
        let mut runs = vec![Vec::new(); counts.len()];
        for _ in 0..extent.runs {
            for (runs, &count) in runs.iter_mut().zip(&counts) {
                runs.push(run(&terms(&broker.address, work, count, extent))?);
            }
        }
        for (runs, &count) in runs.iter().zip(&counts) {
            // What is shared out: the messages that arrive.
            let deliveries = if subject == Subject::FanOut { f64::from(count) } else { 1.0 };
            let mut add = |what, unit, value: &dyn Fn(f64, &work::Run) -> f64| -> Result<()> {
                let values: Vec<_> = runs.iter().map(|(rate, run)| value(*rate, run)).collect();
                figures.push(Figure::new(subject, what, (several(count, who), count), unit, &values)?);
                Ok(())
            };
            let each = |cpu: Duration, run: &work::Run| cpu.as_nanos() as f64 / (run.messages as f64 * deliveries);
            add("messages/s", Unit::PerSecond, &|rate, _| rate)?;
            add("time of a message, for each", Unit::Ns, &|rate, _| 1e9 / (rate * deliveries))?;
            add("processor, sending side, for each", Unit::Ns, &|_, run| each(run.sender.cpu, run))?;
            add("processor, receiving side, for each", Unit::Ns, &|_, run| each(run.receiver.cpu, run))?;
        }
    }
    Ok(figures)
}
