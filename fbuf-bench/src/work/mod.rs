//! What is sent over a way, and how it is measured.

mod echo;
mod fan_in;
pub(crate) mod lockstep;
pub(crate) mod once;
mod stream;
mod tasks;

use std::time::Duration;

use fbuf_core::process::processors::CpuTime;
use nix::time::{ClockId, clock_gettime};

use crate::{
    Result,
    pair::{Begin, Done, First, Second},
    peers::{
        Eventfd, Fbuf, Futex, Limit, Peer, Pipe, Protected, SharedMemory, Tagged, Tcp, TokioEventfd, TokioFbuf,
        TokioUds, Uds, Way,
    },
    terms::{Means, Terms, Work},
};

pub(crate) use echo::Latency;
pub(crate) use stream::Stream;

/// What came of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) messages: u64,
    pub(crate) seconds: f64,
    pub(crate) sender: CpuTime,
    pub(crate) receiver: CpuTime,
    pub(crate) figures: Figures,
}

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Figures {
    Latency(Latency),
    Stream(Stream),
}

/// Runs once, with other processes of its own.
pub(crate) fn run(terms: &Terms) -> Result<Run> {
    let others = (0..terms.others).map(|_| Second::start()).collect::<Result<Vec<_>>>()?;
    match terms.peer {
        Peer::Fbuf if terms.means == Means::Volatile => first::<Fbuf>(terms, others),
        Peer::Fbuf => first::<Protected>(terms, others),
        Peer::Limit => first::<Limit>(terms, others),
        Peer::Pipe => first::<Pipe>(terms, others),
        Peer::Uds => first::<Uds>(terms, others),
        Peer::Tcp => first::<Tcp>(terms, others),
        Peer::SharedMemory => first::<SharedMemory>(terms, others),
        #[cfg(feature = "peers")]
        Peer::Iceoryx2 => first::<crate::peers::Iceoryx2>(terms, others),
        #[cfg(feature = "peers")]
        Peer::IpcChannel => first::<crate::peers::IpcChannel>(terms, others),
        Peer::Eventfd => first::<Eventfd>(terms, others),
        Peer::Futex => first::<Futex>(terms, others),
        Peer::TokioFbuf => first::<TokioFbuf>(terms, others),
        Peer::TokioEventfd => first::<TokioEventfd>(terms, others),
        Peer::TokioUds => first::<TokioUds>(terms, others),
        Peer::Memcpy => Err("a copy takes one process".into()),
    }
}

/// Runs so many bursts in one thread; those of fbuf with tags, if `tags`.
pub(crate) fn run_in_lockstep(terms: &Terms, bursts: u64, tags: bool) -> Result<()> {
    match terms.peer {
        Peer::Fbuf if tags => lockstep::run::<Tagged>(terms, bursts),
        Peer::Fbuf => lockstep::run::<Fbuf>(terms, bursts),
        Peer::Limit => lockstep::run::<Limit>(terms, bursts),
        Peer::Pipe => lockstep::run::<Pipe>(terms, bursts),
        Peer::Uds => lockstep::run::<Uds>(terms, bursts),
        Peer::Tcp => lockstep::run::<Tcp>(terms, bursts),
        Peer::SharedMemory => lockstep::run::<SharedMemory>(terms, bursts),
        #[cfg(feature = "peers")]
        Peer::Iceoryx2 => lockstep::run::<crate::peers::Iceoryx2>(terms, bursts),
        #[cfg(feature = "peers")]
        Peer::IpcChannel => lockstep::run::<crate::peers::IpcChannel>(terms, bursts),
        Peer::Eventfd | Peer::Futex | Peer::TokioEventfd | Peer::Memcpy => {
            Err("one message at a time is all that it carries".into())
        }
        Peer::TokioFbuf => lockstep::run::<TokioFbuf>(terms, bursts),
        Peer::TokioUds => lockstep::run::<TokioUds>(terms, bursts),
    }
}

fn first<W: Way>(terms: &Terms, mut others: Vec<Second>) -> Result<Run> {
    match (terms.work, others.pop()) {
        (Work::Stream, Some(second)) if terms.peer == Peer::TokioFbuf && others.is_empty() => {
            tasks::send(terms, second)
        }
        (Work::Stream, Some(last)) => {
            others.push(last);
            stream::send::<W>(terms, others)
        }
        (Work::FanIn, Some(last)) if terms.peer == Peer::Fbuf => {
            others.push(last);
            fan_in::receive(terms, others)
        }
        (Work::Echo { every }, Some(second)) if others.is_empty() => echo::call::<W>(terms, second, every),
        _ => Err("so many processes cannot do that together".into()),
    }
}

/// Is the second process of a run.
pub(crate) fn second(begin: Begin, first: &First) -> Result<Done> {
    match begin.terms.peer {
        Peer::Fbuf if begin.terms.means == Means::Volatile => answer::<Fbuf>(begin, first),
        Peer::Fbuf => answer::<Protected>(begin, first),
        Peer::Limit => answer::<Limit>(begin, first),
        Peer::Pipe => answer::<Pipe>(begin, first),
        Peer::Uds => answer::<Uds>(begin, first),
        Peer::Tcp => answer::<Tcp>(begin, first),
        Peer::SharedMemory => answer::<SharedMemory>(begin, first),
        #[cfg(feature = "peers")]
        Peer::Iceoryx2 => answer::<crate::peers::Iceoryx2>(begin, first),
        #[cfg(feature = "peers")]
        Peer::IpcChannel => answer::<crate::peers::IpcChannel>(begin, first),
        Peer::Eventfd => answer::<Eventfd>(begin, first),
        Peer::Futex => answer::<Futex>(begin, first),
        Peer::TokioFbuf => answer::<TokioFbuf>(begin, first),
        Peer::TokioEventfd => answer::<TokioEventfd>(begin, first),
        Peer::TokioUds => answer::<TokioUds>(begin, first),
        Peer::Memcpy => Err("a copy takes one process".into()),
    }
}

fn answer<W: Way>(begin: Begin, first: &First) -> Result<Done> {
    match begin.terms.work {
        Work::Stream if begin.terms.peer == Peer::TokioFbuf => tasks::receive(begin, first),
        Work::Stream => stream::receive::<W>(begin, first),
        Work::FanIn => fan_in::send(begin, first),
        Work::Echo { .. } => echo::answer::<W>(begin, first),
    }
}

/// The clock that both processes read.
fn now() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}
