//! The guard: what was sent is read-only in its sender too, so that a stray write traps at its
//! instruction; and the handler of that trap, which says what was hit. For finding such writes: it costs
//! two system calls for each message.
//!
//! One of the files of this crate that may be `unsafe`: a signal handler is installed here, while
//! anything is guarded, and only then.
#![allow(unsafe_code)]

use std::{
    fmt::{self, Write},
    io::{self, stderr},
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    libc,
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction},
};

use crate::process::fork::{ForkMutex, Rank};
use crate::{
    memory::{Map, wrapping::WrappingTable},
    ring::board::{BoardReader, BoardView},
    slot::{Geometry, Mark, SlotId},
};

/// All that is guarded in this process, and the handler that was there before.
pub(crate) static WATCH: ForkMutex<Watch> =
    ForkMutex::new(Rank::Guards, Mutex::new(Watch { senders: Vec::new(), next: 0, previous: None }), |_| {});

pub(crate) struct Watch {
    senders: Vec<Guarded>,
    next: u64,
    /// What was done at SIGSEGV before the first guard, while there is any.
    previous: Option<SigAction>,
}

/// What the handler knows of a sender.
struct Guarded {
    number: u64,
    channel: Box<str>,
    /// From one slot to the next, in bytes.
    stride: usize,
    segments: Vec<(Range<usize>, u32)>,
    messages: Arc<Messages>,
    links: Vec<Arc<GuardedLink>>,
}

/// For each slot, the mark of the message that was sent in it, until it is used again.
type Messages = WrappingTable<AtomicU64>;

/// What the handler knows of a link: mapped once more, for as long as it may look.
#[derive(Debug)]
struct GuardedLink {
    board: BoardReader<BoardView>,
    /// For each slot, the mark of the message that was lent over this link last.
    lent: Messages,
}

/// A sender with guarded messages.
#[derive(Debug)]
pub(crate) struct Guard {
    number: u64,
    slots: usize,
    messages: Arc<Messages>,
}

/// A link of such a sender.
#[derive(Debug)]
pub(crate) struct LinkGuard {
    sender: u64,
    link: Arc<GuardedLink>,
}

impl Guard {
    /// Guards what a sender will send, in such slots, which fill whole pages.
    ///
    /// # Errors
    /// What sigaction(2) says, or that there is no memory.
    pub(crate) fn new(channel: &str, geometry: Geometry) -> io::Result<Self> {
        let slots = geometry.max_slots() as usize;
        let messages = Arc::new(marks(slots)?);
        let mut watch = WATCH.lock();
        if watch.senders.is_empty() && watch.previous.is_none() {
            let ours = SigAction::new(SigHandler::SigAction(on_fault), SaFlags::SA_ONSTACK, SigSet::empty());
            // SAFETY: `on_fault` does only what may be done at any instruction: see there.
            watch.previous = Some(unsafe { sigaction(Signal::SIGSEGV, &ours) }?);
        }
        let number = watch.next;
        watch.next += 1;
        watch.senders.push(Guarded {
            number,
            channel: channel.into(),
            stride: geometry.stride() as usize,
            segments: Vec::new(),
            messages: messages.clone(),
            links: Vec::new(),
        });
        Ok(Self { number, slots, messages })
    }

    /// Guards a segment from now on, which begins with the slot `first`.
    pub(crate) fn add_segment(&self, map: &Map, first: u32) {
        with(self.number, |sender| sender.segments.push((map.addresses(), first)));
    }

    /// Guards the messages of a link from now on.
    ///
    /// # Errors
    /// There is no memory.
    pub(crate) fn add_link(&self, board: BoardReader<BoardView>) -> io::Result<LinkGuard> {
        let link = Arc::new(GuardedLink { board, lent: marks(self.slots)? });
        with(self.number, |sender| sender.links.push(link.clone()));
        Ok(LinkGuard { sender: self.number, link })
    }

    /// Notes what was sent in a slot.
    pub(crate) fn sent(&self, slot: SlotId, message: Mark) {
        self.messages.at(slot.index()).store(message.word(), Ordering::Relaxed);
    }
}

impl LinkGuard {
    /// Notes what was lent over the link.
    pub(crate) fn lent(&self, slot: SlotId, message: Mark) {
        self.link.lent.at(slot.index()).store(message.word(), Ordering::Relaxed);
    }
}

impl Drop for LinkGuard {
    fn drop(&mut self) {
        with(self.sender, |sender| sender.links.retain(|link| !Arc::ptr_eq(link, &self.link)));
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut watch = WATCH.lock();
        watch.senders.retain(|sender| sender.number != self.number);
        if watch.senders.is_empty()
            && let Some(previous) = watch.previous
        {
            // Asked first, so that there is no moment in which a handler is missing that came after ours, and may go on
            // to ours: then all stays as it is.
            if current().is_ok_and(is_ours) {
                // SAFETY: it was there before.
                let _ = unsafe { sigaction(Signal::SIGSEGV, &previous) };
                watch.previous = None;
            }
        }
    }
}

