//! What a message carries: its number, and as many bytes made of that number as the mode asks for.

use crate::{Result, terms::Mode};

/// Bytes in which the number of a message stands, at its beginning.
pub(crate) const NUMBER: usize = 8;

/// The bit of a number that says that this message is the last.
pub(crate) const LAST: u64 = 1 << 63;
/// The bit of a number that says that from this message on everything is measured.
pub(crate) const MEASURED: u64 = 1 << 62;
/// Bytes of a page, of which [`Mode::Paged`] writes and reads the first word.
pub(crate) const PAGE: usize = 4096;
const MARKS: u64 = LAST | MEASURED;
/// Words that are written or read in one turn of a loop: so many that it does not matter how the loop lies in lines of
/// the code cache. With four, the same loop took 1.6 times as long in one program as in another.
const TURN: usize = 16;

/// Writes message `number`.
#[inline]
pub(crate) fn write(bytes: &mut [u8], number: u64, mode: Mode) {
    if let Some(first) = bytes.first_chunk_mut() {
        *first = number.to_ne_bytes();
    }
    let word = number.to_ne_bytes();
    match mode {
        Mode::Untouched => {}
        Mode::Paged => bytes.chunks_mut(PAGE).filter_map(|page| page.first_chunk_mut()).for_each(|first| *first = word),
        Mode::Written | Mode::Touched => {
            let (turns, rest) = bytes.as_chunks_mut::<NUMBER>().0.as_chunks_mut::<TURN>();
            turns.fill([word; TURN]);
            rest.fill(word);
        }
    }
}

/// Reads the number of a message; reads all of it, and checks it, if the mode asks for that.
#[inline]
pub(crate) fn read(bytes: &[u8], mode: Mode) -> Read {
    let Some(&first) = bytes.first_chunk() else { return Read { number: 0, whole: false } };
    let number = u64::from_ne_bytes(first);
    let differs = |all: u64, word: &[u8; NUMBER]| all | (u64::from_ne_bytes(*word) ^ number);
    let whole = match mode {
        Mode::Untouched | Mode::Written => true,
        Mode::Paged => bytes.chunks(PAGE).filter_map(|page| page.first_chunk()).fold(0, differs) == 0,
        Mode::Touched => {
            let (turns, rest) = bytes.as_chunks().0.as_chunks::<TURN>();
            let in_turns = turns.iter().fold(0, |all, turn| turn.iter().fold(all, differs));
            rest.iter().fold(in_turns, differs) == 0
        }
    };
    Read { number, whole }
}

/// What was read of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Read {
    number: u64,
    /// Whether all that was read is what was written.
    whole: bool,
}

impl Read {
    /// The number, with its marks.
    pub(crate) fn number(self) -> u64 {
        self.number
    }
}

/// Checks that messages come in order, none is missing, and all are whole.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    next: u64,
}

impl Checker {
    /// The marks of the message.
    ///
    /// # Errors
    /// It is not the one that comes next, or not whole.
    #[inline]
    pub(crate) fn check(&mut self, read: Read) -> Result<u64> {
        if read.number & !MARKS != self.next || !read.whole {
            return Err(self.wrong(read));
        }
        self.next += 1;
        Ok(read.number & MARKS)
    }

    #[cold]
    fn wrong(&self, read: Read) -> crate::Error {
        let (found, next) = (read.number & !MARKS, self.next);
        match read.whole {
            false if found == next => format!("message {next} did not arrive as it was written").into(),
            _ => format!("message {found} came where message {next} was due").into(),
        }
    }

    /// How many came.
    pub(crate) fn count(&self) -> u64 {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_as_whole() {
        for mode in [Mode::Untouched, Mode::Paged, Mode::Written, Mode::Touched] {
            let (mut bytes, mut checker) = ([0; 72], Checker::default());
            for number in 0..3 {
                write(&mut bytes, number, mode);
                assert_eq!(checker.check(read(&bytes, mode)).unwrap(), 0);
            }
            write(&mut bytes, 3 | LAST, mode);
            assert_eq!(checker.check(read(&bytes, mode)).unwrap(), LAST);
            assert_eq!(checker.count(), 4);
        }
    }

    #[test]
    fn a_lost_message_and_a_changed_byte_are_found() {
        let (mut bytes, mut checker) = ([0; 72], Checker::default());
        write(&mut bytes, 1, Mode::Touched);
        assert!(checker.check(read(&bytes, Mode::Touched)).is_err());
        write(&mut bytes, 0, Mode::Touched);
        bytes[70] ^= 1;
        assert!(checker.check(read(&bytes, Mode::Touched)).is_err());
        assert!(checker.check(read(&[], Mode::Touched)).is_err());
    }
}
