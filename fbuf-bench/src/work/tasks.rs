//! A stream in which both ends are tasks: one task sends all of it, or receives it, so that nothing is paid but what a task pays.

use std::time::{Duration, Instant};

use fbuf_client::{AsyncReceiver, AsyncSender};
use fbuf_core::process::processors::CpuTime;

use super::{Figures, Run, now, stream::Stream};
use crate::{
    Result,
    pair::{Begin, Done, First, Second},
    payload::{self, Checker, LAST, MEASURED},
    peers::{self, End, TokioFbuf, Way},
    terms::Terms,
};

pub(super) fn send(terms: &Terms, other: Second) -> Result<Run> {
    let (mut sender, there) = <TokioFbuf as Way>::Sender::offer(terms)?;
    other.begin(&Begin { terms: terms.clone(), there, back: None })?;
    sender.ready()?;
    other.wait_until_ready()?;
    let (mut sender, size) = sender.into_end();
    let (before, start) = peers::runtime()?.block_on(async {
        let mut next = 0;
        send_for(&mut sender, &mut next, terms.time / 10, terms).await?;
        let begin = (CpuTime::so_far()?, now()?);
        send_one(&mut sender, size, next | MEASURED, terms).await?;
        next += 1;
        send_for(&mut sender, &mut next, terms.time, terms).await?;
        send_one(&mut sender, size, next | LAST, terms).await?;
        crate::Result::Ok(begin)
    })?;
    let after = CpuTime::so_far()?;
    let done = other.wait_until_done()?;
    let seconds = done.end.saturating_sub(start).as_secs_f64();
    let figures = Figures::Stream(Stream::new(done.messages, terms.size, seconds));
    Ok(Run { messages: done.messages, seconds, sender: after.since(before), receiver: done.spent, figures })
}

async fn send_for(sender: &mut AsyncSender, next: &mut u64, time: Duration, terms: &Terms) -> Result<()> {
    let batch = ((256 << 10) / terms.size as u64).clamp(1, 1024);
    let start = Instant::now();
    while start.elapsed() < time {
        for number in *next..*next + batch {
            send_one(sender, terms.size, number, terms).await?;
        }
        *next += batch;
    }
    Ok(())
}

#[inline]
async fn send_one(sender: &mut AsyncSender, size: usize, number: u64, terms: &Terms) -> Result<()> {
    peers::send(sender, size, |bytes| payload::write(bytes, number, terms.mode)).await
}

pub(super) fn receive(begin: Begin, first: &First) -> Result<Done> {
    let Begin { terms, there, .. } = begin;
    let mut receiver = <TokioFbuf as Way>::Receiver::join(&terms, there)?;
    receiver.ready()?;
    first.ready()?;
    let mut receiver = receiver.into_end();
    peers::runtime()?.block_on(async {
        let mut checker = Checker::default();
        receive_until(&mut receiver, &mut checker, MEASURED, &terms).await?;
        let (before, count) = (CpuTime::so_far()?, checker.count());
        receive_until(&mut receiver, &mut checker, LAST, &terms).await?;
        let end = now()?;
        // The first message that was measured was taken before.
        Ok(Done { messages: checker.count() - count + 1, spent: CpuTime::so_far()?.since(before), end })
    })
}

async fn receive_until(receiver: &mut AsyncReceiver, checker: &mut Checker, mark: u64, terms: &Terms) -> Result<()> {
    loop {
        let received = receiver.get().await?;
        if checker.check(payload::read(&received, terms.mode))? == mark {
            return Ok(());
        }
    }
}
