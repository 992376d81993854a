//! What of received memory io_uring(7) takes, as docs/limits.md says; and what is sent of it without a copy, as
//! [`fbuf_client::Received`] says.
#![allow(unsafe_code, reason = "the kernel is given memory that outlives what it does with it")]

mod support;

use std::{
    fs,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
};

use fbuf_broker::Embedded;
use fbuf_client::{Client, Mechanism};
use io_uring::{IoUring, opcode, types};
use nix::{
    libc,
    sys::socket::{setsockopt, sockopt},
};
use support::{SOON, not_tested};

const SIZE: usize = 4096;

fn register(bytes: &[u8]) -> io::Result<()> {
    let ring = IoUring::new(1)?;
    let buffer = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: the ring, which is asked to do nothing with them, ends before the bytes.
    unsafe { ring.submitter().register_buffers(&[buffer]) }
}

fn write(bytes: &[u8]) -> Vec<u8> {
    let mut ring = IoUring::new(1).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let write = opcode::Write::new(types::Fd(file.as_raw_fd()), bytes.as_ptr(), bytes.len() as u32).build();
    // SAFETY: the bytes are there until it is done.
    unsafe { ring.submission().push(&write) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    assert_eq!(ring.completion().next().unwrap().result(), bytes.len() as i32);
    fs::read(file.path()).unwrap()
}

#[test]
fn what_is_mapped_read_only_cannot_be_registered_and_is_written_all_the_same() {
    if let Err(error) = IoUring::new(1) {
        return not_tested(&format!(
            "received memory is given to io_uring(7), which this kernel does not allow: {error}"
        ));
    }
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    for mechanism in [Mechanism::Shared, Mechanism::Copy, Mechanism::OneShot] {
        let mut receiver = client.receiver("c").open().unwrap();
        let mut sender = client.sender("c").slot_size(SIZE).slots(1).mechanism(mechanism).open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.write_all(&[7; SIZE]).unwrap();
        if mechanism == Mechanism::Shared {
            // What may be written can be registered: it is not the ring that refuses.
            register(&fbuf).unwrap();
        }
        sender.write(fbuf).unwrap();
        let received = receiver.get_timeout(SOON).unwrap();
        match mechanism {
            // A copy is memory of the receiver's own.
            Mechanism::Copy => register(&received).unwrap(),
            _ => assert_eq!(register(&received).unwrap_err().raw_os_error(), Some(libc::EFAULT), "{mechanism:?}"),
        }
        assert_eq!(write(&received), [7; SIZE], "{mechanism:?}");
    }
}

/// Sends messages with MSG_ZEROCOPY to a peer that reads late, and holds each of them until it has, or not: how many arrive
/// as they were.
fn send_by_reference(held: bool) -> usize {
    const MESSAGES: usize = 20;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // What the peer has no room for stays with the sending side, which reads the pages again.
    setsockopt(&listener, sockopt::RcvBuf, &8192).unwrap();
    let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    let one: libc::c_int = 1;
    // SAFETY: an int is read, which is there.
    let set =
        unsafe { libc::setsockopt(out.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, (&raw const one).cast(), 4) };
    assert_eq!(set, 0);
    let broker = Embedded::start().unwrap();
    let client = Client::connect_to(broker.address()).unwrap();
    let mut receiver = client.receiver("c").open().unwrap();
    let slots = if held { MESSAGES } else { 1 };
    let mut sender = client.sender("c").slot_size(BY_REFERENCE).slots(slots).open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut kept = Vec::new();
    for number in 0..MESSAGES {
        let mut fbuf = sender.allocate_timeout(SOON).unwrap();
        fbuf.write_all(&[number as u8; BY_REFERENCE]).unwrap();
        sender.write(fbuf).unwrap();
        let received = receiver.get_timeout(SOON).unwrap();
        let flags = libc::MSG_ZEROCOPY | libc::MSG_DONTWAIT;
        // SAFETY: the bytes are there for the call. What the kernel reads later is memory that stays mapped.
        let sent = unsafe { libc::send(out.as_raw_fd(), received.as_ptr().cast(), received.len(), flags) };
        assert_eq!(sent, BY_REFERENCE as isize, "{}", io::Error::last_os_error());
        kept.extend(held.then_some(received));
    }
    let mut arrived = [0; BY_REFERENCE];
    let is_right = |number: &usize| {
        far.read_exact(&mut arrived).unwrap();
        arrived == [*number as u8; BY_REFERENCE]
    };
    (0..MESSAGES).filter(is_right).count()
}

/// The length of a message that is sent by reference.
const BY_REFERENCE: usize = 16 << 10;

#[test]
fn what_is_sent_by_reference_is_held_until_the_kernel_has_done_with_it() {
    assert_eq!(send_by_reference(true), 20);
    // What it is held against: the slot is used again.
    assert!(send_by_reference(false) < 20, "the kernel has copied what was sent");
}
