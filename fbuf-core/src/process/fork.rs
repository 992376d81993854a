//! What a child that was forked has of its parent: nothing that it could change.
//!
//! fork(2) copies the private memory of a process, and shares the rest: mappings and open files. A child with these could
//! return slots that its parent reads, end streams, read messages that are meant for its parent, and keep sockets open
//! that are to hang up when the parent dies. So in a child
//!
//! * all memory of links is private and reads as zeroes: an empty lane, an empty slot. What was received can be read
//!   further, for as long as the parent holds it;
//! * all sockets of links and of the connection to the broker are replaced by one that is connected to nothing;
//! * each object knows the [`Generation`] of the process that made it, and what is called returns [`Forked`].
//!
//! This is done by handlers of pthread_atfork(3). Until they have run in the child, which is a matter of microseconds, it can
//! write what its parent writes, so that a lease or a seal is refused and the message copied. A child of clone(2) or
//! _Fork(3), which run no handlers, does not have the memory of links at all (MADV_DONTFORK), and learns its generation
//! from memory that the kernel wipes (MADV_WIPEONFORK).
//!
//! The exception is a child of clone(2) that one thread makes while another is in fork(2): advice is the process's, and
//! for the time of the fork it is that children get the memory. To give it to none, and have the handler map the zeroes
//! into the hole that the child has, would leave that hole to the first handler before ours, in the child, that maps
//! anything: the kernel puts it just there, and a child that has already run other code can neither take the place nor do
//! without it.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

mod descriptor;

use std::{
    cell::UnsafeCell,
    io,
    ops::Range,
    os::fd::RawFd,
    ptr::{self, NonNull},
    sync::{
        Arc, Mutex, MutexGuard, Once, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering},
    },
};

pub use self::descriptor::Withheld;
use crate::process::sys::in_call;

/// This process was forked from the one that opened what it uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this process was forked from the one that connected, and cannot use its connection: connect again")]
pub struct Forked;

/// Which of a process and the children that were forked one from the other. Each object keeps that of its maker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Generation(u64);

/// The last generation that a process or its ancestors have had.
static LAST: AtomicU64 = AtomicU64::new(0);
/// That of this process, or 0, in memory that the kernel wipes in a child.
static WIPED: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());
/// The same, where there is no such memory.
static PLAIN: AtomicU64 = AtomicU64::new(0);

impl Generation {
    /// That of this process.
    pub fn current() -> Self {
        let word = current_word();
        // Relaxed, as all that follows: only the thread that forked lives on in a child, and threads that it starts come
        // after.
        match word.load(Ordering::Relaxed) {
            0 => {
                let next = LAST.fetch_add(1, Ordering::Relaxed) + 1;
                let other = word.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed);
                Self(other.err().unwrap_or(next))
            }
            current => Self(current),
        }
    }

    /// Whether it is that of this process.
    #[must_use]
    #[inline]
    pub fn is_current(self) -> bool {
        let known = WIPED.load(Ordering::Acquire);
        // SAFETY: it points at a page that is never unmapped and that only atomics are made of (`current_word`).
        let word = unsafe { known.as_ref() };
        // Relaxed: as in `current`.
        word.is_some_and(|word| word.load(Ordering::Relaxed) == self.0) || self == Self::current()
    }

    /// An error if it is not that of this process.
    ///
    /// # Errors
    /// [`Forked`]
    #[inline]
    pub fn check(self) -> Result<(), Forked> {
        if self.is_current() { Ok(()) } else { Err(Forked) }
    }
}

fn current_word() -> &'static AtomicU64 {
    if cfg!(miri) {
        // It knows no MADV_WIPEONFORK, and forks nothing.
        return &PLAIN;
    }
    let known = WIPED.load(Ordering::Acquire);
    if !known.is_null() {
        // SAFETY: it points at a page that is never unmapped and that only atomics are made of.
        return unsafe { &*known };
    }
    let Ok(page) = WipedPage::new() else { return &PLAIN };
    let word = page.0.cast::<AtomicU64>();
    // Partner: the load above, which needs the page to be there.
    match WIPED.compare_exchange(ptr::null_mut(), word.as_ptr(), Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            // For as long as this process lives.
            std::mem::forget(page);
            // SAFETY: the page is not unmapped from here on, and only atomics are made of it.
            unsafe { word.as_ref() }
        }
        // SAFETY: another thread was first; its page is never unmapped either, and only atomics are made of it.
        Err(other) => unsafe { &*other },
    }
}

/// A page of zeroes that the kernel wipes in a child.
#[derive(Debug)]
struct WipedPage(NonNull<u8>);

/// How much is mapped for one: a page, whatever the size of pages is.
const WIPED_BYTES: usize = 4096;

