//! What is sent: a file, or data that is generated at memory speed.

use std::{
    fs::File,
    io::{self, Read, Seek},
    path::Path,
};

/// A stream of bytes that can be had several times.
#[derive(Debug)]
pub(super) enum Source {
    File { file: File, length: u64 },
    Generated { block: Vec<u8>, length: u64, position: u64 },
}

const BLOCK: usize = 1 << 20;

impl Source {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("it is no regular file, and the demo reads it several times"));
        }
        Ok(Self::File { file, length: found.len() })
    }

    /// `length` bytes that are the same each time, and different in each block.
    pub(super) fn generated(length: u64) -> Self {
        let words = (0..BLOCK as u64 / 8).map(mix).flat_map(u64::to_ne_bytes);
        Self::Generated { block: words.collect(), length, position: 0 }
    }

    pub(super) fn length(&self) -> u64 {
        match self {
            Self::File { length, .. } | Self::Generated { length, .. } => *length,
        }
    }

    pub(super) fn rewind(&mut self) -> io::Result<()> {
        match self {
            Self::File { file, .. } => file.rewind(),
            Self::Generated { position, .. } => {
                *position = 0;
                Ok(())
            }
        }
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File { file, .. } => file.read(buffer),
            Self::Generated { block, length, position } => {
                let mut filled = 0;
                while filled < buffer.len() && *position < *length {
                    let start = (*position % BLOCK as u64) as usize;
                    let left = usize::try_from(*length - *position).unwrap_or(usize::MAX);
                    let count = (buffer.len() - filled).min(BLOCK - start).min(left);
                    let key = (mix(*position / BLOCK as u64) & 0xff) as u8;
                    let (to, from) = (&mut buffer[filled..filled + count], &block[start..start + count]);
                    for (to, from) in to.iter_mut().zip(from) {
                        *to = from ^ key;
                    }
                    filled += count;
                    *position += count as u64;
                }
                Ok(filled)
            }
        }
    }
}

/// The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_data_does_not_depend_on_how_it_is_read() {
        let length = 3 * BLOCK as u64 + 17;
        let (mut at_once, mut in_pieces) = (Vec::new(), Vec::new());
        Source::generated(length).read_to_end(&mut at_once).unwrap();
        let mut source = Source::generated(length);
        let mut piece = [0; 1000];
        loop {
            let count = source.read(&mut piece).unwrap();
            if count == 0 {
                break;
            }
            in_pieces.extend_from_slice(&piece[..count]);
        }
        assert_eq!(at_once.len() as u64, length);
        assert!(at_once == in_pieces);
        assert!(at_once[..BLOCK] != at_once[BLOCK..2 * BLOCK], "two blocks are the same");
    }
}
