//! The attacker: a sender that does what it can to change a message after it was sent.

use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::PathBuf,
    process, ptr,
};

use fbuf_client::{Address, Client, Mechanism};
use fbuf_core::{
    memory::Reserved,
    ring::{
        entry::{LaneFormat, capacity_for},
        lane::{LaneTable, LaneWriter},
    },
    slot::{Geometry, SlotId},
    socket::{
        link_message::{LinkMessage, NewSegment, OneShot, Welcome},
        wire::{self, Descriptor},
    },
};
use fbuf_protocol::{Role, Slots};
use io_uring::{IoUring, opcode, types};
use nix::{
    fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl},
    libc,
};

use crate::{Level, SIZE, client::Hostile, support::SOON};

/// What it prints before it stops.
pub const BEGIN: &str = "it is about to begin";

/// What it prints when it has tried for the first time, and whether it had anything to try it on.
pub const ATTEMPT: &str = "tried on";

/// What an attacker tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attack {
    /// Writes through a raw pointer that it kept.
    KeptPointer,
    /// Writes through a second mapping that mremap(2) makes of nothing, before it sends.
    Alias,
    /// Makes the page writable again with mprotect(2), and writes.
    MadeWritable,
    /// Forks before it sends, and the child writes through an alias that it was left.
    ChildBefore,
    /// Forks after it has sent, and the child writes where the sender did.
    ChildAfter,
    /// Has the kernel pin the page for I/O before it sends (`IORING_REGISTER_BUFFERS`), and then read into it
    /// from a pipe.
    Pinned,
    /// Opens the memory for writing once more before it sends, through /proc/self/fd, and writes.
    KeptDescriptor,
    /// The same, but the descriptor is on its way between two sockets while it sends.
    InFlight,
    /// Opens the memory for writing after it has sent, waiting for as long as that takes.
    Reopened,
    /// The same, without waiting.
    ReopenedAtOnce,
    /// Truncates the memory.
    Truncated,
    /// Punches holes into the memory.
    Punched,
    /// Sends memory that is not sealed.
    Unsealed,
    /// Sends memory that lacks a seal.
    TooFewSeals,
    /// Sends memory that is shorter than a message.
    TooShort,
    /// Sends a file on /dev/shm.
    RegularFile,
}

impl Attack {
    pub const ALL: [Self; 16] = [
        Self::KeptPointer,
        Self::Alias,
        Self::MadeWritable,
        Self::ChildBefore,
        Self::ChildAfter,
        Self::Pinned,
        Self::KeptDescriptor,
        Self::InFlight,
        Self::Reopened,
        Self::ReopenedAtOnce,
        Self::Truncated,
        Self::Punched,
        Self::Unsealed,
        Self::TooFewSeals,
        Self::TooShort,
        Self::RegularFile,
    ];
}

