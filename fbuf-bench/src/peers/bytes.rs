//! Pipes and sockets: the kernel copies the message in and out of a stream of bytes.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{End, Handle, Receiving, Sending, Way};
use crate::{
    Result,
    terms::{Terms, Wait},
};

pub(crate) struct Pipe;
pub(crate) struct Uds;
pub(crate) struct Tcp;

/// Something with an end for writing and an end for reading.
pub(crate) trait Channel {
    /// The end for reading, and the end for writing.
    fn pair() -> Result<(OwnedFd, OwnedFd)>;
}

impl Channel for Pipe {
    fn pair() -> Result<(OwnedFd, OwnedFd)> {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        // As large as users may make it; the default of 64 KiB is slower.
        let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1 << 20));
        Ok((reader, writer))
    }
}

impl Channel for Uds {
    fn pair() -> Result<(OwnedFd, OwnedFd)> {
        let (reader, writer) = UnixStream::pair()?;
        Ok((reader.into(), writer.into()))
    }
}

impl Channel for Tcp {
    fn pair() -> Result<(OwnedFd, OwnedFd)> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let writer = TcpStream::connect(listener.local_addr()?)?;
        let (reader, _) = listener.accept()?;
        writer.set_nodelay(true)?;
        reader.set_nodelay(true)?;
        Ok((reader.into(), writer.into()))
    }
}

impl<C: Channel> Way for C {
    type Sender = Output<C>;
    type Receiver = Input<C>;
}

pub(crate) struct Output<C>(Copied, std::marker::PhantomData<C>);
pub(crate) struct Input<C>(Copied, std::marker::PhantomData<C>);

/// One end, and the memory that messages are copied from and to.
struct Copied {
    file: File,
    buffer: Vec<u8>,
    wait: Wait,
}

/// For how long somebody looks before it sleeps, if it may do both.
const SPIN_TIME: Duration = Duration::from_micros(50);

impl Copied {
    fn new(file: OwnedFd, terms: &Terms) -> Result<Self> {
        if terms.wait != Wait::Block {
            let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
            fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Self { file: file.into(), buffer: vec![0; terms.size], wait: terms.wait })
    }

    /// Moves all bytes of the buffer.
    fn transfer(
        &mut self,
        flags: PollFlags,
        mut step: impl FnMut(&File, &mut [u8]) -> io::Result<usize>,
    ) -> Result<()> {
        let (mut done, mut since) = (0, None);
        while done < self.buffer.len() {
            match step(&self.file, &mut self.buffer[done..]) {
                Ok(0) => return Err("the other process has closed its end".into()),
                Ok(count) => (done, since) = (done + count, None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.wait == Wait::Adaptive && since.get_or_insert_with(Instant::now).elapsed() > SPIN_TIME {
                        poll(&mut [PollFd::new(self.file.as_fd(), flags)], PollTimeout::NONE)?;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl<C: Channel> End for Output<C> {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (reader, writer) = C::pair()?;
        Ok((Self(Copied::new(writer, terms)?, std::marker::PhantomData), Handle::of([reader])))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Ok(Self(Copied::new(handle.descriptor()?, terms)?, std::marker::PhantomData))
    }
}

impl<C: Channel> End for Input<C> {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (reader, writer) = C::pair()?;
        Ok((Self(Copied::new(reader, terms)?, std::marker::PhantomData), Handle::of([writer])))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Ok(Self(Copied::new(handle.descriptor()?, terms)?, std::marker::PhantomData))
    }
}

impl<C: Channel> Sending for Output<C> {
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        write(&mut self.0.buffer);
        self.0.transfer(PollFlags::POLLOUT, |mut file, bytes| file.write(bytes))
    }
}

impl<C: Channel> Receiving for Input<C> {
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        self.0.transfer(PollFlags::POLLIN, |mut file, bytes| file.read(bytes))?;
        Ok(read(&self.0.buffer))
    }
}
