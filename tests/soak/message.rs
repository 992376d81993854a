//! What is sent, so that a receiver can tell whether it is whole and in order.

use std::{collections::BTreeMap, time::Duration};

use fbuf_client::{AllocateError, Peer, Received, Sender, WriteError};

use crate::support::Random;

/// The shortest message: the key of its sender and its number.
pub const HEAD: usize = 16;
/// The bit of a number that says that this message is its sender's last.
const LAST: u64 = 1 << 63;

/// A word that follows from the key of a sender, the number of a message and the place in it.
fn word(key: u64, number: u64, index: usize) -> u64 {
    (key ^ number.rotate_left(32)).wrapping_add(index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// What a sender writes, message by message.
#[derive(Debug)]
pub struct Writing {
    key: u64,
    number: u64,
}

/// A message that was not written.
#[derive(Debug, PartialEq, Eq)]
pub enum Missing {
    Slot,
    Receiver,
}

impl Writing {
    pub fn new(key: u64) -> Self {
        Self { key, number: 0 }
    }

    /// Writes the next message, of some length.
    pub fn write(&mut self, sender: &mut Sender, random: &mut Random, patience: Duration) -> Result<(), Missing> {
        let most = sender.slot_size() - HEAD;
        let body = if random.below(2) == 0 { most.min(100) } else { most };
        self.send(sender, HEAD + random.below(body as u64 + 1) as usize, 0, patience)
    }

    /// Says that nothing more will come.
    pub fn end(&mut self, sender: &mut Sender, patience: Duration) -> Result<(), Missing> {
        self.send(sender, HEAD, LAST, patience)
    }

    fn send(&mut self, sender: &mut Sender, length: usize, mark: u64, patience: Duration) -> Result<(), Missing> {
        let mut fbuf = match sender.allocate_timeout(patience) {
            Ok(fbuf) => fbuf,
            Err(AllocateError::TimedOut { .. }) => return Err(Missing::Slot),
            Err(error) => panic!("{error}"),
        };
        fbuf.set_len(length).unwrap();
        let (head, body) = fbuf.split_at_mut(HEAD);
        head[..8].copy_from_slice(&self.key.to_ne_bytes());
        head[8..].copy_from_slice(&(self.number | mark).to_ne_bytes());
        for (index, chunk) in body.chunks_mut(8).enumerate() {
            chunk.copy_from_slice(&word(self.key, self.number, index).to_ne_bytes()[..chunk.len()]);
        }
        match sender.write(fbuf) {
            Ok(sent) => assert_eq!(sent.sequence, self.number),
            // With the receiver that it was for, the slot may have gone as well, if that one had made it.
            Err(WriteError::NoReceiver { .. } | WriteError::Lost) => return Err(Missing::Receiver),
            Err(error) => panic!("{error}"),
        }
        self.number += 1;
        Ok(())
    }
}

/// Fails if a message is not as it was written: its key and its number.
pub fn check(message: &Received) -> (u64, u64) {
    let number = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().unwrap());
    let (key, marked) = (number(0), number(8));
    assert_eq!(marked & !LAST, message.sequence(), "message of {:?}", message.sender());
    for (index, chunk) in message[HEAD..].chunks(8).enumerate() {
        let expected = word(key, message.sequence(), index).to_ne_bytes();
        assert_eq!(chunk, &expected[..chunk.len()], "message {} of {:?}", message.sequence(), message.sender());
    }
    (key, marked)
}

/// What was heard of each sender that is heard.
#[derive(Debug, Default)]
pub struct Heard {
    /// The key and the next number of each that has not ended.
    streams: BTreeMap<u64, (u64, u64)>,
    /// Whether senders may leave messages out.
    skips: bool,
    pub messages: u64,
    pub bytes: u64,
}

impl Heard {
    pub fn new(skips: bool) -> Self {
        Self { skips, ..Self::default() }
    }

    /// Fails if a message is not whole, or not the next one of its sender.
    pub fn hear(&mut self, message: &Received) {
        let (key, marked) = check(message);
        let (number, sender) = (marked & !LAST, message.sender().endpoint);
        if let Some(&(before, next)) = self.streams.get(&sender) {
            let in_order = if self.skips { number >= next } else { number == next };
            assert!(in_order && key == before, "message {number} of {sender} came where {next} was due");
        }
        self.streams.insert(sender, (key, number + 1));
        if marked & LAST != 0 {
            self.streams.remove(&sender);
        }
        self.messages += 1;
        self.bytes += message.len() as u64;
    }

    /// A sender has died, and may have meant to send more.
    pub fn forget(&mut self, sender: Peer) {
        self.streams.remove(&sender.endpoint);
    }

    /// How many senders have begun and not ended.
    pub fn unfinished(&self) -> usize {
        self.streams.len()
    }
}
