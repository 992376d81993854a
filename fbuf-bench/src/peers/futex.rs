//! A futex: what the kernel needs to wake a process, and no message but its number.

use std::sync::atomic::Ordering;

use super::{
    End, Handle, Patience, Receiving, Sending, Way,
    memory::{Memory, futex_wait, futex_wake},
};
use crate::{Result, payload::NUMBER, terms::Terms};

/// Either end.
pub(crate) struct Futex {
    memory: Memory,
    /// How many messages went through this end.
    count: u32,
}

/// Where the number of the message stands, and how many messages there were.
const MESSAGE: usize = 0;
const COUNT: usize = 1;
const WORDS: usize = 2;

impl Way for Futex {
    type Sender = Self;
    type Receiver = Self;
}

impl End for Futex {
    fn offer(_: &Terms) -> Result<(Self, Handle)> {
        let file = Memory::file(WORDS, 0)?;
        Ok((Self { memory: Memory::map(&file, WORDS, 0)?, count: 0 }, Handle::of([file])))
    }

    fn join(_: &Terms, handle: Handle) -> Result<Self> {
        Ok(Self { memory: Memory::map(&handle.descriptor()?, WORDS, 0)?, count: 0 })
    }
}

impl Sending for Futex {
    fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<()> {
        let mut number = [0; NUMBER];
        write(&mut number);
        let words = self.memory.words();
        words[MESSAGE].store(u64::from_ne_bytes(number), Ordering::Relaxed);
        self.count = self.count.wrapping_add(1);
        // Release: partner is the Acquire load in `receive`.
        words[COUNT].store(self.count.into(), Ordering::Release);
        futex_wake(&words[COUNT]);
        Ok(())
    }
}

impl Receiving for Futex {
    fn receive<T>(&mut self, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
        let words = self.memory.words();
        let mut patience = Patience::default();
        // Acquire: partner is the Release store in `send`.
        while words[COUNT].load(Ordering::Acquire) == u64::from(self.count) {
            futex_wait(&words[COUNT], self.count);
            patience.spin()?;
        }
        self.count = self.count.wrapping_add(1);
        Ok(read(&words[MESSAGE].load(Ordering::Relaxed).to_ne_bytes()))
    }
}
