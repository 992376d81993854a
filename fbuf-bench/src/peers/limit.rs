//! The best that this machine can do: two bare rings of slot numbers in memory that both processes
//! write, one there and one back, and the slots beside them. No checks, no sleep, no growth, no second
//! receiver, nobody who dies.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::sync::atomic::Ordering;

use super::{End, Handle, Patience, Receiving, Sending, Way, memory::Memory};
use crate::{Result, terms::Terms};

pub(crate) struct Limit;

impl Way for Limit {
    type Sender = LimitSender;
    type Receiver = LimitReceiver;
}

/// How many slots it has if it is not told: enough for one message that goes to and fro.
const DEFAULT_SLOTS: u32 = 16;

struct Layout {
    slots: usize,
    size: usize,
}

impl Layout {
    fn new(terms: &Terms) -> Result<Self> {
        let slots = terms.slots.unwrap_or(DEFAULT_SLOTS) as usize;
        if !slots.is_power_of_two() {
            return Err(format!("{slots} slots were asked for: the bare ring wants a power of two").into());
        }
        Ok(Self { slots, size: terms.size })
    }

    fn stride(&self) -> usize {
        self.size.next_multiple_of(64)
    }

    fn map(&self, file: &std::os::fd::OwnedFd) -> Result<Memory> {
        Memory::map(file, 2 * self.slots, self.slots * self.stride())
    }

    fn make(terms: &Terms) -> Result<(Self, Memory, Handle)> {
        let layout = Self::new(terms)?;
        let file = Memory::file(2 * layout.slots, layout.slots * layout.stride())?;
        let memory = layout.map(&file)?;
        Ok((layout, memory, Handle::of([file])))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<(Self, Memory)> {
        let layout = Self::new(terms)?;
        let memory = layout.map(&handle.descriptor()?)?;
        Ok((layout, memory))
    }
}

/// A place in one of the rings. Its word is `slot << 32 | position + 1`.
struct Ring {
    first: usize,
    mask: u64,
    position: u64,
}

impl Ring {
    fn there(layout: &Layout) -> Self {
        Self { first: 0, mask: layout.slots as u64 - 1, position: 0 }
    }

    fn back(layout: &Layout) -> Self {
        Self { first: layout.slots, mask: layout.slots as u64 - 1, position: 0 }
    }

    #[inline]
    fn index(&self) -> usize {
        self.first + (self.position & self.mask) as usize
    }

    #[inline]
    fn push(&mut self, memory: &Memory, slot: u32) {
        let mark = self.position as u32 + 1;
        // Release: partner is the Acquire load in `pop`.
        memory.words()[self.index()].store(u64::from(slot) << 32 | u64::from(mark), Ordering::Release);
        self.position += 1;
    }

    #[inline]
    fn pop(&mut self, memory: &Memory) -> Option<u32> {
        // Acquire: partner is the Release store in `push`.
        let word = memory.words()[self.index()].load(Ordering::Acquire);
        (word as u32 == self.position as u32 + 1).then(|| {
            self.position += 1;
            (word >> 32) as u32
        })
    }
}

pub(crate) struct LimitSender {
    memory: Memory,
    layout: Layout,
    there: Ring,
    back: Ring,
    /// The pool: which slots are free, as a ring of its own, and what of that ring is filled.
    free: Box<[u32]>,
    taken: usize,
    put: usize,
}

impl LimitSender {
    fn new((layout, memory): (Layout, Memory)) -> Self {
        let (there, back) = (Ring::there(&layout), Ring::back(&layout));
        let free = (0..layout.slots as u32).collect();
        Self { memory, there, back, free, taken: 0, put: layout.slots, layout }
    }

    /// Takes a free slot. Those that came back are fetched only when there is no other, all at once:
    /// until then the cache lines in which they are reported stay with the receiver.
    #[inline]
    fn take(&mut self) -> Result<u32> {
        if self.taken == self.put {
            self.fetch()?;
        }
        let slot = self.free[self.taken & (self.free.len() - 1)];
        self.taken += 1;
        Ok(slot)
    }

    #[inline(never)]
    fn fetch(&mut self) -> Result<()> {
        let mut patience = Patience::default();
        while self.taken == self.put {
            while let Some(slot) = self.back.pop(&self.memory) {
                let mask = self.free.len() - 1;
                self.free[self.put & mask] = slot;
                self.put += 1;
            }
            patience.spin()?;
        }
        Ok(())
    }
}

impl End for LimitSender {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (layout, memory, handle) = Layout::make(terms)?;
        Ok((Self::new((layout, memory)), handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Ok(Self::new(Layout::join(terms, handle)?))
    }
}

impl Sending for LimitSender {
    #[inline(always)]
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        let slot = self.take()?;
        // SAFETY: never sent, or handed back.
        write(unsafe { self.memory.bytes_mut(slot as usize * self.layout.stride(), self.layout.size) });
        self.there.push(&self.memory, slot);
        Ok(())
    }
}

pub(crate) struct LimitReceiver {
    memory: Memory,
    layout: Layout,
    there: Ring,
    back: Ring,
}

impl LimitReceiver {
    fn new((layout, memory): (Layout, Memory)) -> Self {
        let (there, back) = (Ring::there(&layout), Ring::back(&layout));
        Self { memory, there, back, layout }
    }
}

impl End for LimitReceiver {
    fn offer(terms: &Terms) -> Result<(Self, Handle)> {
        let (layout, memory, handle) = Layout::make(terms)?;
        Ok((Self::new((layout, memory)), handle))
    }

    fn join(terms: &Terms, handle: Handle) -> Result<Self> {
        Ok(Self::new(Layout::join(terms, handle)?))
    }
}

impl Receiving for LimitReceiver {
    #[inline(always)]
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let mut patience = Patience::default();
        let slot = loop {
            match self.there.pop(&self.memory) {
                Some(slot) => break slot,
                None => patience.spin()?,
            }
        };
        // SAFETY: sent, and not handed back before the next line.
        let result = read(unsafe { self.memory.bytes(slot as usize * self.layout.stride(), self.layout.size) });
        self.back.push(&self.memory, slot);
        Ok(result)
    }
}
