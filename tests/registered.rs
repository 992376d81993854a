//! What of received memory io_uring(7) takes: docs/limits.md says so.
#![allow(unsafe_code, reason = "the kernel is given memory that outlives what it does with it")]

mod support;

use std::{
    fs,
    io::{self, Write},
    os::fd::AsRawFd,
};

use fbuf_broker::Embedded;
use fbuf_client::{Client, Mechanism};
use io_uring::{IoUring, opcode, types};
use nix::libc;
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
        let mut sender = client.sender("c").slot_size(SIZE as u64).slots(1).mechanism(mechanism).open().unwrap();
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
