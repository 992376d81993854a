//! A pool that runs dry: back-pressure, and how to see it: `cargo run --example dry_pool`

use std::{collections::VecDeque, error::Error, time::Duration};

use fbuf::{AllocateError, Client, embedded::Embedded};

fn main() -> Result<(), Box<dyn Error>> {
    let broker = Embedded::start()?;
    let client = Client::connect_to(broker.address())?;
    let mut receiver = client.receiver("work").open()?;
    // Three slots to start with, and six if need be.
    let mut sender = client.sender("work").slot_size(100).slots(3).grow_to(6).open()?;
    sender.wait_for_receivers(1)?;

    // A receiver that keeps what it gets.
    let mut kept = VecDeque::new();
    loop {
        let fbuf = match sender.allocate_timeout(Duration::from_millis(20)) {
            Ok(fbuf) => fbuf,
            Err(error @ AllocateError::TimedOut { .. }) => {
                println!("no slot: {error}");
                break;
            }
            Err(error) => return Err(error.into()),
        };
        sender.write(fbuf)?;
        kept.push_back(receiver.get()?);
        println!("the receiver keeps {}; the sender has {:?}", kept.len(), sender.counters().slots);
    }

    // One is enough to go on with, and it is the very slot that was dropped.
    let dropped = kept.pop_front().map(|received| received.sequence());
    let fbuf = sender.allocate()?;
    println!("message {dropped:?} was dropped: there is a slot again");
    drop(fbuf);
    let counters = sender.counters();
    println!("{} growths, {} waits, {} sleeps", counters.growths, counters.waits, counters.sleeps);
    Ok(())
}
