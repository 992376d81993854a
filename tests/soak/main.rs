//! A broker and a changing crowd of processes, for as long as one likes: they come to channels, send and
//! receive messages of all sizes at all levels of protection, leave, or are killed. Some senders and receivers
//! stay and check all that they get. Whenever the crowd has gone, the broker and those that stay must hold
//! what they held before.
//!
//! It takes FBUF_SOAK_SECONDS, or 5 seconds. What is drawn follows from FBUF_SOAK_SEED, which is printed:
//!
//! ```sh
//! FBUF_SOAK_SECONDS=1800 cargo test --release --test soak -- --nocapture
//! ```

mod message;
#[path = "../support/mod.rs"]
mod support;
mod survivor;
mod visitor;

use std::{
    env,
    fmt::Debug,
    io::{BufRead, BufReader, Read},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use fbuf_client::Client;
use support::{BrokerProcess, Holdings, Memory, Random, role::roles, settled, until_is};
use survivor::{CHANNELS, Survivors};
use visitor::{Gone, Visitor};

/// For how long visitors come before what is held is looked at.
const ROUND: Duration = Duration::from_secs(1);
/// How many visitors there are at a time.
const CROWD: usize = 6;
/// By how much resident memory of its own may have grown from the first quarter of the time to the last, in
/// KiB, in the broker and in the process of those that stay. An allocator keeps some of what it once needed.
const SLACK: [u64; 2] = [1024, 4096];
/// How many lines the printed series has at most.
const LINES: usize = 40;

/// What came of the visits.
#[derive(Debug, Default)]
struct Visits {
    came: u64,
    killed: u64,
    /// Channels that were there for two visitors.
    channels: u64,
}

impl Visits {
    /// Lets visitors come and go for a while, until all have gone.
    fn go_on_for(&mut self, time: Duration, broker: &str, random: &mut Random) {
        let (end, mut crowd) = (Instant::now() + time, Vec::new());
        loop {
            while Instant::now() < end && crowd.len() < CROWD {
                self.welcome(&mut crowd, broker, random);
            }
            crowd.retain_mut(|visitor: &mut Visitor| {
                let gone = visitor.look();
                self.killed += u64::from(gone == Some(Gone::Killed));
                gone.is_none()
            });
            if crowd.is_empty() && Instant::now() >= end {
                return;
            }
            Visitor::wait_for_any(&crowd);
        }
    }

    /// One visitor on a channel that stays, or two on one of their own.
    fn welcome(&mut self, crowd: &mut Vec<Visitor>, broker: &str, random: &mut Random) {
        let roles: [&str; 2] = if random.below(2) == 0 { ["sender", "receiver"] } else { ["receiver", "sender"] };
        let before = crowd.len();
        if random.below(4) == 0 {
            let kind = ["pair", "given"][random.below(2) as usize];
            let channel = format!("{kind}/{}", self.channels);
            self.channels += 1;
            crowd.extend(roles.map(|role| Visitor::start(broker, role, &channel, random)));
        } else {
            let (channel, _) = CHANNELS[random.below(CHANNELS.len() as u64) as usize];
            crowd.push(Visitor::start(broker, roles[0], channel, random));
        }
        self.came += (crowd.len() - before) as u64;
    }
}

/// Reads the broker's log, lest it waits for a reader: what is not as it should be is printed.
fn read_on(log: BufReader<Box<dyn Read + Send>>) {
    let wrong = |line: &String| line.contains("WARN") || line.contains("ERROR");
    log.lines().map_while(Result::ok).filter(wrong).for_each(|line| println!("the broker says: {line}"));
}

fn setting(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|error| panic!("{name}={value}: {error}")))
}

/// The median of some figures.
fn median(figures: impl Iterator<Item = u64>) -> u64 {
    let mut figures: Vec<_> = figures.collect();
    figures.sort_unstable();
    figures[figures.len() / 2]
}

#[test]
fn nothing_is_kept_of_those_that_come_and_go() {
    roles!(visitor::visit);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let (time, seed) = (Duration::from_secs(setting("FBUF_SOAK_SECONDS", 5)), setting("FBUF_SOAK_SEED", now | 1));
    println!("FBUF_SOAK_SEED={seed}");
    let mut random = Random(seed);
    let folder = tempfile::tempdir().unwrap();
    let (broker, metrics) = BrokerProcess::start_with_metrics(&folder.path().join("broker"), |_| {});
    let BrokerProcess { process, address, log } = broker;
    let reading = thread::spawn(move || read_on(log));
    let client = Client::connect_to(&address).unwrap();
    let survivors = Survivors::start(&client, &mut random);
    let processes = [process.pid(), std::process::id()];
    let holdings = || processes.map(Holdings::of);
    let mut visits = Visits::default();
    let (start, mut before, mut series) = (Instant::now(), None, Vec::new());
    while start.elapsed() < time || series.len() < 4 {
        visits.go_on_for(ROUND, &address.to_string(), &mut random);
        survivors.rest();
        // After the first round all is there that is made when it is needed first.
        match before {
            None => before = Some(settled(holdings)),
            Some(before) => until_is("a quiet moment", &before, holdings),
        }
        series.push((start.elapsed(), processes.map(Memory::of)));
        survivors.go_on();
    }
    let (messages, bytes) = survivors.end();
    drop(client);
    until_is("what is charged in the end", &Vec::new(), || metrics.used_by(nix::unistd::geteuid().as_raw()));
    drop(process);
    reading.join().unwrap();

    println!("seconds  broker: own + shared  those that stay: own + shared");
    for (time, [broker, own]) in series.iter().step_by(series.len().div_ceil(LINES)) {
        println!("{:>7.1}  {broker:>20}  {own:>20}", time.as_secs_f64());
    }
    let [broker, own] = before.unwrap();
    println!("at each of {} quiet moments: the broker {broker}; those that stay {own}", series.len());
    println!("{visits:?}; those that stay received {messages} messages, {} MiB", bytes >> 20);
    let quarter = series.len() / 4;
    for (index, part) in ["the broker", "those that stay"].into_iter().enumerate() {
        let of = |part: &[(Duration, [Memory; 2])]| median(part.iter().map(|(_, memory)| memory[index].private));
        let (first, last) = (of(&series[..quarter]), of(&series[series.len() - quarter..]));
        println!("{part}: {first} KiB in the first quarter, {last} KiB in the last");
        assert!(last <= first + SLACK[index], "{part} has grown from {first} to {last} KiB");
    }
    assert!(visits.killed > 0 && visits.killed < visits.came && messages > 0, "{visits:?}");
}
