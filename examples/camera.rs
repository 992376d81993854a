//! Frames at a fixed rate, which nobody may delay: a viewer that is too slow misses some, and sees
//! how many: `cargo run --example camera`

use std::{
    error::Error,
    thread,
    time::{Duration, Instant},
};

use fbuf::{Client, GetError, embedded::Embedded};

const FRAME: usize = 1920 * 1080 * 3;
const FRAMES: u32 = 60;
const PERIOD: Duration = Duration::from_millis(10);

fn main() -> Result<(), Box<dyn Error>> {
    let broker = Embedded::start()?;
    let client = Client::connect_to(broker.address())?;

    let viewers = [("quick", Duration::ZERO), ("slow", 4 * PERIOD)].map(|(name, work)| {
        // Rather miss frames than have more than two waiting.
        let receiver = client.receiver("frames").max_backlog(3).open();
        thread::spawn(move || {
            let mut receiver = receiver.expect("a receiver");
            loop {
                match receiver.get() {
                    Ok(_frame) => thread::sleep(work),
                    Err(GetError::Ended) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            let counters = receiver.counters();
            println!("{name} viewer: {} frames seen, {} missed", counters.messages, counters.missed);
        })
    });

    let mut camera = client.sender("frames").slot_size(FRAME).slots(8).open()?;
    camera.wait_for_receivers(2)?;
    let start = Instant::now();
    for number in 0..FRAMES {
        let mut frame = camera.allocate()?;
        frame.set_len(FRAME)?;
        frame.fill(number as u8); // the exposure
        camera.write(frame)?;
        thread::sleep((start + number * PERIOD).saturating_duration_since(Instant::now()));
    }
    println!("camera: {FRAMES} frames in {:?}, waited {} times", start.elapsed(), camera.counters().waits);
    drop(camera);
    for viewer in viewers {
        viewer.join().expect("a viewer that ends in order");
    }
    Ok(())
}
