//! What is paid once: connecting to the broker, opening both ends, linking them, the first message, and
//! growth. Both ends live in this process; the broker does, too, on a thread of its own.

use std::time::{Duration, Instant};

use fbuf_client::{Address, Client, Wait};

use crate::{Result, payload, terms::Mode};

/// The steps, in their order.
pub(crate) const STEPS: [&str; 7] =
    ["connect", "open a sender", "open a receiver", "link them", "first message", "second message", "grow"];

/// Bytes of a slot, and how many there are at first.
pub(crate) const SLOT: usize = 64 << 10;
pub(crate) const SLOTS: usize = 16;

/// How long each step took.
pub(crate) fn run(broker: &str) -> Result<[Duration; STEPS.len()]> {
    let mut clock = Instant::now();
    let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed();
    let client = Client::connect_to(&Address::new(broker))?;
    let connect = lap();
    let mut sender =
        client.sender("bench/once").slot_size(SLOT).slots(SLOTS).grow_to(2 * SLOTS).wait(Wait::Spin).open()?;
    let open_sender = lap();
    let mut receiver = client.receiver("bench/once").wait(Wait::Spin).open()?;
    let open_receiver = lap();
    // Both sides have to look; in two processes each would, by itself.
    while sender.receivers() == 0 {
        sender.poll_events();
        if receiver.try_get()?.is_some() {
            return Err("a message came before any was sent".into());
        }
    }
    let link = lap();
    let mut message = |number| -> Result<Duration> {
        let mut fbuf = sender.allocate()?;
        fbuf.set_len(SLOT)?;
        payload::write(&mut fbuf, number, Mode::Untouched);
        sender.write(fbuf)?;
        let received = receiver.get()?;
        payload::read(&received, Mode::Untouched);
        drop(received);
        Ok(lap())
    };
    let (first, second) = (message(0)?, message(1)?);
    let kept: Vec<_> = (0..SLOTS).map(|_| sender.allocate()).collect::<std::result::Result<_, _>>()?;
    let before = Instant::now();
    let one_more = sender.allocate()?;
    let grow = before.elapsed();
    drop((kept, one_more));
    Ok([connect, open_sender, open_receiver, link, first, second, grow])
}