/// Is the attacker, for as long as it lives.
pub fn attack(attack: Attack, level: Level, from_receiver: bool) -> ! {
    // Whoever tests may be gone, and nobody else would end it.
    die_with_parent();
    if let Some(memory) = forged(attack, level) {
        send_forged(memory, level);
    }
    let client = Client::connect().unwrap();
    let mut sender = client.sender("prey").slot_size(SIZE).slots(2);
    sender = match level {
        Level::Volatile => sender.mechanism(Mechanism::Shared),
        Level::Guarded => sender.guard(true),
        Level::Copy => sender.mechanism(Mechanism::Copy),
        Level::Lease if from_receiver => sender.from_receiver(),
        Level::Lease => sender.mechanism(Mechanism::Lease),
        Level::OneShot => sender.mechanism(Mechanism::OneShot),
    };
    let mut sender = sender.open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(SIZE).unwrap();
    fbuf.fill(7);
    let kept = fbuf.as_mut_ptr();
    let (mut alias, mut pin, mut files, mut flying) = (ptr::null_mut(), None, Vec::new(), None);
    match attack {
        Attack::Alias => {
            // SAFETY: it makes a mapping where nothing is.
            alias = unsafe { libc::mremap(kept.cast(), 0, SIZE, libc::MREMAP_MAYMOVE) };
            assert_ne!(alias, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        }
        Attack::ChildBefore => {
            // Of the mapping that the library knows, a child has private memory only.
            // SAFETY: as above, and it changes what children see.
            unsafe {
                alias = libc::mremap(kept.cast(), 0, SIZE, libc::MREMAP_MAYMOVE);
                assert_ne!(alias, libc::MAP_FAILED, "{}", io::Error::last_os_error());
                libc::madvise(alias, SIZE, libc::MADV_DOFORK);
            }
            fork(|| scribble(alias.cast()));
            // What is left of it is the child's.
            // SAFETY: nobody of this process has a reference to it.
            unsafe { libc::munmap(alias, SIZE) };
        }
        Attack::Pinned => pin = Some(Pin::new(kept)),
        Attack::KeptDescriptor => files = open_all(0),
        Attack::InFlight => flying = Some(in_flight(open_all(0))),
        _ => {}
    }
    sender.write(fbuf).unwrap();
    begin();
    match attack {
        Attack::KeptPointer => scribble(kept),
        Attack::Alias => scribble(alias.cast()),
        Attack::MadeWritable => {
            // SAFETY: whatever is there, nobody of this process has a reference to it.
            unsafe { libc::mprotect(kept.cast(), SIZE, libc::PROT_READ | libc::PROT_WRITE) };
            scribble(kept)
        }
        Attack::Pinned => pin.into_iter().for_each(Pin::scribble),
        Attack::ChildAfter => fork(|| scribble(kept)),
        Attack::InFlight => files = flying.map(landed).unwrap_or_default(),
        _ => {}
    }
    for attempt in 0.. {
        if let Some(flags) = match attack {
            Attack::Reopened => Some(0),
            Attack::ReopenedAtOnce | Attack::Truncated | Attack::Punched => Some(libc::O_NONBLOCK),
            _ => None,
        } {
            // Not those that it has already.
            files.clear();
            files = open_all(flags);
        }
        for file in &files {
            // None of it has to succeed.
            let _ = match attack {
                Attack::Truncated => file.set_len(0),
                Attack::Punched => {
                    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                    fallocate(file, hole, 0, SIZE as i64).map_err(io::Error::from)
                }
                _ => file.write_all_at(&[0xEE; SIZE], 0),
            };
        }
        if attempt == 0 {
            println!("{ATTEMPT} {}", if files.is_empty() { "nothing" } else { "something" });
            io::stdout().flush().unwrap();
        }
        std::thread::yield_now();
    }
    unreachable!()
}

/// Stops until it is told to go on.
pub fn begin() {
    println!("{BEGIN}");
    io::stdout().flush().unwrap();
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).unwrap();
}

pub fn die_with_parent() {
    // SAFETY: it sets a flag of this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

fn fork(child: impl FnOnce()) {
    // SAFETY: the child does nothing but write to memory until it is killed.
    if unsafe { nix::unistd::fork() }.unwrap().is_child() {
        die_with_parent();
        child();
    }
}

fn scribble(at: *mut u8) -> ! {
    for value in 0.. {
        // SAFETY: none. It is somebody else's now, if it is there at all.
        unsafe { at.add(value % SIZE).write_volatile((value / SIZE) as u8) };
    }
    unreachable!()
}

/// A page that the kernel keeps for I/O, whatever becomes of the mappings of it.
struct Pin {
    ring: IoUring,
    page: *mut u8,
}

impl Pin {
    fn new(page: *mut u8) -> Self {
        let ring = IoUring::new(1).unwrap();
        let buffer = libc::iovec { iov_base: page.cast(), iov_len: SIZE };
        // SAFETY: none. That it is written when it is somebody else's is the point of it.
        unsafe { ring.submitter().register_buffers(&[buffer]) }.unwrap();
        Self { ring, page }
    }

    fn scribble(mut self) {
        let (from, to) = nix::unistd::pipe().unwrap();
        for value in 0.. {
            nix::unistd::write(&to, &[value as u8; SIZE]).unwrap();
            let read = opcode::ReadFixed::new(types::Fd(from.as_raw_fd()), self.page, SIZE as u32, 0).build();
            // SAFETY: none, as above.
            unsafe { self.ring.submission().push(&read) }.unwrap();
            self.ring.submit_and_wait(1).unwrap();
            assert_eq!(self.ring.completion().next().unwrap().result(), SIZE as i32);
        }
    }
}

/// Opens for writing all memory that this process has a descriptor of, as far as it may.
fn open_all(flags: i32) -> Vec<File> {
    let entries: Vec<PathBuf> = fs::read_dir("/proc/self/fd").unwrap().flatten().map(|entry| entry.path()).collect();
    let slot = |path: &&PathBuf| {
        let target = fs::read_link(path).unwrap_or_default();
        ["segment", "slot", "sealed"]
            .iter()
            .any(|name| target.to_string_lossy().starts_with(&format!("/memfd:fbuf-{name}")))
    };
    let open = |path: &PathBuf| File::options().read(true).write(true).custom_flags(flags).open(path).ok();
    entries.iter().filter(slot).filter_map(open).collect()
}

/// Sends descriptors to nobody, and closes them.
fn in_flight(files: Vec<File>) -> (OwnedFd, OwnedFd) {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let (to, from) = std::os::unix::net::UnixStream::pair().unwrap();
    let raw: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    sendmsg::<()>(to.as_raw_fd(), &[io::IoSlice::new(b"x")], &rights, MsgFlags::empty(), None).unwrap();
    (to.into(), from.into())
}

/// Takes them back.
fn landed((_to, from): (OwnedFd, OwnedFd)) -> Vec<File> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    let (mut byte, mut space) = ([0; 1], nix::cmsg_space!([i32; 64]));
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    let message = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()).unwrap();
    let rights = message.cmsgs().unwrap().find_map(|part| match part {
        ControlMessageOwned::ScmRights(raw) => Some(raw),
        _ => None,
    });
    // SAFETY: the kernel has just made them for us and told nobody else.
    rights.unwrap_or_default().into_iter().map(|raw| unsafe { File::from_raw_fd(raw) }).collect()
}

