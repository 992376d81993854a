//! Several processes, each with a sender on one channel, and one that receives from all of them.

use std::collections::BTreeMap;

use fbuf_client::Receiver;
use fbuf_core::process::processors::CpuTime;

use super::{Figures, Run, now, stream};
use crate::{
    Result,
    pair::{Begin, Done, First, Second},
    payload::{self, Checker, LAST},
    peers::{End, Fbuf, Way, receive_from},
    terms::Terms,
};

pub(super) fn receive(terms: &Terms, others: Vec<Second>) -> Result<Run> {
    let (mut receiver, there) = Receiver::offer(terms)?;
    for other in &others {
        other.begin(&Begin { terms: terms.clone(), there: there.clone(), back: None })?;
    }
    for other in &others {
        other.wait_until_ready()?;
    }
    let (before, start) = (CpuTime::so_far()?, now()?);
    for other in &others {
        other.go()?;
    }
    // Each sender counts for itself.
    let (mut senders, mut ended) = (BTreeMap::<u64, Checker>::new(), 0);
    while ended < others.len() {
        let (sender, read) = receive_from(&mut receiver, |bytes| payload::read(bytes, terms.mode))?;
        if senders.entry(sender).or_default().check(read)? == LAST {
            ended += 1;
        }
    }
    let (seconds, receiving) = ((now()? - start).as_secs_f64(), CpuTime::so_far()?.since(before));
    let mut sending = CpuTime::default();
    for other in others {
        sending = sending + other.wait_until_done()?.spent;
    }
    let messages = senders.values().map(Checker::count).sum();
    let figures = Figures::Stream(stream::Stream::new(messages, terms.size, seconds));
    Ok(Run { messages, seconds, sender: sending, receiver: receiving, figures })
}

pub(super) fn send(begin: Begin, first: &First) -> Result<Done> {
    let Begin { terms, there, .. } = begin;
    let mut sender = <Fbuf as Way>::Sender::join(&terms, there)?;
    sender.ready()?;
    first.ready()?;
    first.wait_for_go()?;
    let (before, mut next) = (CpuTime::so_far()?, 0);
    stream::send_for(&mut sender, &mut next, terms.time, &terms)?;
    stream::send_one(&mut sender, next | LAST, terms.mode)?;
    Ok(Done { messages: next + 1, spent: CpuTime::so_far()?.since(before), end: now()? })
}
