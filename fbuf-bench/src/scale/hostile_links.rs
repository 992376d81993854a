//! Receiving beside a process that has many links to the same receiver, and gives it as much to do over them as it
//! can: how long a call takes at most, and for how long nothing comes of a sender that sends each millisecond.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use fbuf_client::{Address, Client, GetError, Sender, Wait};

use super::{
    Extent, SLOT, SLOTS, SOON,
    broker::BrokerProcess,
    figure::{Figure, Subject, Unit, several},
    neighbour::{Kind, Neighbour},
};
use crate::Result;

/// How long a call may wait.
const CALL: Duration = Duration::from_millis(50);
/// How often the other sender sends.
const PACE: Duration = Duration::from_millis(1);
/// What is measured.
const WHAT: [&str; 3] = ["the longest try_get", "the longest get_timeout(50 ms)", "the other sender's longest silence"];

/// The longest of each, in nanoseconds.
type Longest = [f64; WHAT.len()];

pub(super) fn measure(extent: Extent) -> Result<Vec<Figure>> {
    let broker = BrokerProcess::start(None)?;
    let count = extent.clients.min(1000);
    let settings = [
        ("bench/refills", None),
        ("bench/refills", Some(Kind::Refills(count))),
        ("bench/rings", Some(Kind::Rings(count))),
    ];
    let mut runs = vec![Vec::new(); settings.len()];
    for _ in 0..extent.runs {
        for (runs, &(channel, kind)) in runs.iter_mut().zip(&settings) {
            runs.push(run(&broker.address, channel, kind, extent.time)?);
        }
    }
    let mut figures = Vec::new();
    for (runs, &(_, kind)) in runs.iter().zip(&settings) {
        for (index, what) in WHAT.into_iter().enumerate() {
            let values: Vec<_> = runs.iter().map(|longest: &Longest| longest[index]).collect();
            let beside = match kind {
                None => ("no other".to_owned(), 0),
                Some(Kind::Refills(_)) => (format!("{}, refilled", several(count, "lane")), count),
                Some(_) => (format!("{}, bells", several(count, "lane")), count),
            };
            figures.push(Figure::new(Subject::HostileLinks, what, beside, Unit::Ns, &values)?);
        }
    }
    Ok(figures)
}

fn run(address: &str, channel: &str, kind: Option<Kind>, time: Duration) -> Result<Longest> {
    let client = Client::connect_to(&Address::new(address))?;
    let mut receiver = client.receiver(channel).max_backlog(usize::MAX).keep_waiting().open()?;
    let mut sender = client.sender(channel).slot_size(SLOT).slots(SLOTS).wait(Wait::Block).open()?;
    let other = sender.endpoint();
    sender.wait_for_receivers_timeout(1, SOON)?;
    // It links while the receiver looks.
    let neighbour = thread::scope(|scope| -> Result<Option<Neighbour>> {
        let starting = scope.spawn(|| {
            let start = |kind| Neighbour::start(address, kind, false).map_err(|error| error.to_string());
            kind.map(start).transpose()
        });
        while !starting.is_finished() {
            drop(receiver.try_get()?);
        }
        Ok(starting.join().map_err(|_| "a thread panicked")??)
    })?;
    let done = AtomicBool::new(false);
    let mut longest = [Duration::ZERO; WHAT.len()];
    thread::scope(|scope| -> Result<()> {
        let sending = scope.spawn(|| send_at_pace(&mut sender, &done));
        let (begin, mut last) = (Instant::now(), Instant::now());
        for waits in [false, true].into_iter().cycle() {
            let start = Instant::now();
            if start - begin >= time {
                break;
            }
            let received = match waits {
                false => receiver.try_get(),
                true => receiver.get_timeout(CALL).map(Some),
            };
            let index = usize::from(waits);
            longest[index] = longest[index].max(start.elapsed());
            match received {
                Ok(Some(message)) if message.sender().endpoint == other => {
                    longest[2] = longest[2].max(last.elapsed());
                    last = Instant::now();
                }
                Ok(_) | Err(GetError::TimedOut) => {}
                Err(error) => return Err(error.into()),
            }
        }
        longest[2] = longest[2].max(last.elapsed());
        done.store(true, Ordering::Relaxed);
        sending.join().map_err(|_| "a thread panicked")?;
        Ok(())
    })?;
    if let Some(Some(status)) = neighbour.map(|mut neighbour| neighbour.has_ended()).transpose()? {
        return Err(format!("the process with many links has ended: {status}").into());
    }
    Ok(longest.map(|time| time.as_nanos() as f64))
}

fn send_at_pace(sender: &mut Sender, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        // With the receiver gone, or behind, it is done soon.
        if let Ok(Some(fbuf)) = sender.try_allocate() {
            let _ = sender.write(fbuf);
        }
        thread::sleep(PACE);
    }
}
