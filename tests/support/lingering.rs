//! A socket that takes long to close.

use std::{
    io::{self, Write},
    mem,
    net::{TcpListener, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use fbuf_core::socket::{
    PacketSocket,
    wire::{Descriptor, Letter},
};
use nix::libc;

/// A TCP connection with bytes that its other end, which is kept, does not take. The last process that closes it waits for
/// so many seconds.
#[allow(unsafe_code, reason = "setsockopt(2) and ioctl(2)")]
pub fn lingering(seconds: i32) -> Descriptor {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let set = |socket: &dyn AsRawFd, option, value: &[i32]| {
        let (place, size) = (value.as_ptr().cast(), mem::size_of_val(value) as libc::socklen_t);
        // SAFETY: the value lives here, and has so many bytes.
        let result = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, place, size) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    };
    // Soon full.
    set(&listener, libc::SO_RCVBUF, &[4096]);
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    set(&socket, libc::SO_SNDBUF, &[4096]);
    mem::forget(listener.accept().unwrap());
    socket.set_nonblocking(true).unwrap();
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(5) {
        if socket.write(&[0; 4096]).is_ok() {
            since = Instant::now();
        }
    }
    let mut unsent = 0;
    // SAFETY: it stores one int, for which there is room.
    unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut unsent) };
    assert!(unsent > 0, "all was taken");
    // SO_LINGER: on, and for how long.
    set(&socket, libc::SO_LINGER, &[1, seconds]);
    OwnedFd::from(socket).into()
}

/// Sends a letter with some, if the other side is still there, and closes them here. If the other side was sooner, it is this that
/// waits, and nothing waits for it.
pub fn pass(socket: &PacketSocket, letter: Letter) -> io::Result<()> {
    let sent = socket.send(&letter);
    thread::spawn(move || drop(letter));
    sent
}
