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
}

/// A channel that nobody has used yet.
fn channel() -> Handle {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    Handle { descriptors: Vec::new(), name: format!("bench/{}", NEXT.fetch_add(1, Ordering::Relaxed)) }
}

fn connect(terms: &Terms) -> Result<Client> {
    Ok(Client::connect_to(&Address::new(&terms.broker))?)
}

impl End for FbufSender {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let handle = channel();
        let sender = connect(terms)?.sender(&handle.name).slot_size(terms.size as u64).wait(terms.wait.into());
        let sender = match terms.slots {
            Some(slots) => sender.slots(slots.into()).open()?,
            None => sender.open()?,
        };
        Ok((Self { sender, size: terms.size }, handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        let sender = connect(terms)?.sender(&handle.name).slot_size(terms.size as u64).wait(terms.wait.into());
        let sender = match terms.slots {
            Some(slots) => sender.slots(slots.into()).open()?,
            None => sender.open()?,
        };
        Ok(Self { sender, size: terms.size })
    }

    fn ready(&mut self) -> Result<()> {
        self.sender.wait_for_receivers_timeout(1, Duration::from_secs(10))?;
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

impl Receiving for Receiver {
    #[inline]
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        Ok(read(&self.get()?))
    }
}
