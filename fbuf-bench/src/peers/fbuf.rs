//! This library, used as its documentation says.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use fbuf_client::{Address, Client, Mechanism, Pages, Receiver, Sender, SenderBuilder};

use super::{End, Handle, Receiving, Sending, Way};
use crate::{
    Result,
    payload::PAGE,
    terms::{Means, Terms},
};

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
        Self::open_by(connect(terms)?.sender(channel), terms, receivers)
    }

    fn open_by(sender: SenderBuilder, terms: &Terms, receivers: usize) -> Result<Self> {
        let sender = sender.slot_size(terms.size).wait(terms.wait.into());
        let sender = match terms.slots {
            Some(slots) => sender.slots(slots as usize),
            None => sender,
        };
        let lease = |pages| (sender.clone().mechanism(Mechanism::Lease).pages(pages), Some(pages));
        let (sender, pages) = match terms.means {
            Means::Volatile | Means::CopyOnWrite => (sender, None),
            Means::Guarded => (sender.guard(true), None),
            Means::Copy => (sender.mechanism(Mechanism::Copy), None),
            Means::OneShot => (sender.mechanism(Mechanism::OneShot), None),
            Means::Lease => lease(Pages::Base),
            Means::LeaseTransparent => lease(Pages::Transparent),
            Means::LeaseHuge => lease(Pages::Huge),
        };
        let sender = sender.open()?;
        if sender.protection_info().pages != pages {
            return Err(
                format!("{pages:?} were asked for, and this is what there is: {}", sender.protection_info()).into()
            );
        }
        Ok(Self { sender, size: terms.size, receivers })
    }
}

impl FbufSender {
    /// The sender, and the size of its messages.
    pub(super) fn into_parts(self) -> (Sender, usize) {
        (self.sender, self.size)
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
    #[inline(always)]
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        let mut fbuf = self.sender.allocate()?;
        fbuf.set_len(self.size)?;
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
    #[inline(always)]
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        Ok(read(&self.get()?))
    }
}

/// The same, where each message has a tag, and the receiver reads it.
pub(crate) struct Tagged;

impl Way for Tagged {
    type Sender = TaggedSender;
    type Receiver = TaggedReceiver;
}

pub(crate) struct TaggedSender(FbufSender);

impl End for TaggedSender {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let handle = channel();
        Ok((Self(FbufSender::open_by(connect(terms)?.sender(&handle.name).tags(), terms, 1)?), handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Ok(Self(FbufSender::open_by(connect(terms)?.sender(&handle.name).tags(), terms, 1)?))
    }

    fn ready(&mut self) -> Result<()> {
        self.0.ready()
    }
}

impl Sending for TaggedSender {
    #[inline(always)]
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        let Self(FbufSender { sender, size, .. }) = self;
        let mut fbuf = sender.allocate()?;
        fbuf.set_tag(TAG)?;
        fbuf.set_len(*size)?;
        write(&mut fbuf);
        sender.write(fbuf)?;
        Ok(())
    }
}

const TAG: u64 = 4711;

pub(crate) struct TaggedReceiver(Receiver);

impl End for TaggedReceiver {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (receiver, handle) = Receiver::offer(terms)?;
        Ok((Self(receiver), handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Ok(Self(Receiver::join(terms, handle)?))
    }
}

impl Receiving for TaggedReceiver {
    #[inline(always)]
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let (tag, result) = {
            let received = self.0.get()?;
            (received.tag(), read(&received))
        };
        if tag == TAG { Ok(result) } else { Err("a message came without its tag".into()) }
    }
}

/// The same, by any means of protection.
pub(crate) struct Protected;

impl Way for Protected {
    type Sender = FbufSender;
    type Receiver = ProtectedReceiver;
}

pub(crate) struct ProtectedReceiver {
    receiver: Receiver,
    means: Means,
}

impl End for ProtectedReceiver {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (receiver, handle) = Receiver::offer(terms)?;
        Ok((Self { receiver, means: terms.means }, handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Ok(Self { receiver: Receiver::join(terms, handle)?, means: terms.means })
    }
}

impl Receiving for ProtectedReceiver {
    #[inline(always)]
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let received = self.receiver.get()?;
        match self.means {
            Means::CopyOnWrite => {
                let mut own = received.into_private().map_err(|(_, error)| error)?;
                own.chunks_mut(PAGE).filter_map(|page| page.last_mut()).for_each(|byte| *byte ^= 1);
                Ok(read(&own))
            }
            Means::Lease | Means::LeaseTransparent | Means::LeaseHuge if received.mechanism() != Mechanism::Lease => {
                Err(format!("a message was not leased but {}", received.mechanism()).into())
            }
            _ => Ok(read(&received)),
        }
    }
}
