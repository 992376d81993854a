//! How long it takes to attach, and what a client and a link take, while there are more and more.

use std::time::Instant;

use fbuf_client::{Address, Client, Wait};

use super::{
    Extent, SLOT, SLOTS, SOON,
    broker::BrokerProcess,
    crowd::{Crowds, Step},
    figure::{Figure, Subject, Unit, several},
    holdings::Holdings,
};
use crate::Result;

/// Beside how many clients.
const BESIDE: [u32; 4] = [1, 10, 100, 1000];
/// How often one attaches in each run.
pub(super) const TRIES: usize = 20;
/// What is done to attach.
pub(super) const STEPS: [&str; 4] = ["connect", "open a sender", "open a receiver", "link them"];

/// How long each step took, in nanoseconds.
pub(super) fn attach(broker: &str) -> Result<[f64; STEPS.len()]> {
    let mut clock = Instant::now();
    let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed().as_nanos() as f64;
    let client = Client::connect_to(&Address::new(broker))?;
    let connect = lap();
    let mut sender = client.sender("bench/attach").slot_size(SLOT).slots(SLOTS).wait(Wait::Spin).open()?;
    let open_sender = lap();
    let _receiver = client.receiver("bench/attach").wait(Wait::Spin).open()?;
    let open_receiver = lap();
    sender.wait_for_receivers_timeout(1, SOON)?;
    Ok([connect, open_sender, open_receiver, lap()])
}

/// What is opened one after the other, when clients are added.
const STAGES: [&str; 3] = ["a client", "a sender", "a receiver and the link"];
/// Who holds something for them.
const WHO: [&str; 2] = ["the broker", "the client's process"];

/// Adds clients until there are so many: what each stage took, by who holds it.
fn grow(broker: &BrokerProcess, crowds: &mut Crowds, count: u32) -> Result<[[Holdings; WHO.len()]; STAGES.len()]> {
    let mut taken = [[Holdings::default(); WHO.len()]; STAGES.len()];
    let mut before = [broker.holdings()?, crowds.holdings()?];
    for (stage, taken) in taken.iter_mut().enumerate() {
        match stage {
            0 => crowds.connect(count)?,
            1 => crowds.step(Step::Send)?,
            _ => crowds.step(Step::Receive)?,
        }
        let now = [broker.holdings()?, crowds.holdings()?];
        *taken = [now[0] - before[0], now[1] - before[1]];
        before = now;
    }
    Ok(taken)
}

pub(super) fn measure(extent: Extent) -> Result<Vec<Figure>> {
    let counts = Extent::up_to(&BESIDE, extent.clients);
    let mut times = vec![Vec::new(); counts.len()];
    // Of the last growth, which is the largest.
    let (mut rooms, mut added) = (Vec::new(), extent.clients);
    for _ in 0..extent.runs {
        let broker = BrokerProcess::start(None)?;
        let (mut crowds, mut before) = (Crowds::start(&broker.address)?, 0);
        for (times, &count) in times.iter_mut().zip(&counts) {
            let taken = grow(&broker, &mut crowds, count)?;
            if count == extent.clients {
                rooms.push(taken);
                added = count - before;
            }
            before = count;
            for _ in 0..TRIES {
                times.push(attach(&broker.address)?);
            }
        }
    }
    let mut figures = Vec::new();
    for (times, &count) in times.iter().zip(&counts) {
        for (index, step) in STEPS.into_iter().enumerate() {
            let times: Vec<_> = times.iter().map(|time: &[f64; STEPS.len()]| time[index]).collect();
            figures.push(Figure::new(Subject::Attach, step, (several(count, "client"), count), Unit::Ns, &times)?);
        }
    }
    for (stage, column) in STAGES.into_iter().enumerate() {
        for (who, name) in WHO.into_iter().enumerate() {
            for (index, (what, _, is_bytes)) in Holdings::default().each().into_iter().enumerate() {
                let one = |taken: &[[Holdings; WHO.len()]; STAGES.len()]| taken[stage][who].each()[index].1;
                let each: Vec<_> = rooms.iter().map(|taken| one(taken) as f64 / f64::from(added)).collect();
                let unit = if is_bytes { Unit::Bytes } else { Unit::Number };
                figures.push(Figure::new(Subject::Room, format!("{name}: {what}"), (column, added), unit, &each)?);
            }
        }
    }
    Ok(figures)
}
