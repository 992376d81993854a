//! What a task of tokio waits for: ends of this library, an eventfd, a Unix socket. The runtime has one thread, and the task is its only
//! one.
#![allow(unsafe_code)]

use std::{
    cell::OnceCell,
    future::Future,
    io,
    os::{fd::OwnedFd, unix},
    rc::Rc,
    time::Duration,
};

use fbuf_client::{AsyncReceiver, AsyncSender};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest, unix::AsyncFd},
    net::UnixStream,
    runtime::{Builder, Runtime},
};

use super::{End, Handle, Receiving, Sending, Way, fbuf::FbufSender};
use crate::{Result, payload::NUMBER, terms::Terms};

/// The runtime of this thread.
pub(crate) fn runtime() -> io::Result<Rc<Runtime>> {
    thread_local! {
        static RUNTIME: OnceCell<Rc<Runtime>> = const { OnceCell::new() };
    }
    RUNTIME.with(|of_thread| match of_thread.get() {
        Some(runtime) => Ok(runtime.clone()),
        None => {
            let runtime = Rc::new(Builder::new_current_thread().enable_all().build()?);
            Ok(of_thread.get_or_init(|| runtime).clone())
        }
    })
}

/// An end, and the runtime in which it is waited for.
pub(crate) struct In<T> {
    runtime: Rc<Runtime>,
    end: T,
}

impl<T> In<T> {
    fn make(make: impl FnOnce() -> io::Result<T>) -> Result<Self> {
        let runtime = runtime()?;
        let end = {
            let _context = runtime.enter();
            make()?
        };
        Ok(Self { runtime, end })
    }

    pub(crate) fn into_end(self) -> T {
        self.end
    }
}

pub(crate) struct TokioFbuf;

impl Way for TokioFbuf {
    type Sender = In<(AsyncSender, usize)>;
    type Receiver = In<AsyncReceiver>;
}

impl In<(AsyncSender, usize)> {
    fn of(sender: FbufSender) -> Result<Self> {
        let (sender, size) = sender.into_parts();
        Self::make(|| Ok((AsyncSender::new(sender)?, size)))
    }
}

impl End for In<(AsyncSender, usize)> {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (sender, handle) = FbufSender::offer(terms)?;
        Ok((Self::of(sender)?, handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Self::of(FbufSender::join(terms, handle)?)
    }

    fn ready(&mut self) -> Result<()> {
        let Self { runtime, end: (sender, _) } = self;
        runtime.block_on(within(sender.wait_for_receivers(1)))?;
        Ok(())
    }
}

impl Sending for In<(AsyncSender, usize)> {
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        let Self { runtime, end: (sender, size) } = self;
        runtime.block_on(send(sender, *size, write))
    }
}

/// Sends a message, in a task.
#[inline]
pub(crate) async fn send(sender: &mut AsyncSender, size: usize, write: impl FnOnce(&mut [u8])) -> Result<()> {
    let mut fbuf = sender.allocate().await?;
    fbuf.set_len(size)?;
    write(&mut fbuf);
    sender.write(fbuf)?;
    Ok(())
}

impl End for In<AsyncReceiver> {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (receiver, handle) = <fbuf_client::Receiver as End>::offer(terms)?;
        Ok((Self::make(|| AsyncReceiver::new(receiver))?, handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        let receiver = <fbuf_client::Receiver as End>::join(terms, handle)?;
        Self::make(|| AsyncReceiver::new(receiver))
    }
}

impl Receiving for In<AsyncReceiver> {
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let Self { runtime, end } = self;
        Ok(read(&runtime.block_on(end.get())?))
    }
}

/// At most so long as an end is waited for elsewhere.
async fn within<T, E>(future: impl Future<Output = std::result::Result<T, E>>) -> Result<T>
where
    crate::Error: From<E>,
{
    Ok(tokio::time::timeout(Duration::from_secs(10), future).await??)
}

pub(crate) struct TokioEventfd;

impl Way for TokioEventfd {
    type Sender = In<AsyncFd<OwnedFd>>;
    type Receiver = In<AsyncFd<OwnedFd>>;
}

impl In<AsyncFd<OwnedFd>> {
    fn of(eventfd: OwnedFd) -> Result<Self> {
        // SAFETY: an OwnedFd has the same descriptor until it is dropped, which is after it is watched no more.
        Self::make(|| Ok(unsafe { AsyncFd::register_with_interest(eventfd, Interest::READABLE) }?))
    }
}

impl End for In<AsyncFd<OwnedFd>> {
    fn offer(_: &Terms) -> Result<(Self, Handle)> {
        let ours: OwnedFd = nix::sys::eventfd::EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_NONBLOCK)?.into();
        let theirs = ours.try_clone()?;
        Ok((Self::of(ours)?, Handle::of([theirs])))
    }

    fn join(_: &Terms, handle: Handle) -> Result<Self> {
        Self::of(handle.descriptor()?)
    }
}

impl Sending for In<AsyncFd<OwnedFd>> {
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        let mut number = [0; NUMBER];
        write(&mut number);
        // Zero would wake nobody.
        nix::unistd::write(self.end.get_ref(), &(u64::from_ne_bytes(number) + 1).to_ne_bytes())?;
        Ok(())
    }
}

impl Receiving for In<AsyncFd<OwnedFd>> {
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let Self { runtime, end } = self;
        let number = runtime.block_on(async {
            let mut number = [0; NUMBER];
            loop {
                let mut ready = end.readable().await?;
                let read = |eventfd: &AsyncFd<OwnedFd>| Ok(nix::unistd::read(eventfd.get_ref(), &mut number)?);
                if let Ok(read) = ready.try_io(read) {
                    read?;
                    return io::Result::Ok(number);
                }
            }
        })?;
        Ok(read(&(u64::from_ne_bytes(number) - 1).to_ne_bytes()))
    }
}

pub(crate) struct TokioUds;

impl Way for TokioUds {
    type Sender = In<(UnixStream, Vec<u8>)>;
    type Receiver = In<(UnixStream, Vec<u8>)>;
}

impl In<(UnixStream, Vec<u8>)> {
    fn of(socket: unix::net::UnixStream, terms: &Terms) -> Result<Self> {
        socket.set_nonblocking(true)?;
        Self::make(|| Ok((UnixStream::from_std(socket)?, vec![0; terms.size])))
    }
}

impl End for In<(UnixStream, Vec<u8>)> {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (ours, theirs) = unix::net::UnixStream::pair()?;
        Ok((Self::of(ours, terms)?, Handle::of([OwnedFd::from(theirs)])))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Self::of(handle.descriptor()?.into(), terms)
    }
}

impl Sending for In<(UnixStream, Vec<u8>)> {
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        let Self { runtime, end: (socket, buffer) } = self;
        write(buffer);
        Ok(runtime.block_on(socket.write_all(buffer))?)
    }
}

impl Receiving for In<(UnixStream, Vec<u8>)> {
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let Self { runtime, end: (socket, buffer) } = self;
        runtime.block_on(socket.read_exact(buffer))?;
        Ok(read(buffer))
    }
}
