//! Where the broker's log goes.

use std::{
    io::{self, Write, stderr},
    os::fd::AsFd,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    libc::PIPE_BUF,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

/// Standard error, for lines. A line that cannot be written at once is left out: a broker has no thread to spare for a
/// log without a reader, and goes on serving if its reader has gone, or the disk is full. The next line that can
/// be written says how many are missing.
#[derive(Debug)]
pub(super) struct Log;

/// How many lines were left out since the last that was written.
static MISSING: AtomicU64 = AtomicU64::new(0);

impl Log {
    /// Writes a line, if there is room for it.
    fn put(line: &[u8]) -> io::Result<()> {
        let stderr = stderr();
        let mut polled = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        poll(&mut polled, PollTimeout::ZERO)?;
        if !polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLOUT)) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // What says that it has room has so much (pipe(7)); more could wait.
        if line.len() > PIPE_BUF {
            return stderr.lock().write_all(&[&line[..PIPE_BUF - 1], b"\n"].concat());
        }
        stderr.lock().write_all(line)
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // Relaxed: a count, and lines come from one thread.
        let mut missing = MISSING.swap(0, Ordering::Relaxed);
        if missing > 0
            && Self::put(format!("fbuf: {missing} lines of this log could not be written\n").as_bytes()).is_ok()
        {
            missing = 0;
        }
        if missing > 0 || Self::put(line).is_err() {
            MISSING.fetch_add(missing + 1, Ordering::Relaxed);
        }
        // An error would be reported on standard error.
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
