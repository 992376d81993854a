//! Two processes that are async programs of tokio: `cargo run --example tasks`
//!
//! A server answers requests while it does other things; a client asks several at once.

use std::{env, error::Error, io::Write, process::Command, time::Duration};

use fbuf::{Address, AsyncReceiver, AsyncSender, Client, GetError, embedded::Embedded};
use tokio::time::interval;

fn main() -> Result<(), Box<dyn Error>> {
    // The broker, and what waits for it, has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match env::args().nth(1) {
        Some(address) => runtime.block_on(serve(&Address::new(address))),
        None => {
            let broker = Embedded::start()?;
            let mut server = Command::new(env::current_exe()?).arg(broker.address().to_string()).spawn()?;
            runtime.block_on(ask(broker.address()))?;
            server.wait()?;
            Ok(())
        }
    }
}

async fn ask(address: &Address) -> Result<(), Box<dyn Error>> {
    let client = Client::connect_to(address)?;
    let mut answers = AsyncReceiver::new(client.receiver("answers").open()?)?;
    let mut requests = AsyncSender::new(client.sender("requests").slot_size(4096).tags().open()?)?;
    requests.wait_for_receivers(1).await?;
    for tag in 1..=3 {
        let mut request = requests.allocate().await?; // waits for a slot, and blocks no thread
        write!(request, "what is {tag} times {tag}?")?;
        request.set_tag(tag)?;
        requests.write(request)?;
    }
    for _ in 1..=3 {
        let answer = answers.get().await?;
        println!("answer to request {}: {}", answer.tag(), std::str::from_utf8(&answer)?);
    }
    requests.finish();
    Ok(())
}

async fn serve(address: &Address) -> Result<(), Box<dyn Error>> {
    let client = Client::connect_to(address)?;
    let mut requests = AsyncReceiver::new(client.receiver("requests").open()?)?;
    let mut answers = AsyncSender::new(client.sender("answers").slot_size(4096).tags().open()?)?;
    answers.wait_for_receivers(1).await?;
    let mut clock = interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            _ = clock.tick() => {} // something else; a `get` that is given up has taken nothing
            request = requests.get() => {
                let request = match request {
                    Ok(request) => request,
                    Err(GetError::Ended) => return Ok(()),
                    Err(error) => return Err(error.into()),
                };
                let mut answer = answers.allocate().await?;
                write!(answer, "{}", request.tag() * request.tag())?;
                answer.set_tag(request.tag())?;
                answers.write(answer)?;
            }
        }
    }
}