/// What is done at SIGSEGV: the address of a handler, or what stands for none.
fn current() -> io::Result<libc::sighandler_t> {
    // SAFETY: all-zero is a valid one, which holds nothing but numbers.
    let mut found: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: it is asked, and not changed (sigaction(2)); `found` lives here.
    let result = unsafe { libc::sigaction(libc::SIGSEGV, std::ptr::null(), &raw mut found) };
    if result == 0 { Ok(found.sa_sigaction) } else { Err(io::Error::last_os_error()) }
}

fn is_ours(handler: libc::sighandler_t) -> bool {
    handler == on_fault as extern "C" fn(_, _, _) as usize
}

fn marks(slots: usize) -> io::Result<Messages> {
    const { assert!(Mark::NONE.word() == 0) };
    WrappingTable::of_zeroes(slots).map_err(io::Error::other)
}

fn with(number: u64, change: impl FnOnce(&mut Guarded)) {
    if let Some(sender) = WATCH.lock().senders.iter_mut().find(|sender| sender.number == number) {
        change(sender);
    }
}

/// Takes the lock from a handler: tries for a moment, without a system call.
fn lock_at_once() -> Option<MutexGuard<'static, Watch>> {
    (0..100_000).find_map(|_| {
        std::hint::spin_loop();
        WATCH.try_lock()
    })
}

/// Says what was hit, and goes on to the handler that was there before.
///
/// It runs at any instruction of any thread, so it neither allocates nor waits: it reads what is watched
/// under a lock that it only tries, formats numbers on its stack, and writes once to standard error.
extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel says at SIGSEGV which address it was, and why.
    let (address, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    // Of a fault it is positive (sigaction(2)).
    let is_sent = code <= 0;
    let previous = {
        let watch = lock_at_once();
        /// SEGV_ACCERR of sigaction(2): there is memory, but it may not be written.
        const FORBIDDEN: libc::c_int = 2;
        if code == FORBIDDEN
            && let Some(hit) =
                watch.as_ref().and_then(|watch| watch.senders.iter().find_map(|sender| sender.find(address)))
        {
            report(&hit);
        }
        watch.and_then(|watch| watch.previous)
    };
    match previous.map(|previous| previous.handler()) {
        Some(SigHandler::Handler(handler)) => handler(signal),
        Some(SigHandler::SigAction(handler)) => handler(signal, info, context),
        // As before; a fault cannot be ignored.
        Some(SigHandler::SigIgn) if is_sent => {}
        Some(SigHandler::SigDfl | SigHandler::SigIgn) | None => {
            let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
            // The instruction runs again, and the process dies of it as it would have.
            // SAFETY: the default needs no care.
            let _ = unsafe { sigaction(Signal::SIGSEGV, &default) };
            if is_sent {
                // No instruction does. The signal is blocked until this has returned.
                let _ = raise(Signal::SIGSEGV);
            }
        }
    }
}

/// What a write has hit.
struct Hit<'a> {
    address: usize,
    channel: &'a str,
    slot: u32,
    offset: usize,
    message: u64,
    holders: usize,
}

impl Guarded {
    /// The message that lies at an address, if one does.
    fn find(&self, address: usize) -> Option<Hit<'_>> {
        let (addresses, first) = self.segments.iter().find(|(addresses, _)| addresses.contains(&address))?;
        let (index, offset) = ((address - addresses.start) / self.stride, (address - addresses.start) % self.stride);
        let slot = SlotId::new(first + index as u32);
        let mark = Mark::from_word(self.messages.at(slot.index()).load(Ordering::Relaxed));
        let holders = self.links.iter().filter(|link| link.holds(slot, mark)).count();
        let (channel, slot, message) = (&*self.channel, slot.number(), mark.sequence());
        (mark != Mark::NONE).then_some(Hit { address, channel, slot, offset, message, holders })
    }
}

impl GuardedLink {
    fn holds(&self, slot: SlotId, mark: Mark) -> bool {
        let lent = self.lent.at(slot.index()).load(Ordering::Relaxed) == mark.word();
        let read = self.board.left_at().is_none_or(|next| mark.is_before(next));
        lent && read && !self.board.is_back(slot, mark)
    }
}

impl fmt::Display for Hit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, channel, slot, offset, message, holders } = self;
        writeln!(f, "fbuf: a message was written to after it was sent")?;
        writeln!(f, "    channel:  {channel}")?;
        writeln!(f, "    message:  {message}, byte {offset}")?;
        writeln!(f, "    address:  {address:#x}, in slot {slot}")?;
        match holders {
            0 => writeln!(f, "    holders:  none any more; every receiver has handed it back")?,
            1 => writeln!(f, "    holders:  1 receiver still has it, or has yet to read it")?,
            _ => writeln!(f, "    holders:  {holders} receivers still have it, or have yet to read it")?,
        }
        writeln!(f, "    look for: a pointer into the fbuf that was kept when the fbuf was sent")
    }
}

fn report(hit: &Hit<'_>) {
    let mut text = Text { bytes: [0; 1024], length: 0 };
    // What does not fit is left out.
    let _ = write!(text, "{hit}");
    let _ = nix::unistd::write(stderr(), &text.bytes[..text.length]);
}

/// Text on the stack.
struct Text {
    bytes: [u8; 1024],
    length: usize,
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.length..];
        let count = text.len().min(room.len());
        room[..count].copy_from_slice(&text.as_bytes()[..count]);
        self.length += count;
        if count == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}
