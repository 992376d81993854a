//! Descriptors that are not this process's alone.

use std::{
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::stat::fstat,
};

use crate::process::{
    deferred::{Cause, DeferredDrop, LARGE, Slow, drop_deferred},
    sys::has_attributes,
};

/// A descriptor that another process has passed, or of a socket whose other end it has. To close it may take
/// [as long as that process likes](crate::process::deferred), so that another thread does it; but for memory that is neither large
/// nor locked, nor has attributes.
#[derive(Debug)]
pub struct Foreign(DeferredDrop<Passed>);

/// What is dropped when a descriptor is closed.
type Kept = Box<dyn fmt::Debug + Send + Sync>;

#[derive(Debug)]
struct Passed {
    // Closed before the rest is dropped.
    descriptor: OwnedFd,
    user: Option<u32>,
    /// Whether it is known to be memory that is not large.
    is_light: bool,
    kept: Vec<Kept>,
}

impl Slow for Passed {
    fn cause(&mut self) -> Option<Cause> {
        let descriptor = self.descriptor.as_fd();
        // Where Miri runs this, descriptors stand for memory on the heap.
        if cfg!(miri) {
            None
        } else if !self.is_light && !is_memory(descriptor)
            || is_locked(descriptor).unwrap_or(true)
            || has_attributes(descriptor)
        {
            Some(Cause::Peer(self.user))
        } else {
            (!self.is_light && is_large(descriptor)).then_some(Cause::Memory)
        }
    }
}

impl Foreign {
    /// The same, which came from a process of this user.
    #[must_use]
    pub fn of_user(mut self, user: Option<u32>) -> Self {
        self.0.user = user;
        self
    }

    /// The same, with something that is dropped when it is closed, by whatever thread.
    #[must_use]
    pub fn with(mut self, kept: impl fmt::Debug + Send + Sync + 'static) -> Self {
        self.0.kept.push(Box::new(kept));
        self
    }

    /// The descriptor, for a caller that may wait when it closes it.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.0.into_inner().descriptor
    }

    /// Whether it is memory: a memfd that can be sealed, or is. No file system is asked.
    #[must_use]
    pub fn is_memory(&self) -> bool {
        cfg!(miri) || is_memory(self.as_fd())
    }

    /// The same, of which was verified that it is memory of so many bytes, and no more.
    #[must_use]
    pub(crate) fn of_bytes(mut self, bytes: u64) -> Self {
        self.0.is_light = bytes < LARGE;
        self
    }

    /// Drops all of these, by one other thread if any of them may take long.
    pub fn drop_together(mut all: Vec<Self>) {
        // Memory waits for nobody, and so comes before what does.
        let cause = all.iter_mut().filter_map(|one| one.0.cause()).max();
        if let Some(cause) = cause {
            drop_deferred(cause, all.into_iter().map(|one| one.0.into_inner()).collect::<Vec<_>>());
        }
    }
}

/// Only memfds, files of tmpfs, and those of huge pages have seals, or none (`F_GET_SEALS` in fcntl(2)). Those of a file of
/// a file system that was mounted are `F_SEAL_SEAL` for ever, which only a memfd of no use here has, too. A small file may
/// be the last that is in use of a file system that was unmounted: then the thread that closes it frees all files of that.
fn is_memory(descriptor: BorrowedFd<'_>) -> bool {
    fcntl(descriptor, FcntlArg::F_GET_SEALS).is_ok_and(|seals| seals != SealFlag::F_SEAL_SEAL.bits())
}

