//! This library, used as its documentation says.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use fbuf_client::{Address, Client, Receiver, Sender};

use super::{End, Handle, Receiving, Sending, Way};
use crate::{Result, terms::Terms};

pub(crate) struct Fbuf;

impl Way for Fbuf {
    type Sender = FbufSender;
    type Receiver = Receiver;
}

pub(crate) struct FbufSender {
    sender: Sender,
    size: usize,
    receivers: usize,
}

/// A channel that nobody has used yet.
fn channel() -> Handle {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    Handle { descriptors: Vec::new(), name: format!("bench/{}", NEXT.fetch_add(1, Ordering::Relaxed)) }
}

fn connect(terms: &Terms) -> Result<Client> {
    Ok(Client::connect_to(&Address::new(&terms.broker))?)
}

impl FbufSender {
    fn open(terms: &Terms, channel: &str, receivers: usize) -> Result<Self> {
        let sender = connect(terms)?.sender(channel).slot_size(terms.size as u64).wait(terms.wait.into());
        let sender = match terms.slots {
            Some(slots) => sender.slots(slots.into()).open()?,
            None => sender.open()?,
        };
        Ok(Self { sender, size: terms.size, receivers })
    }
}

impl End for FbufSender {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let handle = channel();
        Ok((Self::open(terms, &handle.name, terms.others as usize)?, handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Self::open(terms, &handle.name, 1)
    }

    fn ready(&mut self) -> Result<()> {
        self.sender.wait_for_receivers_timeout(self.receivers, Duration::from_secs(10))?;
        Ok(())
    }
}

impl Sending for FbufSender {
    #[inline]
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        let mut fbuf = self.sender.allocate()?;
        fbuf.resize(self.size)?;
        write(&mut fbuf);
        self.sender.write(fbuf)?;
        Ok(())
    }
}

impl End for Receiver {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let handle = channel();
        Ok((connect(terms)?.receiver(&handle.name).wait(terms.wait.into()).open()?, handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Ok(connect(terms)?.receiver(&handle.name).wait(terms.wait.into()).open()?)
    }
}

/// Receives one message, and says which sender it is from.
#[inline]
pub(crate) fn receive_from<T>(receiver: &mut Receiver, read: impl FnOnce(&[u8]) -> T) -> Result<(u64, T)> {
    let received = receiver.get()?;
    Ok((received.sender().endpoint, read(&received)))
}

impl Receiving for Receiver {
    #[inline]
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        Ok(read(&self.get()?))
    }
}
