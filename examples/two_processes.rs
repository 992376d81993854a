//! Two processes exchange buffers through a broker: `cargo run --example two_processes`
//!
//! In real life the broker is a service (`fbuf broker`), and both sides call `Client::connect()`.

use std::{env, error::Error, io::Write, process::Command};

use fbuf::{Address, Client, GetError, embedded::Embedded};

fn main() -> Result<(), Box<dyn Error>> {
    match env::args().nth(1) {
        Some(address) => receive(&Address::new(address)),
        None => send(),
    }
}

fn send() -> Result<(), Box<dyn Error>> {
    let broker = Embedded::start()?;
    let mut other = Command::new(env::current_exe()?).arg(broker.address().to_string()).spawn()?;

    let client = Client::connect_to(broker.address())?;
    let mut sender = client.sender("greetings").slot_size(4096).open()?;
    sender.wait_for_receivers(1)?;
    for name in ["Ada", "Barbara", "Grace"] {
        let mut fbuf = sender.allocate()?; // a slot of shared memory, ours alone
        write!(fbuf, "hello, {name}")?; // filled in place
        let sent = sender.write(fbuf)?; // given away: no copy, and we cannot touch it any more
        println!("process {} sent message {}", std::process::id(), sent.sequence);
    }
    sender.finish(); // the end of the stream, which is complete
    other.wait()?;
    Ok(())
}

fn receive(address: &Address) -> Result<(), Box<dyn Error>> {
    let mut receiver = Client::connect_to(address)?.receiver("greetings").open()?;
    loop {
        match receiver.get() {
            // Read where the sender wrote it. Dropping it hands the slot back.
            Ok(received) => {
                let (text, sender) = (std::str::from_utf8(&received)?, received.sender().process.pid);
                println!("process {} received from {sender}: {text}", std::process::id());
            }
            Err(GetError::Ended) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
