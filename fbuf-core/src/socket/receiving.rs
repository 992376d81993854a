//! What comes over a socket: a message with all of its descriptors, or why there is none.

#[cfg(miri)]
use std::os::fd::AsFd;
use std::{io, os::fd::AsRawFd, sync::atomic::Ordering};

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};

use super::PacketSocket;
#[cfg(miri)]
use super::heap;
use crate::{
    limits::MAX_DESCRIPTORS,
    process::{foreign::Foreign, sys},
};

/// What came out of a socket.
#[derive(Debug)]
pub enum Arrival {
    /// A message: its bytes, and its descriptors.
    Message(Vec<u8>, Vec<Foreign>),
    /// One that is longer, or carries more descriptors, than any may. One with descriptors stays, and nothing else comes.
    TooLong,
    /// One with descriptors that this process has no room for. It comes again at the next look.
    NoDescriptors,
    /// Nothing now.
    Nothing,
    /// Nothing any more: the other side is gone.
    HangUp,
}

impl PacketSocket {
    /// Takes the next message, of at most `LONGEST` bytes, without waiting.
    ///
    /// # Errors
    /// What recvmsg(2) says, but for "nothing now" and "gone", which are [`Arrival`]s.
    pub fn receive<const LONGEST: usize>(&self) -> io::Result<Arrival> {
        self.next::<LONGEST>(MAX_DESCRIPTORS, true)
    }

    /// As [`Self::receive`], where no message may carry more than so many descriptors.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub(crate) fn receive_few<const LONGEST: usize>(&self, most: usize) -> io::Result<Arrival> {
        self.next::<LONGEST>(most, true)
    }

    /// Says that messages carry few descriptors from here on, before the first of them is asked for.
    pub(crate) fn expect_few(&self, most: usize) {
        self.0.takes.store(most, Ordering::Relaxed);
    }

    /// As [`Self::receive`], where no message may carry a descriptor. One that does is too long, and its
    /// descriptors never are this process's.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn receive_bytes<const LONGEST: usize>(&self) -> io::Result<Arrival> {
        self.next::<LONGEST>(0, true)
    }

    /// As [`Self::receive`], of a message that stays until it is [taken off](Self::take_off), and that carries no more descriptors than
    /// was asked for last.
    pub(super) fn look<const LONGEST: usize>(&self) -> io::Result<Arrival> {
        // Relaxed: a message that comes behind the one that this was asked for is taken off a moment later.
        self.next::<LONGEST>(self.0.takes.load(Ordering::Relaxed), false)
    }

    fn next<const LONGEST: usize>(&self, most: usize, is_taken: bool) -> io::Result<Arrival> {
        #[cfg(miri)]
        if heap::IS_USED {
            return heap::receive(self.as_fd(), LONGEST, most);
        }
        if is_taken {
            self.0.takes.store(most, Ordering::Relaxed);
        }
        self.0.make_ready()?;
        // Until all of it is taken off, the socket is not exchanged.
        let _whole = self.0.lock_reading();
        let mut buffer = [0; LONGEST];
        // The kernel drops a message together with the descriptors for which a process has no room, and this thread closes
        // those that nobody else has. So a message that may carry any is looked at first, and taken off only with all of
        // them here.
        let is_vetted = is_taken && most == 0 && self.0.is_vetted;
        let mut receive = || match is_vetted {
            true => self.0.measured(|| sys::receive(self.0.fd(), &mut buffer)),
            false => sys::peek(self.0.fd(), &mut buffer, most),
        };
        let received = match receive() {
            // Said once, and before what had been sent.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => receive(),
            received => received,
        };
        match received {
            Ok(packet) => {
                let sys::Packet { length, descriptors, truncated, descriptors_lost, .. } = packet;
                let descriptors: Vec<_> =
                    descriptors.into_iter().map(|fd| Foreign::from(fd).of_user(self.0.user)).collect();
                let lacks_room = descriptors_lost && descriptors.len() < most;
                if is_taken && !is_vetted && !descriptors_lost && (!truncated || descriptors.is_empty()) {
                    // What it carries is here; or there is nothing: the end, which stays.
                    self.take_off()?;
                }
                if !truncated && !descriptors_lost && length > 0 {
                    return Ok(Arrival::Message(buffer[..length].to_vec(), descriptors));
                }
                Foreign::drop_together(descriptors);
                Ok(match (truncated, descriptors_lost) {
                    (false, true) if lacks_room => Arrival::NoDescriptors,
                    (false, false) => Arrival::HangUp,
                    _ => Arrival::TooLong,
                })
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(Arrival::Nothing),
                io::ErrorKind::ConnectionReset => Ok(Arrival::HangUp),
                _ => Err(error),
            },
        }
    }

    /// Takes off the message that was looked at. A reset that came in between is said first, and once.
    pub(super) fn take_off(&self) -> io::Result<()> {
        let take = || self.0.measured(|| recv(self.0.fd().as_raw_fd(), &mut [], MsgFlags::MSG_DONTWAIT));
        match take() {
            Err(Errno::ECONNRESET) => take()?,
            taken => taken?,
        };
        Ok(())
    }
}
