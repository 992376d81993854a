//! One message there and one back, again and again, for a time.

use std::{
    thread,
    time::{Duration, Instant},
};

use fbuf_core::process::processors::CpuTime;
use hdrhistogram::Histogram;
use quanta::Clock;

use super::{Figures, Run, now};
use crate::{
    Result,
    pair::{Begin, Done, First, Second},
    payload::{self, Checker, LAST, MEASURED},
    peers::{End, Receiving, Sending, Way},
    terms::{Mode, Terms},
};

/// Half of the time that a message and its answer take, in nanoseconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Latency {
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    pub(crate) p999: u64,
    pub(crate) max: u64,
}

pub(super) fn call<W: Way>(terms: &Terms, second: Second, every: Duration) -> Result<Run> {
    let (mut sender, there) = W::Sender::offer(terms)?;
    let (mut receiver, back) = W::Receiver::offer(terms)?;
    second.begin(&Begin { terms: terms.clone(), there, back: Some(back) })?;
    sender.ready()?;
    receiver.ready()?;
    second.wait_until_ready()?;
    let mut caller = Caller { sender, receiver, mode: terms.mode, next: 0, checker: Checker::default() };
    // Three digits, up to a minute.
    let mut times = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
    caller.call_for(terms.time / 10, every, &mut times)?;
    times.reset();
    let (before, start) = (CpuTime::so_far()?, now()?);
    caller.call(MEASURED)?;
    caller.call_for(terms.time, every, &mut times)?;
    caller.call(LAST)?;
    let (seconds, sender) = ((now()? - start).as_secs_f64(), CpuTime::so_far()?.since(before));
    let done = second.wait_until_done()?;
    let half = |time: u64| time / 2;
    Ok(Run {
        messages: times.len(),
        seconds,
        sender,
        receiver: done.spent,
        figures: Figures::Latency(Latency {
            p50: half(times.value_at_quantile(0.5)),
            p99: half(times.value_at_quantile(0.99)),
            p999: half(times.value_at_quantile(0.999)),
            max: half(times.max()),
        }),
    })
}

struct Caller<S, R> {
    sender: S,
    receiver: R,
    mode: Mode,
    next: u64,
    checker: Checker,
}

impl<S: Sending, R: Receiving> Caller<S, R> {
    /// Sends one and waits for its answer.
    #[inline]
    fn call(&mut self, marks: u64) -> Result<()> {
        let (number, mode) = (self.next | marks, self.mode);
        self.sender.send(|bytes| payload::write(bytes, number, mode))?;
        self.next += 1;
        let read = self.receiver.receive(|bytes| payload::read(bytes, mode))?;
        self.checker.check(read)?;
        Ok(())
    }

    /// At least once, and for as long as there is time.
    fn call_for(&mut self, time: Duration, every: Duration, times: &mut Histogram<u64>) -> Result<()> {
        let clock = Clock::new();
        let (start, mut due) = (clock.raw(), Instant::now());
        loop {
            let before = clock.raw();
            self.call(0)?;
            let after = clock.raw();
            times.saturating_record(clock.delta_as_nanos(before, after).max(1));
            if u128::from(clock.delta_as_nanos(start, after)) >= time.as_nanos() {
                return Ok(());
            }
            if !every.is_zero() {
                due = (due + every).max(Instant::now());
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        }
    }
}

pub(super) fn answer<W: Way>(begin: Begin, first: &First) -> Result<Done> {
    let Begin { terms, there, back, .. } = begin;
    let mut receiver = W::Receiver::join(&terms, there)?;
    let mut sender = W::Sender::join(&terms, back.ok_or("there is no way back")?)?;
    receiver.ready()?;
    sender.ready()?;
    first.ready()?;
    let mut checker = Checker::default();
    let (mut before, mut count) = (CpuTime::so_far()?, 0);
    let mode = terms.mode;
    loop {
        let read = receiver.receive(|bytes| payload::read(bytes, mode))?;
        let number = read.number();
        let mark = checker.check(read)?;
        sender.send(|bytes| payload::write(bytes, number, mode))?;
        if mark == MEASURED {
            (before, count) = (CpuTime::so_far()?, checker.count());
        } else if mark == LAST {
            let messages = checker.count() - count;
            return Ok(Done { messages, spent: CpuTime::so_far()?.since(before), end: now()? });
        }
    }
}
