//! How a socket is closed: it hangs up, and what waits in it may take long to drop.

use std::os::fd::AsRawFd;

use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, Shutdown, recv, setsockopt, shutdown, sockopt},
};

#[cfg(miri)]
use super::heap;
use super::{Socket, relay, under_way, waiters};
use crate::{
    limits::MAX_AT_ONCE,
    process::{
        deferred::{Cause, Slow},
        sys::{self, First},
    },
};

impl Slow for Socket {
    /// Hangs up, and looks what waits.
    fn cause(&mut self) -> Option<Cause> {
        #[cfg(miri)]
        if heap::IS_USED {
            heap::hang_up(self.fd());
            return None;
        }
        if !self.generation.is_current() {
            // In a child of clone(2) it is its parent's; else nothing waits in it.
            return None;
        }
        // It may stay open, and would be ready for ever.
        for watch in self.watchers().drain(..) {
            watch.end(self.fd());
        }
        let slow = Some(Cause::Peer(self.user));
        if self.near.get().is_none() && self.is_slow() {
            return slow;
        }
        if let Some(user) = self.user.filter(|_| self.near.get().is_some()) {
            // This process may end next.
            waiters::wait_for(user, || relay::is_carried(self.fd()));
        }
        // Nothing more can come.
        let hung_up = self.measured(|| shutdown(self.fd().as_raw_fd(), Shutdown::Both));
        self.has_hung_up = true;
        if self.near.get().is_none() && self.is_slow() {
            return slow;
        }
        let is_known_empty =
            hung_up.and_then(|()| setsockopt(&self.fd(), sockopt::PassCred, &true)).is_ok() && self.drain();
        if is_known_empty { None } else { slow }
    }
}

impl Drop for Socket {
    /// What the other side has not received goes on to count. It is closed by another thread if what waits here [may take long](Slow::cause).
    fn drop(&mut self) {
        if !self.has_hung_up && self.generation.is_current() && cfg!(not(miri)) {
            let _ = shutdown(self.fd().as_raw_fd(), Shutdown::Both);
        }
        if let Some(user) = self.bounded().filter(|_| self.generation.is_current()) {
            // That socket may stay open, and what was passed here is to be closed all the same, and is closed here.
            under_way::close(user, self.descriptor(), self.is_emptied());
        }
    }
}

impl Socket {
    /// What waits first.
    fn first(&self) -> Option<First> {
        loop {
            match sys::first(self.fd()) {
                Ok(first) => return Some(first),
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::ENOTCONN) => return Some(First::Nothing),
                    // Said once.
                    Some(Errno::ECONNRESET | Errno::EINTR) => {}
                    _ => return None,
                },
            }
        }
    }

    /// Takes it off, with what it carries; false if it stays. A reset is said once, and before that.
    fn take_off(&self) -> bool {
        let taken = recv(self.fd().as_raw_fd(), &mut [], MsgFlags::MSG_DONTWAIT);
        matches!(taken, Ok(_) | Err(Errno::ECONNRESET))
    }

    /// Takes off the messages without descriptors that wait. Whether nothing waits then; if there are many, it is not
    /// found out.
    fn drain(&self) -> bool {
        for _ in 0..MAX_AT_ONCE {
            match self.first() {
                Some(First::Nothing) => return true,
                Some(First::Text) if self.take_off() => {}
                Some(First::Text | First::Descriptors) | None => return false,
            }
        }
        false
    }

    /// Takes off all that waits, when no more can come. Whether nothing waits then.
    fn is_emptied(&self) -> bool {
        loop {
            match self.first() {
                Some(First::Nothing) => return true,
                Some(_) if self.take_off() => {}
                Some(_) | None => return false,
            }
        }
    }
}
