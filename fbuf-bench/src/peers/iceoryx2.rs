//! iceoryx2, set up for speed as its documentation and its own benchmark do it: one publisher and one
//! subscriber, memory of a fixed size, slices that are not initialised before they are written, no
//! overflow and no history, and a publisher that tries again while the subscriber's buffer is full, so
//! that nothing is lost. Who blocks uses an event beside it, one notification for each message.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::{
    mem::MaybeUninit,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use iceoryx2::{
    port::{listener::Listener, notifier::Notifier, publisher::Publisher, subscriber::Subscriber},
    prelude::*,
    service::port_factory::{event, publish_subscribe},
};

use super::{End, Handle, Patience, Receiving, Sending, Way};
use crate::{
    Result,
    terms::{Terms, Wait},
};

pub(crate) struct Iceoryx2;

impl Way for Iceoryx2 {
    type Sender = Publishing;
    type Receiver = Subscribing;
}

/// What both ends open, whichever comes first.
struct Services {
    messages: publish_subscribe::PortFactory<ipc::Service, [u8], ()>,
    events: Option<event::PortFactory<ipc::Service>>,
    /// Dropped last.
    _node: Node<ipc::Service>,
}

/// A service that nobody has used yet.
fn service() -> Handle {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("bench/{}/{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    Handle { descriptors: Vec::new(), name }
}

impl Services {
    fn open(terms: &Terms, name: &str) -> Result<Self> {
        set_log_level(LogLevel::Fatal);
        let node = NodeBuilder::new().signal_handling_mode(SignalHandlingMode::Disabled).create::<ipc::Service>()?;
        // A mebibyte, which keeps all of it in one core's cache: with more, it is slower.
        let buffer = ((1 << 20) / terms.size.max(1)).clamp(2, 1024);
        let name: ServiceName = name.try_into()?;
        let messages = node
            .service_builder(&name)
            .publish_subscribe::<[u8]>()
            .max_publishers(1)
            .max_subscribers(1)
            .enable_safe_overflow(false)
            .history_size(0)
            .subscriber_max_buffer_size(buffer)
            .payload_alignment(Alignment::new(64).ok_or("no alignment")?)
            .open_or_create()?;
        let events = match terms.wait {
            Wait::Block => Some(node.service_builder(&name).event().open_or_create()?),
            _ => None,
        };
        Ok(Self { messages, events, _node: node })
    }
}

pub(crate) struct Publishing {
    publisher: Publisher<ipc::Service, [u8], ()>,
    notifier: Option<Notifier<ipc::Service>>,
    size: usize,
    services: Services,
}

impl Publishing {
    fn new(terms: &Terms, name: &str) -> Result<Self> {
        let services = Services::open(terms, name)?;
        let publisher = services
            .messages
            .publisher_builder()
            .initial_max_slice_len(terms.size)
            .allocation_strategy(AllocationStrategy::Static)
            .backpressure_strategy(BackpressureStrategy::RetryUntilDelivered)
            .create()?;
        let notifier = services.events.as_ref().map(|events| events.notifier_builder().create()).transpose()?;
        Ok(Self { publisher, notifier, size: terms.size, services })
    }
}

impl End for Publishing {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let handle = service();
        Ok((Self::new(terms, &handle.name)?, handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Self::new(terms, &handle.name)
    }

    fn ready(&mut self) -> Result<()> {
        let mut patience = Patience::default();
        while self.services.messages.dynamic_config().number_of_subscribers() == 0 {
            std::thread::sleep(Duration::from_millis(1));
            patience.spin()?;
        }
        // What was sent before a subscriber's connection is known would be lost.
        iceoryx2::port::update_connections::UpdateConnections::update_connections(&self.publisher)?;
        Ok(())
    }
}

impl Sending for Publishing {
    #[inline(always)]
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        let mut sample = self.publisher.loan_slice_uninit(self.size)?;
        let bytes: &mut [MaybeUninit<u8>] = sample.payload_mut();
        // SAFETY: bytes of shared memory are initialised, whoever wrote them last: the kernel zeroes it.
        write(unsafe { &mut *(std::ptr::from_mut(bytes) as *mut [u8]) });
        // SAFETY: as above.
        unsafe { sample.assume_init() }.send()?;
        if let Some(notifier) = &self.notifier {
            notifier.notify()?;
        }
        Ok(())
    }
}

pub(crate) struct Subscribing {
    subscriber: Subscriber<ipc::Service, [u8], ()>,
    listener: Option<Listener<ipc::Service>>,
    services: Services,
}

impl Subscribing {
    fn new(terms: &Terms, name: &str) -> Result<Self> {
        let services = Services::open(terms, name)?;
        let subscriber = services.messages.subscriber_builder().create()?;
        let listener = services.events.as_ref().map(|events| events.listener_builder().create()).transpose()?;
        Ok(Self { subscriber, listener, services })
    }
}

impl End for Subscribing {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let handle = service();
        Ok((Self::new(terms, &handle.name)?, handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Self::new(terms, &handle.name)
    }

    fn ready(&mut self) -> Result<()> {
        let mut patience = Patience::default();
        while self.services.messages.dynamic_config().number_of_publishers() == 0 {
            std::thread::sleep(Duration::from_millis(1));
            patience.spin()?;
        }
        // The first look opens the connection: what comes before it would be lost.
        match self.subscriber.receive()? {
            Some(_) => Err("a message came before any was due".into()),
            None => Ok(()),
        }
    }
}

impl Receiving for Subscribing {
    #[inline(always)]
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let mut patience = Patience::default();
        loop {
            if let Some(sample) = self.subscriber.receive()? {
                return Ok(read(sample.payload()));
            }
            match &self.listener {
                Some(listener) => {
                    listener.timed_wait(|_| {}, Duration::from_secs(1))?;
                }
                None => patience.spin()?,
            }
        }
    }
}