// SAFETY: it belongs to the process, and only atomics are read and written in it.
unsafe impl Send for WipedPage {}
// SAFETY: only atomics are read and written in it.
unsafe impl Sync for WipedPage {}

impl WipedPage {
    fn new() -> io::Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(ptr::null_mut(), WIPED_BYTES, protection, flags, -1, 0) };
        let base = NonNull::new(base).filter(|base| base.as_ptr() != libc::MAP_FAILED);
        let page = Self(base.ok_or_else(|| in_call("mmap")(io::Error::last_os_error()))?.cast());
        // SAFETY: exactly this mapping, of zeroes still.
        let wiped = unsafe { libc::madvise(page.0.as_ptr().cast(), WIPED_BYTES, libc::MADV_WIPEONFORK) };
        if wiped == 0 { Ok(page) } else { Err(in_call("madvise")(io::Error::last_os_error())) }
    }
}

impl Drop for WipedPage {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; the last owner lets go of it.
        unsafe { libc::munmap(self.0.as_ptr().cast(), WIPED_BYTES) };
    }
}

/// A flag that is raised in each child, whatever it is in the parent: what is looked at anyway tells of a fork as well.
#[derive(Debug, Clone)]
pub struct Notice {
    /// False if it is raised, as in memory that was wiped.
    calm: NonNull<AtomicBool>,
    _page: Arc<WipedPage>,
}

// SAFETY: the word is an atomic and lives as long as the page, which goes with it.
unsafe impl Send for Notice {}
// SAFETY: the word is an atomic, which any thread may use.
unsafe impl Sync for Notice {}

impl Notice {
    /// One that is not raised.
    ///
    /// # Errors
    /// What mmap(2) and madvise(2) say.
    pub fn new() -> io::Result<Self> {
        let page = Arc::new(WipedPage::new()?);
        let notice = Self { calm: page.0.cast(), _page: page };
        notice.set(false);
        Ok(notice)
    }

    /// Whether it is raised.
    #[inline]
    #[must_use]
    pub fn is_raised(&self) -> bool {
        // Relaxed: what it tells of is behind a lock.
        // SAFETY: the page lives as long as this, and holds nothing but this atomic.
        !unsafe { self.calm.as_ref() }.load(Ordering::Relaxed)
    }

    /// Raises it, or not.
    pub fn set(&self, raised: bool) {
        // SAFETY: the page lives as long as this, and holds nothing but this atomic.
        unsafe { self.calm.as_ref() }.store(!raised, Ordering::Relaxed);
    }
}

/// What children do not get.
pub(crate) struct Withholding {
    /// Mappings, by their places here; empty places are free.
    mappings: Vec<Range<usize>>,
    free: Vec<usize>,
    /// Descriptors, a bit for each.
    descriptors: Vec<u64>,
}

static WITHHELD: Mutex<Withholding> =
    Mutex::new(Withholding { mappings: Vec::new(), free: Vec::new(), descriptors: Vec::new() });

pub(crate) fn withheld() -> MutexGuard<'static, Withholding> {
    // Before the lock, which the handlers take.
    install_handlers();
    // Nothing panics while it is locked.
    WITHHELD.lock().unwrap_or_else(PoisonError::into_inner)
}

fn install_handlers() {
    static HANDLERS: Once = Once::new();
    HANDLERS.call_once(|| {
        if cfg!(miri) {
            // It knows no pthread_atfork(3), and forks nothing.
            return;
        }
        // Without memory for them, a child still learns from wiped memory that it is one.
        // SAFETY: each does only what may be done in a child of a process with threads: see there.
        unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    });
}

/// The locks that are not part of an object, in the order in which threads take them. They are held while the process forks,
/// so that in the child none is locked by a thread that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rank {
    /// How this process fences.
    Fences,
    /// The thread that serves broken leases.
    Leases,
    /// What guards watch.
    Guards,
    /// Links that ended while some of their messages were held.
    Retired,
    /// Which sender's some memory is.
    Claims,
    /// What peers of other users take up.
    Shares,
    /// What peers of other users have not received.
    UnderWay,
    /// Sockets that other threads make the calls of.
    Relays,
    /// Users for which calls take long, since very many threads wait at their sockets.
    Waiters,
    /// What other threads are to drop.
    DeferredDrop,
}

const RANKS: usize = Rank::DeferredDrop as usize + 1;

