//! As many messages as can be, one way, for a time.

use std::time::{Duration, Instant};

use fbuf_core::process::processors::CpuTime;

use super::{Figures, Run, now};
use crate::{
    Result,
    pair::{Begin, Done, First, Second},
    payload::{self, Checker, LAST, MEASURED},
    peers::{End, Receiving, Sending, Way},
    terms::{Mode, Terms},
};

/// How much went through.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stream {
    pub(crate) messages_per_s: f64,
    pub(crate) gb_per_s: f64,
}

impl Stream {
    pub(super) fn new(messages: u64, size: usize, seconds: f64) -> Self {
        let messages_per_s = messages as f64 / seconds;
        Self { messages_per_s, gb_per_s: messages_per_s * size as f64 / 1e9 }
    }
}

pub(super) fn send<W: Way>(terms: &Terms, others: Vec<Second>) -> Result<Run> {
    let (mut sender, there) = W::Sender::offer(terms)?;
    for other in &others {
        other.begin(&Begin { terms: terms.clone(), there: there.clone(), back: None })?;
    }
    // What was handed on is to be closed here, so that each end hears when the other dies.
    drop(there);
    sender.ready()?;
    for other in &others {
        other.wait_until_ready()?;
    }
    let mut next = 0;
    send_for(&mut sender, &mut next, terms.time / 10, terms)?;
    let (before, start) = (CpuTime::so_far()?, now()?);
    send_one(&mut sender, next | MEASURED, terms.mode)?;
    next += 1;
    send_for(&mut sender, &mut next, terms.time, terms)?;
    send_one(&mut sender, next | LAST, terms.mode)?;
    let after = CpuTime::so_far()?;
    let (mut messages, mut end, mut receiver) = (0, start, CpuTime::default());
    for other in others {
        let done = other.wait_until_done()?;
        (messages, end, receiver) = (done.messages, end.max(done.end), receiver + done.spent);
    }
    let seconds = end.saturating_sub(start).as_secs_f64();
    let figures = Figures::Stream(Stream::new(messages, terms.size, seconds));
    Ok(Run { messages, seconds, sender: after.since(before), receiver, figures })
}

/// Sends in batches, and looks at the clock between them.
pub(super) fn send_for(sender: &mut impl Sending, next: &mut u64, time: Duration, terms: &Terms) -> Result<()> {
    let batch = ((256 << 10) / terms.size as u64).clamp(1, 1024);
    let start = Instant::now();
    while start.elapsed() < time {
        match terms.mode {
            // Each mode a loop of its own: in one loop, the choice would cost as much as a short message.
            Mode::Untouched => send_some(sender, next, batch, Mode::Untouched)?,
            Mode::Paged => send_some(sender, next, batch, Mode::Paged)?,
            Mode::Written => send_some(sender, next, batch, Mode::Written)?,
            Mode::Touched => send_some(sender, next, batch, Mode::Touched)?,
        }
    }
    Ok(())
}

#[inline(always)]
fn send_some(sender: &mut impl Sending, next: &mut u64, batch: u64, mode: Mode) -> Result<()> {
    for number in *next..*next + batch {
        sender.send(|bytes| payload::write(bytes, number, mode))?;
    }
    *next += batch;
    Ok(())
}

pub(super) fn send_one(sender: &mut impl Sending, number: u64, mode: Mode) -> Result<()> {
    sender.send(|bytes| payload::write(bytes, number, mode))
}

pub(super) fn receive<W: Way>(begin: Begin, first: &First) -> Result<Done> {
    let Begin { terms, there, .. } = begin;
    let mut receiver = W::Receiver::join(&terms, there)?;
    receiver.ready()?;
    first.ready()?;
    let mut checker = Checker::default();
    receive_until(&mut receiver, &mut checker, MEASURED, terms.mode)?;
    let (before, count) = (CpuTime::so_far()?, checker.count());
    receive_until(&mut receiver, &mut checker, LAST, terms.mode)?;
    let end = now()?;
    // The first message that was measured was taken before.
    Ok(Done { messages: checker.count() - count + 1, spent: CpuTime::so_far()?.since(before), end })
}

fn receive_until(receiver: &mut impl Receiving, checker: &mut Checker, mark: u64, mode: Mode) -> Result<()> {
    match mode {
        Mode::Untouched => receive_all(receiver, checker, mark, Mode::Untouched),
        Mode::Paged => receive_all(receiver, checker, mark, Mode::Paged),
        Mode::Written => receive_all(receiver, checker, mark, Mode::Written),
        Mode::Touched => receive_all(receiver, checker, mark, Mode::Touched),
    }
}

#[inline(always)]
fn receive_all(receiver: &mut impl Receiving, checker: &mut Checker, mark: u64, mode: Mode) -> Result<()> {
    loop {
        let read = receiver.receive(|bytes| payload::read(bytes, mode))?;
        if checker.check(read)? == mark {
            return Ok(());
        }
    }
}
