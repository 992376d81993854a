//! Many clients, each with a channel of its own, a sender and a receiver on it: in a few processes, or in this
//! one.

use std::process::{Child, Command};

use fbuf_client::{Address, Client, Receiver, Sender, Wait};
use serde::{Deserialize, Serialize};

use super::{SLOT, SLOTS, SOON, holdings::Holdings};
use crate::{Result, pair::Line};

/// In how many processes clients live, so that none runs out of descriptors.
const PROCESSES: u32 = 4;

/// What the first process says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Step {
    /// So many clients more connect.
    Connect(u32),
    /// Each that has none opens a sender, on a channel of its own.
    Send,
    /// Each that has none opens a receiver, and the two are linked.
    Receive,
}

/// Clients, and the ends of their channels.
pub(super) struct Crowd {
    address: Address,
    clients: Vec<Client>,
    senders: Vec<Sender>,
    receivers: Vec<Receiver>,
}

impl Crowd {
    pub(super) fn new(address: &str) -> Self {
        let address = Address::new(address);
        Self { address, clients: Vec::new(), senders: Vec::new(), receivers: Vec::new() }
    }

    /// A client that has all the channels.
    pub(super) fn of_one_client(address: &str, channels: u32) -> Result<Self> {
        let mut crowd = Self::new(address);
        let client = Client::connect_to(&crowd.address)?;
        crowd.clients = vec![client; channels as usize];
        crowd.step(Step::Send)?;
        crowd.step(Step::Receive)?;
        Ok(crowd)
    }

    fn step(&mut self, step: Step) -> Result<()> {
        let channel = |number: usize| format!("crowd/{}/{number}", std::process::id());
        match step {
            Step::Connect(clients) => {
                for _ in 0..clients {
                    self.clients.push(Client::connect_to(&self.address)?);
                }
            }
            Step::Send => {
                for number in self.senders.len()..self.clients.len() {
                    let sender = self.clients[number].sender(&channel(number)).slot_size(SLOT).slots(SLOTS);
                    self.senders.push(sender.wait(Wait::Block).open()?);
                }
            }
            Step::Receive => {
                for number in self.receivers.len()..self.senders.len() {
                    let receiver = self.clients[number].receiver(&channel(number)).wait(Wait::Block);
                    let mut receiver = receiver.open()?;
                    link(&mut self.senders[number], &mut receiver)?;
                    self.receivers.push(receiver);
                }
            }
        }
        Ok(())
    }
}

/// Waits until both ends have opened the link.
pub(super) fn link(sender: &mut Sender, receiver: &mut Receiver) -> Result<()> {
    sender.wait_for_receivers_timeout(1, SOON)?;
    // It looks for what a sender has to say when it is asked for messages.
    while receiver.senders() == 0 {
        if receiver.try_get()?.is_some() {
            return Err("a message came before any was sent".into());
        }
    }
    Ok(())
}

/// Many clients in processes of their own.
pub(super) struct Crowds {
    processes: Vec<(Child, Line)>,
    clients: u32,
}

impl Crowds {
    /// Starts the processes, in which nobody is yet.
    pub(super) fn start(address: &str) -> Result<Self> {
        let start = |_| {
            let (child, line) = Line::to(Command::new(std::env::current_exe()?).args(["bench", "crowd"]))?;
            line.tell(&address)?;
            Ok((child, line))
        };
        Ok(Self { processes: (0..PROCESSES).map(start).collect::<Result<_>>()?, clients: 0 })
    }

    /// Lets clients connect until there are so many.
    pub(super) fn connect(&mut self, clients: u32) -> Result<()> {
        let share = |all: u32, process: u32| (all + process) / PROCESSES;
        for (number, (_, line)) in (0..).zip(&self.processes) {
            line.tell(&Step::Connect(share(clients, number) - share(self.clients, number)))?;
            hear(line)?;
        }
        self.clients = clients;
        Ok(())
    }

    /// Lets them open what they have not.
    pub(super) fn step(&self, step: Step) -> Result<()> {
        self.processes.iter().try_for_each(|(_, line)| {
            line.tell(&step)?;
            hear(line)
        })
    }

    /// So many clients, each with a link.
    pub(super) fn grow_to(&mut self, clients: u32) -> Result<()> {
        self.connect(clients)?;
        self.step(Step::Send)?;
        self.step(Step::Receive)
    }

    /// What the processes hold together.
    pub(super) fn holdings(&self) -> Result<Holdings> {
        let mut each = self.processes.iter().map(|(child, _)| Holdings::of(child.id()));
        each.try_fold(Holdings::default(), |all, one| Ok(all.plus(one?)))
    }
}

fn hear(line: &Line) -> Result<()> {
    Ok(line.hear::<std::result::Result<(), String>>()??)
}

impl Drop for Crowds {
    fn drop(&mut self) {
        for (child, _) in &mut self.processes {
            // It may have ended already.
            let _ = child.kill();
        }
        for (child, _) in &mut self.processes {
            let _ = child.wait();
        }
    }
}

/// Is one of these processes, until the first one ends.
pub(crate) fn be() -> Result<()> {
    let line = Line::of_this_process()?;
    let mut crowd = Crowd::new(&line.hear::<String>()?);
    loop {
        let step = line.hear()?;
        line.tell(&crowd.step(step).map_err(|error| error.to_string()))?;
    }
}
