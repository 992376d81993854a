//! ipc-channel: its channel of bytes, which of its channels does the least per message (no serializing).
//! Its shared memory is no alternative: it is made anew for each message.

use ipc_channel::{
    IpcError, TryRecvError,
    ipc::{self, IpcBytesReceiver, IpcBytesSender, IpcOneShotServer, IpcSender},
};

use super::{End, Handle, Patience, Receiving, Sending, Way};
use crate::{
    Result,
    terms::{Terms, Wait},
};

pub(crate) struct IpcChannel;

impl Way for IpcChannel {
    type Sender = Output;
    type Receiver = Input;
}

/// An end that may still have to be handed over by the process that joins.
enum Pending<T> {
    /// The other process connects here and hands it over.
    Expected(IpcOneShotServer<T>),
    Here(T),
}

impl<T: for<'de> serde::Deserialize<'de> + serde::Serialize> Pending<T> {
    fn offer() -> Result<(Self, Handle)> {
        let (server, name) = IpcOneShotServer::new()?;
        Ok((Self::Expected(server), Handle { descriptors: Vec::new(), name }))
    }

    fn arrive(self) -> Result<Self> {
        match self {
            Self::Expected(server) => Ok(Self::Here(server.accept().map_err(|error| error.to_string())?.1)),
            here @ Self::Here(_) => Ok(here),
        }
    }

    fn here(&self) -> Result<&T> {
        match self {
            Self::Here(end) => Ok(end),
            Self::Expected(_) => Err("it has not come".into()),
        }
    }
}

fn hand_over<T: serde::Serialize>(end: T, handle: Handle) -> Result<()> {
    Ok(IpcSender::connect(handle.name)?.send(end).map_err(|error| error.to_string())?)
}

pub(crate) struct Output {
    sender: Option<Pending<IpcBytesSender>>,
    buffer: Vec<u8>,
}

impl End for Output {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (sender, handle) = Pending::offer()?;
        Ok((Self { sender: Some(sender), buffer: vec![0; terms.size] }, handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        let (sender, receiver) = ipc::bytes_channel()?;
        hand_over(receiver, handle)?;
        Ok(Self { sender: Some(Pending::Here(sender)), buffer: vec![0; terms.size] })
    }

    fn ready(&mut self) -> Result<()> {
        self.sender = self.sender.take().map(Pending::arrive).transpose()?;
        Ok(())
    }
}

impl Sending for Output {
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        write(&mut self.buffer);
        Ok(self.sender.as_ref().ok_or("it has not come")?.here()?.send(&self.buffer)?)
    }
}

pub(crate) struct Input {
    receiver: Option<Pending<IpcBytesReceiver>>,
    wait: Wait,
}

impl End for Input {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (receiver, handle) = Pending::offer()?;
        Ok((Self { receiver: Some(receiver), wait: terms.wait }, handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        let (sender, receiver) = ipc::bytes_channel()?;
        hand_over(sender, handle)?;
        Ok(Self { receiver: Some(Pending::Here(receiver)), wait: terms.wait })
    }

    fn ready(&mut self) -> Result<()> {
        self.receiver = self.receiver.take().map(Pending::arrive).transpose()?;
        Ok(())
    }
}

impl Receiving for Input {
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let receiver = self.receiver.as_ref().ok_or("it has not come")?.here()?;
        let failed = |error: IpcError| crate::Error::from(error.to_string());
        if self.wait == Wait::Block {
            return Ok(read(&receiver.recv().map_err(failed)?));
        }
        let mut patience = Patience::default();
        loop {
            match receiver.try_recv() {
                Ok(bytes) => return Ok(read(&bytes)),
                Err(TryRecvError::Empty) => patience.spin()?,
                Err(TryRecvError::IpcError(error)) => return Err(failed(error)),
            }
        }
    }
}
