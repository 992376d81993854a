//! A peer that holds the lock of the inode of its memory, as it does in fallocate(2), or in write(2) for as long as it likes.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::mpsc::channel,
    thread::{self, JoinHandle},
    time::Duration,
};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use crate::memory::{Leasable, Map, Reserved, Seals, verify};

/// A thread that writes a file from a page that a file of userfaultfd(2) has to provide, and does not.
struct Held {
    faults: File,
    writer: JoinHandle<()>,
}

impl Held {
    /// Nothing, if this process may not have such a file.
    fn of(memory: &OwnedFd) -> Option<Self> {
        // SAFETY: makes a descriptor.
        let made = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        // SAFETY: it was just made, and is nobody else's.
        let mut faults = (made >= 0).then(|| unsafe { File::from_raw_fd(made as i32) })?;
        let page = Map::private_growing(4096).unwrap();
        let control = |request: u64, argument: &mut [u64]| {
            // SAFETY: the arguments are as long as these requests (linux/userfaultfd.h) say.
            let answer = unsafe { libc::ioctl(faults.as_raw_fd(), request as _, argument.as_mut_ptr()) };
            assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
        };
        // UFFDIO_API; UFFDIO_REGISTER, for pages that are missing.
        control(0xC018_AA3F, &mut [0xAA, 0, 0]);
        control(0xC020_AA00, &mut [page.addresses().start as u64, 4096, 1, 0]);
        let target = File::from(memory.try_clone().unwrap());
        let writer = thread::spawn(move || {
            // SAFETY: the page is mapped until the thread ends, and any bytes are bytes.
            let bytes = unsafe { std::slice::from_raw_parts(page.beginning(), 4096) };
            target.write_all_at(bytes, 0).unwrap();
        });
        // Told as soon as the kernel wants the page, which it does under the lock.
        faults.read_exact(&mut [0; 32]).unwrap();
        Some(Self { faults, writer })
    }

    fn release(self) {
        drop(self.faults);
        self.writer.join().unwrap();
    }
}

#[test]
fn no_peer_is_waited_for_that_holds_the_lock_of_the_inode() {
    const SIZE: u64 = 8192;
    let memory = Reserved::new("fbuf-test", SIZE).unwrap().as_fd().try_clone_to_owned().unwrap();
    fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))
        .unwrap();
    let Some(held) = Held::of(&memory) else {
        return println!("not tested: this process may not handle faults (vm.unprivileged_userfaultfd)");
    };
    let (say, said) = channel();
    type Check = (&'static str, fn(&OwnedFd));
    let checks: [Check; 2] = [
        ("verify", |memory| assert_eq!(verify(memory.as_fd(), SIZE, Seals::Size), Ok(SIZE))),
        ("a slot that is given", |memory| {
            let slot = Leasable::given(memory.try_clone().unwrap(), SIZE).unwrap();
            slot.verify_writer(memory.as_fd(), false).unwrap();
            drop((Map::of_reader(slot.as_fd(), SIZE), Map::of_writer(memory.as_fd(), SIZE, false)));
        }),
    ];
    let checking: Vec<_> = checks
        .into_iter()
        .map(|(name, check)| {
            let (memory, say) = (memory.try_clone().unwrap(), say.clone());
            thread::spawn(move || {
                check(&memory);
                let _ = say.send(name);
            })
        })
        .collect();
    drop(say);
    let checked = checking.iter().filter(|_| said.recv_timeout(Duration::from_secs(20)).is_ok()).count();
    held.release();
    assert_eq!(checked, checks.len(), "a check waited for a call of the peer");
    for thread in checking {
        thread.join().unwrap();
    }
}