/// The memory that such an attacker sends instead of what it should.
fn forged(attack: Attack, level: Level) -> Option<OwnedFd> {
    let fresh = |size| Reserved::new("fbuf-test", size).unwrap().as_fd().try_clone_to_owned().unwrap();
    Some(match attack {
        Attack::Unsealed => fresh(SIZE as u64),
        Attack::TooFewSeals => {
            let memory = fresh(SIZE as u64);
            let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
            fcntl(&memory, FcntlArg::F_ADD_SEALS(seals)).unwrap();
            memory
        }
        Attack::TooShort => {
            let (memory, writing) = (
                fresh(SIZE as u64 / 2),
                match level {
                    Level::OneShot => SealFlag::F_SEAL_WRITE,
                    _ => SealFlag::F_SEAL_FUTURE_WRITE,
                },
            );
            let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL | writing;
            fcntl(&memory, FcntlArg::F_ADD_SEALS(seals)).unwrap();
            memory
        }
        Attack::RegularFile => {
            let path = format!("/dev/shm/fbuf-test-{}", process::id());
            fs::write(&path, [7; SIZE]).unwrap();
            let file = File::options().read(true).write(true).open(&path).unwrap();
            fs::remove_file(path).unwrap();
            file.into()
        }
        _ => return None,
    })
}

/// Speaks to the receiver as the library does, but for the memory.
fn send_forged(memory: OwnedFd, level: Level) -> ! {
    let (mechanism, slots) = match level {
        Level::Volatile | Level::Guarded => (Mechanism::Shared, Slots::Segments),
        Level::Copy => (Mechanism::Copy, Slots::Segments),
        Level::Lease => (Mechanism::Lease, Slots::Broker { huge: false }),
        Level::OneShot => (Mechanism::OneShot, Slots::Segments),
    };
    let geometry = Geometry::new(SIZE as u64, 1).unwrap();
    let role = Role::sender(SIZE as u64, 1, mechanism, slots);
    let address = Address::new(env::var_os("FBUF_BROKER").unwrap());
    let hostile = Hostile::join(&address, "prey", role);
    let (lane, lane_fd) =
        LaneTable::create("fbuf-lane", capacity_for(geometry.max_slots(), LaneFormat::PLAIN)).unwrap();
    let memory = Descriptor::from(memory);
    let mut welcome = Welcome {
        lane: lane_fd.into(),
        format: LaneFormat::PLAIN,
        first_sequence: 0,
        segments: Vec::new(),
        slots: Vec::new(),
    };
    if level == Level::OneShot {
        hostile.say(&LinkMessage::Welcome(welcome));
        hostile.say(&LinkMessage::OneShot(OneShot { memory, sequence: 0 }));
    } else {
        welcome.segments.push(NewSegment { memory, slots: 1 });
        hostile.say(&LinkMessage::Welcome(welcome));
    }
    LaneWriter::new(lane, LaneFormat::PLAIN).message(SlotId::new(0), SIZE as u32);
    // Who was refused already hears nothing.
    let _ = hostile.link.send(&wire::encode(&LinkMessage::Bell).unwrap());
    begin();
    loop {
        std::thread::park();
    }
}