/// Whether another process has locked any of this memory (F_SETLK and F_OFD_SETLK in fcntl(2)). Whichever thread closes the
/// last descriptor of an open file releases its locks, of which there may be many.
pub(crate) fn is_locked(memory: BorrowedFd<'_>) -> nix::Result<bool> {
    // Against all of it, whatever lock there is conflicts; and not one of the kind that belongs to the open file, as those
    // that were made through this very file would not.
    let (l_type, l_whence) = (libc::F_WRLCK as _, libc::SEEK_SET as _);
    let mut lock = libc::flock { l_type, l_whence, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(memory, FcntlArg::F_GETLK(&mut lock))?;
    Ok(lock.l_type != libc::F_UNLCK as _)
}

fn is_large(memory: BorrowedFd<'_>) -> bool {
    // Those behind its end are counted, too.
    fstat(memory).map_or(true, |stat| stat.st_blocks.max(0) as u64 >= LARGE / 512)
}

impl From<OwnedFd> for Foreign {
    fn from(descriptor: OwnedFd) -> Self {
        Self(Passed { descriptor, user: None, is_light: false, kept: Vec::new() }.into())
    }
}

impl AsFd for Foreign {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Reserved;
    use std::{fs::File, io::Write, os::unix::fs::OpenOptionsExt, sync::mpsc::channel, thread};

    /// Says which thread drops it.
    #[derive(Debug)]
    struct Witness(std::sync::mpsc::SyncSender<thread::ThreadId>);

    impl Drop for Witness {
        fn drop(&mut self) {
            let _ = self.0.send(thread::current().id());
        }
    }

    /// Whether this thread closes it.
    fn closes_here(descriptor: OwnedFd) -> bool {
        let (say, said) = std::sync::mpsc::sync_channel(1);
        drop(Foreign::from(descriptor).with(Witness(say)));
        said.recv().unwrap() == thread::current().id()
    }

    fn memory(bytes: u64) -> OwnedFd {
        Reserved::new("fbuf-test", bytes).unwrap().as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn memory_that_is_not_large_is_closed_here_and_nothing_else_is() {
        assert!(closes_here(memory(4096)));
        assert!(!closes_here(memory(LARGE)));
        let memfd = memfd::MemfdOptions::new().allow_sealing(true);
        let behind_end = memfd.create("fbuf-test").unwrap().into_file();
        let keep = nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(&behind_end, keep, 0, LARGE as i64).unwrap();
        assert!(!closes_here(behind_end.into()));
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        let (one, _other) = crate::socket::PacketSocket::pair().unwrap();
        for other in [reader, one, File::open("/dev/null").unwrap().into(), File::open("/").unwrap().into()] {
            assert!(!closes_here(other));
        }
    }

    #[test]
    fn memory_that_is_locked_is_closed_by_another_thread() {
        for is_light in [false, true] {
            for kind in [libc::F_RDLCK, libc::F_WRLCK] {
                let memory = memory(4096);
                let (l_type, l_whence) = (kind as _, libc::SEEK_SET as _);
                // Far behind its end.
                let lock = libc::flock { l_type, l_whence, l_start: 1 << 40, l_len: 1, l_pid: 0 };
                fcntl(&memory, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
                assert_eq!(is_locked(memory.as_fd()), Ok(true));
                let (say, said) = std::sync::mpsc::sync_channel(1);
                let foreign = Foreign::from(memory);
                let foreign = if is_light { foreign.of_bytes(4096) } else { foreign };
                drop(foreign.with(Witness(say)));
                assert_ne!(said.recv().unwrap(), thread::current().id());
            }
        }
    }

    /// The thread that closes the last file of an unmounted file system frees all that was in it.
    #[test]
    fn a_file_of_a_file_system_in_memory_is_no_memory_of_a_link() {
        let mut options = File::options();
        let mut file = options.read(true).write(true).custom_flags(libc::O_TMPFILE).open("/dev/shm").unwrap();
        file.write_all(&[0; 4096]).unwrap();
        assert!(fcntl(&file, FcntlArg::F_GET_SEALS).is_ok(), "/dev/shm is no tmpfs");
        let file = OwnedFd::from(file);
        assert!(!Foreign::from(file.try_clone().unwrap()).is_memory());
        assert!(!closes_here(file));
        // The control.
        assert!(Foreign::from(memory(4096)).is_memory());
    }

    #[test]
    fn several_are_closed_by_one_thread() {
        let (say, said) = channel();
        #[derive(Debug)]
        struct Each(std::sync::Mutex<std::sync::mpsc::Sender<thread::ThreadId>>);
        impl Drop for Each {
            fn drop(&mut self) {
                let _ = self.0.lock().unwrap().send(thread::current().id());
            }
        }
        let one = |fd: OwnedFd| Foreign::from(fd).with(Each(std::sync::Mutex::new(say.clone())));
        let null = || File::open("/dev/null").unwrap().into();
        Foreign::drop_together(vec![one(memory(4096)), one(null()), one(null())]);
        drop(say);
        let threads: Vec<_> = said.iter().collect();
        assert!(threads.len() == 3 && threads.iter().all(|thread| *thread == threads[0]));
        assert_ne!(threads[0], thread::current().id());
    }
}
