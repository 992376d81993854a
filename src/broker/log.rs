//! Where the broker's log goes.

use std::{
    io::{self, Write, stderr},
    os::fd::AsFd,
};

use nix::{
    libc::PIPE_BUF,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

/// Standard error, for lines. One for which there is no room is left out: a log that nobody reads must not hold up a
/// broker, which has no thread to spare for it.
#[derive(Debug)]
pub(super) struct Log;

impl Log {
    /// Whether a line can be written without waiting: what says that it has room has so much (pipe(7)).
    fn has_room(length: usize) -> bool {
        let stderr = stderr();
        let mut polled = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        length <= PIPE_BUF
            && poll(&mut polled, PollTimeout::ZERO) == Ok(1)
            && polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLOUT))
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if Self::has_room(line.len()) {
            stderr().write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