/// What such a lock is taken by.
pub(crate) trait Lock: Sync {
    /// Holds it.
    type Guard: 'static;
    /// Takes it.
    fn lock(&'static self) -> Self::Guard;
}

impl<T: Send + 'static> Lock for Mutex<T> {
    type Guard = MutexGuard<'static, T>;
    fn lock(&'static self) -> Self::Guard {
        // A panic under one of these locks has left nothing half changed.
        self.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Guard: 'static> Lock for fn() -> Guard {
    type Guard = Guard;
    fn lock(&'static self) -> Guard {
        self()
    }
}

/// One such lock, and what is done about it when the process forks.
pub(crate) struct HeldLock<L: Lock> {
    rank: Rank,
    lock: L,
    /// In the child. It neither allocates nor waits.
    in_child: fn(&mut L::Guard),
    is_registered: AtomicBool,
    held: UnsafeCell<Option<L::Guard>>,
}

/// A value behind such a lock.
pub(crate) type ForkMutex<T> = HeldLock<Mutex<T>>;

/// The same for a lock that a function takes. Its module [registers](HeldLock::register) it whenever it takes the lock.
pub(crate) type AtFork<Guard> = HeldLock<fn() -> Guard>;

// SAFETY: `held` is used by the thread that forks, which has locked the place of its rank.
unsafe impl<L: Lock> Sync for HeldLock<L> {}

impl<L: Lock> HeldLock<L> {
    /// Is taken before a fork and let go of afterwards, in the child after `in_child`.
    pub(crate) const fn new(rank: Rank, lock: L, in_child: fn(&mut L::Guard)) -> Self {
        Self { rank, lock, in_child, is_registered: AtomicBool::new(false), held: UnsafeCell::new(None) }
    }

    /// Takes it. A thread that has locks of higher rank does not call this.
    pub(crate) fn lock(&'static self) -> L::Guard {
        self.register();
        self.lock.lock()
    }

