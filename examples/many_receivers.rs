//! Every receiver gets every message, from the same memory: `cargo run --example many_receivers`

use std::{error::Error, io::Write, thread};

use fbuf::{Client, GetError, embedded::Embedded};

const RECEIVERS: usize = 3;

fn main() -> Result<(), Box<dyn Error>> {
    let broker = Embedded::start()?;
    let client = Client::connect_to(broker.address())?;

    let receivers: Vec<_> = (1..=RECEIVERS)
        .map(|number| {
            let mut receiver = client.receiver("news").open()?;
            Ok(thread::spawn(move || {
                loop {
                    match receiver.get() {
                        Ok(received) => {
                            let (at, text) = (received.as_ptr(), String::from_utf8_lossy(&received));
                            println!("receiver {number}: message {} is {text:?}, read at {at:p}", received.sequence());
                        }
                        Err(GetError::Ended) => return,
                        Err(error) => panic!("{error}"),
                    }
                }
            }))
        })
        .collect::<Result<_, fbuf::OpenError>>()?;

    let mut sender = client.sender("news").slot_size(100).slots(2).open()?;
    sender.wait_for_receivers(RECEIVERS)?;
    for text in ["one", "two", "three", "four"] {
        // Two slots carry four messages: each comes back when its last receiver has dropped it.
        let mut fbuf = sender.allocate()?;
        fbuf.write_all(text.as_bytes())?;
        println!("sent to {} receivers: {text:?}", sender.write(fbuf)?.receivers);
    }
    drop(sender);
    for receiver in receivers {
        receiver.join().expect("a receiver that ends in order");
    }
    Ok(())
}
