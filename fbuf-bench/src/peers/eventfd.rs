//! An eventfd: what the kernel needs to wake a process, and no message but its number.

use std::os::fd::{AsFd, OwnedFd};

use super::{End, Handle, Receiving, Sending, Way};
use crate::{Result, payload::NUMBER, terms::Terms};

/// Both ends are alike.
pub(crate) struct Eventfd(OwnedFd);

impl Way for Eventfd {
    type Sender = Self;
    type Receiver = Self;
}

impl End for Eventfd {
    fn offer(_: &Terms) -> Result<(Self, Handle)> {
        let ours: OwnedFd = nix::sys::eventfd::EventFd::new()?.into();
        let theirs = ours.try_clone()?;
        Ok((Self(ours), Handle::of([theirs])))
    }

    fn join(_: &Terms, handle: Handle) -> Result<Self> {
        Ok(Self(handle.descriptor()?))
    }
}

impl Sending for Eventfd {
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        let mut number = [0; NUMBER];
        write(&mut number);
        // Zero would wake nobody.
        nix::unistd::write(self.0.as_fd(), &(u64::from_ne_bytes(number) + 1).to_ne_bytes())?;
        Ok(())
    }
}

impl Receiving for Eventfd {
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let mut number = [0; NUMBER];
        nix::unistd::read(self.0.as_fd(), &mut number)?;
        Ok(read(&(u64::from_ne_bytes(number) - 1).to_ne_bytes()))
    }
}