    /// Before the lock is taken. A thread that has locks of higher rank does not call this.
    pub(crate) fn register(&'static self) {
        // Partner: the store below, before which the place knows it.
        if self.is_registered.load(Ordering::Acquire) {
            return;
        }
        install_handlers();
        // Waits while the process forks. In the child, where this thread is not, it is done once more.
        *place(self.rank as usize) = Some(self);
        self.is_registered.store(true, Ordering::Release);
    }
}

impl<T: Send + 'static> ForkMutex<T> {
    /// Takes it if it is free, without a system call.
    pub(crate) fn try_lock(&'static self) -> Option<MutexGuard<'static, T>> {
        match self.lock.try_lock() {
            Ok(value) => Some(value),
            Err(TryLockError::Poisoned(value)) => Some(value.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

trait HeldAcrossFork: Sync {
    fn hold(&'static self);
    fn release(&self);
    fn release_in_child(&self);
}

impl<L: Lock> HeldAcrossFork for HeldLock<L> {
    fn hold(&'static self) {
        let guard = self.lock.lock();
        // SAFETY: this is the thread that forks, and has locked the place.
        unsafe { *self.held.get() = Some(guard) };
    }

    fn release(&self) {
        // SAFETY: this is the thread that forks, and has locked the place.
        drop(unsafe { (*self.held.get()).take() });
    }

    fn release_in_child(&self) {
        // SAFETY: this is the thread that has forked, and has locked the place.
        if let Some(mut guard) = unsafe { (*self.held.get()).take() } {
            (self.in_child)(&mut guard);
        }
    }
}

type Place = Option<&'static dyn HeldAcrossFork>;

/// What is registered, by rank. Locked while the process forks, so that nothing is registered then.
static PLACES: [Mutex<Place>; RANKS] = [const { Mutex::new(None) }; RANKS];

fn place(rank: usize) -> MutexGuard<'static, Place> {
    // Nothing panics while it is locked.
    PLACES[rank].lock().unwrap_or_else(PoisonError::into_inner)
}

/// A shared mapping of which children get private memory at the same place. Dropped before it is unmapped.
#[derive(Debug)]
pub(crate) struct WithheldMemory {
    place: usize,
    generation: Generation,
}

impl WithheldMemory {
    /// Takes the addresses of a mapping that is not unmapped before this is dropped.
    pub(crate) fn new(addresses: Range<usize>) -> Self {
        let mut withheld = withheld();
        advise(&addresses, libc::MADV_DONTFORK);
        let place = match withheld.free.pop() {
            Some(place) => {
                withheld.mappings[place] = addresses;
                place
            }
            None => {
                withheld.mappings.push(addresses);
                withheld.mappings.len() - 1
            }
        };
        Self { place, generation: Generation::current() }
    }

    /// Whether the mapping is that which was made, and may be unmapped: a child of clone(2) does not have it.
    pub(crate) fn is_here(&self) -> bool {
        self.generation.is_current()
    }
}

impl Drop for WithheldMemory {
    fn drop(&mut self) {
        if self.is_here() {
            let mut withheld = withheld();
            withheld.mappings[self.place] = 0..0;
            withheld.free.push(self.place);
        }
    }
}

fn advise(addresses: &Range<usize>, advice: libc::c_int) {
    if cfg!(miri) {
        // It knows no madvise(2), and forks nothing.
        return;
    }
    // SAFETY: it changes what children get, and nothing here.
    unsafe { libc::madvise(addresses.start as *mut libc::c_void, addresses.len(), advice) };
}

/// What the thread that forks has locked.
struct Locks {
    withheld: MutexGuard<'static, Withholding>,
    places: [MutexGuard<'static, Place>; RANKS],
}

struct Held(UnsafeCell<Option<Locks>>);

// SAFETY: it is read and written only by a thread that has all the locks.
unsafe impl Sync for Held {}

static HELD: Held = Held(UnsafeCell::new(None));

/// Before a fork: in the thread that forks.
extern "C" fn before() {
    let places = std::array::from_fn(|rank| {
        let place = place(rank);
        if let Some(lock) = *place {
            lock.hold();
        }
        place
    });
    let locks = Locks { withheld: withheld(), places };
    // The handler in the child needs something to put its own memory over: other handlers could have taken the place.
    locks.withheld.mappings.iter().for_each(|mapping| advise(mapping, libc::MADV_DOFORK));
    // SAFETY: this thread has all the locks.
    unsafe { *HELD.0.get() = Some(locks) };
}

extern "C" fn in_parent() {
    // SAFETY: `before` has left the locks here, for this thread.
    if let Some(locks) = unsafe { (*HELD.0.get()).take() } {
        locks.withheld.mappings.iter().for_each(|mapping| advise(mapping, libc::MADV_DONTFORK));
        locks.places.iter().filter_map(|place| **place).for_each(HeldAcrossFork::release);
    }
}

/// In the child. It neither allocates nor waits: other threads may have been doing anything.
extern "C" fn in_child() {
    current_word_of_child().store(0, Ordering::Relaxed);
    // SAFETY: `before` has left the locks here, for this thread.
    let Some(mut locks) = (unsafe { (*HELD.0.get()).take() }) else { return };
    locks.places.iter().filter_map(|place| **place).for_each(HeldAcrossFork::release_in_child);
    let withheld = &mut *locks.withheld;
    withheld.mappings.iter().filter(|mapping| !mapping.is_empty()).for_each(make_private);
    withheld.mappings.clear();
    withheld.free.clear();
    replace(&mut withheld.descriptors);
}

/// Where the generation stands, if it does stand anywhere.
fn current_word_of_child() -> &'static AtomicU64 {
    let known = WIPED.load(Ordering::Relaxed);
    // SAFETY: it points at a page that is never unmapped and that only atomics are made of.
    if known.is_null() { &PLAIN } else { unsafe { &*known } }
}

/// Puts memory of zeroes, of this process alone, over a mapping. It takes none before it is written.
fn make_private(mapping: &Range<usize>) {
    let (place, size) = (mapping.start as *mut libc::c_void, mapping.len());
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range is exactly one mapping of this library, which it inherited from its parent (`before`).
    if unsafe { libc::mmap(place, size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) } == libc::MAP_FAILED {
        // The kernel promises no memory (vm.overcommit_memory=2): then at least nothing is written.
        // SAFETY: the range is exactly one mapping of this library, and no byte of it is changed.
        unsafe { libc::mprotect(place, size, libc::PROT_READ) };
    }
}

/// Replaces descriptors by one of a socket that is connected to nothing. They stay open, as their owners believe.
fn replace(descriptors: &mut [u64]) {
    let numbers = |words: &[u64]| -> Option<RawFd> {
        let (word, bits) = words.iter().enumerate().find(|(_, bits)| **bits != 0)?;
        Some((word * 64) as RawFd + bits.trailing_zeros() as RawFd)
    };
    let Some(first) = numbers(descriptors) else { return };
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket(2) touches no memory of this process.
    let mut dead = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if dead < 0 {
        // SAFETY: its owner finds the next one at the same number, the lowest and only one that is free.
        dead = unsafe {
            libc::close(first);
            libc::socket(libc::AF_UNIX, kind, 0)
        };
    }
    while let Some(number) = numbers(descriptors) {
        descriptors[number as usize / 64] &= !(1 << (number % 64));
        if number == dead {
            continue;
        }
        // SAFETY: `number` is a descriptor of this library, which stays open.
        let replaced = unsafe { libc::dup3(dead, number, libc::O_CLOEXEC) } >= 0;
        if !replaced && is_beyond_limit(number) {
            // SAFETY: it is a descriptor of this library. Below such a limit nothing else gets its number, so that its
            // owner, which closes it once more, closes nothing.
            unsafe { libc::close(number) };
        }
    }
    if dead != first {
        // SAFETY: it was made above, and nothing else knows it.
        unsafe { libc::close(dead) };
    }
}

/// Whether no descriptor can be made with this number: the limit was lowered (RLIMIT_NOFILE) after this one was.
fn is_beyond_limit(number: RawFd) -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` lives here.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0;
    known && number as libc::rlim_t >= limit.rlim_cur
}
