//! The second process, and the socket over which the two agree on what to do.

use std::{
    io,
    os::fd::AsFd,
    process::{Child, Command, Stdio},
    time::Duration,
};

use fbuf_core::{
    limits::MAX_MESSAGE,
    process::processors::{self, CpuTime},
    socket::{Arrival, PacketSocket, wire},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Result, peers::Handle, terms::Terms, work};

/// What the first process says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Begin {
    pub(crate) terms: Terms,
    /// The way there.
    pub(crate) there: Handle,
    /// The way back, if there is one.
    pub(crate) back: Option<Handle>,
}

/// What the first process says later.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// All are ready.
    Go,
}

/// What the second process says.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Ready,
    Done(Done),
    Failed(String),
}

/// What the second process has done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// How many messages it got while it was measured.
    pub(crate) messages: u64,
    pub(crate) spent: CpuTime,
    /// When it got the last one, by the clock that both processes share.
    pub(crate) end: Duration,
}

/// The second process, as the first one sees it.
#[derive(Debug)]
pub(crate) struct Second {
    child: Child,
    line: Line,
}

impl Second {
    /// Starts it: this program again.
    pub(crate) fn start() -> Result<Self> {
        let (child, line) = Line::to(Command::new(std::env::current_exe()?).args(["bench", "second"]))?;
        Ok(Self { child, line })
    }

    /// Says what to do.
    pub(crate) fn begin(&self, begin: &Begin) -> Result<()> {
        self.line.tell(begin)
    }

    /// Waits until it is ready.
    pub(crate) fn wait_until_ready(&self) -> Result<()> {
        match self.line.hear()? {
            Answer::Ready => Ok(()),
            Answer::Failed(text) => Err(text.into()),
            Answer::Done(_) => Err("the second process was done before it began".into()),
        }
    }

    /// Lets it go.
    pub(crate) fn go(&self) -> Result<()> {
        self.line.tell(&Order::Go)
    }

    /// Waits until it is done.
    pub(crate) fn wait_until_done(mut self) -> Result<Done> {
        match self.line.hear()? {
            Answer::Done(done) => {
                self.child.wait()?;
                Ok(done)
            }
            Answer::Failed(text) => Err(text.into()),
            Answer::Ready => Err("the second process was ready twice".into()),
        }
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        // It has ended, or there is nothing more for it to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The first process, as the second one sees it.
#[derive(Debug)]
pub(crate) struct First(Line);

impl First {
    /// Says that messages may come.
    pub(crate) fn ready(&self) -> Result<()> {
        self.0.tell(&Answer::Ready)
    }

    /// Waits until it says so.
    pub(crate) fn wait_for_go(&self) -> Result<()> {
        let Order::Go = self.0.hear()?;
        Ok(())
    }
}

/// Is the second process.
pub(crate) fn second() -> Result<()> {
    let first = First(Line::of_this_process()?);
    let begin: Begin = first.0.hear()?;
    processors::pin(begin.terms.processors[1]);
    let answer = match work::second(begin, &first) {
        Ok(done) => Answer::Done(done),
        Err(error) => Answer::Failed(error.to_string()),
    };
    first.0.tell(&answer)
}

/// The socket between a process and one that it has started, whose standard input it is.
#[derive(Debug)]
pub(crate) struct Line(PacketSocket);

impl Line {
    /// Starts a process.
    pub(crate) fn to(command: &mut Command) -> Result<(Child, Self)> {
        let (ours, theirs) = PacketSocket::pair()?;
        let child = command.stdin(Stdio::from(theirs)).spawn()?;
        // Its end is its own: that it dies is noticed here.
        command.stdin(Stdio::null());
        Ok((child, Self(PacketSocket::new(ours)?)))
    }

    /// In the process that was started.
    pub(crate) fn of_this_process() -> Result<Self> {
        Ok(Self(PacketSocket::new(io::stdin().as_fd().try_clone_to_owned()?)?))
    }

    pub(crate) fn tell(&self, message: &impl Serialize) -> Result<()> {
        Ok(self.0.send(&wire::encode(message)?)?)
    }

    pub(crate) fn hear<T: DeserializeOwned>(&self) -> Result<T> {
        loop {
            match self.0.receive::<MAX_MESSAGE>()? {
                Arrival::Message(bytes, descriptors) => return Ok(wire::decode(&bytes, descriptors)?),
                Arrival::Nothing => {
                    poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE)?;
                }
                Arrival::HangUp => return Err("the other process died".into()),
                Arrival::TooLong | Arrival::NoDescriptors => {
                    return Err("the other process cannot be understood".into());
                }
            }
        }
    }
}
