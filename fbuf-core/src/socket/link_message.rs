//! What travels over a link socket: greetings with the descriptors of lanes, boards and segments,
//! the announcements of growth, and the bell.

use std::io;

use serde::{Deserialize, Serialize};

use crate::process::sys::{in_call, said};
use crate::{
    abort::Abort,
    process::foreign::Foreign,
    slot::LaneFormat,
    socket::{
        Arrival, PacketSocket, means_gone,
        under_way::Kind,
        wire::{self, Descriptor, Letter},
    },
    trust::Trusted,
    violation::{Unsuitable, Violation},
};

/// A message between the two ends of a link.
#[derive(Debug, Serialize, Deserialize)]
pub enum LinkMessage {
    /// Somebody published something while you were about to sleep.
    Bell,
    /// The receiver's first word.
    Hello(Hello),
    /// The sender's answer, and the beginning of messages.
    Welcome(Welcome),
    /// The sender has one more segment.
    Segment(NewSegment),
    /// The bytes of a message, sent before its entry in the lane.
    OneShot(OneShot),
    /// From the receiver that made the slots: the right to write a slot.
    WriteGrant(WriteGrant),
}

/// The right to write a slot of the receiver's pool.
#[derive(Debug, Serialize, Deserialize)]
pub struct WriteGrant {
    /// Which slot.
    pub slot: u32,
    /// The memory, open for writing.
    pub writer: Descriptor,
    /// The first time: the same, open for reading.
    pub reader: Option<Descriptor>,
}

/// A [`WriteGrant`] that arrived from a receiver that is trusted not to use the memory itself meanwhile.
#[derive(Debug)]
pub struct ReceivedGrant {
    pub(crate) giver: Trusted,
    pub(crate) grant: WriteGrant,
}

impl WriteGrant {
    /// Takes it from this receiver.
    pub(crate) fn take(self, giver: Trusted) -> ReceivedGrant {
        ReceivedGrant { giver, grant: self }
    }
}

/// A message that is memory of its own.
#[derive(Debug, Serialize, Deserialize)]
pub struct OneShot {
    /// The memory.
    pub memory: Descriptor,
    /// Which message.
    pub sequence: u64,
}

/// How a receiver joins.
#[derive(Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Its return board, with a word for each slot the sender may ever have.
    pub board: Descriptor,
    /// It would rather miss messages than hold more than so many.
    pub skip_above: Option<u32>,
    /// It cannot do without fences: neither its own, when it hands slots back, nor, as its board says, the
    /// sender's.
    pub fences: bool,
    /// It is to be given the slots, each of which is memory of its own.
    pub wants_slots: bool,
}

/// How a sender lets a receiver in.
#[derive(Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// Its forward lane.
    pub lane: Descriptor,
    /// What stands in the lane, which has room for all of it.
    pub format: LaneFormat,
    /// The number of the first message that will be sent over this link.
    pub first_sequence: u64,
    /// The segments it has so far.
    pub segments: Vec<NewSegment>,
    /// The slots, if the receiver wants them.
    pub slots: Vec<Descriptor>,
}

/// A segment of slots.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NewSegment {
    /// The memory.
    pub memory: Descriptor,
    /// How many slots lie in it.
    pub slots: u32,
}

impl LinkMessage {
    /// What it is, in words.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bell => "a bell",
            Self::Hello(_) => "a receiver's hello",
            Self::Welcome(_) => "a sender's welcome",
            Self::Segment(_) => "a new segment",
            Self::OneShot(_) => "a message of its own",
            Self::WriteGrant(_) => "the right to write a slot",
        }
    }
}

/// No link message is longer.
const LONGEST: usize = 1024;

/// No message behind the first has more descriptors: a slot, and the right to write it.
const MOST_LATER: usize = 2;

/// The encoding of [`LinkMessage::Bell`].
const BELL: [u8; 1] = [0];

/// Why a link ends from the outside.
#[derive(Debug)]
pub enum LinkEnd {
    /// The peer broke a rule.
    Violation(Violation),
    /// The peer is gone.
    HangUp,
    /// This process has no memory or no descriptor left for it.
    Exhausted(String),
    /// The sender has disconnected this receiver.
    Disconnected,
}

impl LinkEnd {
    /// What the peer is told, if it was this side that ended the link.
    pub(crate) fn as_abort(&self) -> Option<Abort> {
        match self {
            Self::Violation(_) => Some(Abort::Violation),
            Self::Exhausted(_) => Some(Abort::Exhausted),
            Self::HangUp | Self::Disconnected => None,
        }
    }
}

impl From<Violation> for LinkEnd {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}

impl From<Unsuitable> for LinkEnd {
    fn from(unsuitable: Unsuitable) -> Self {
        match unsuitable {
            // It was as it should be, or could not even be looked at.
            Unsuitable::Unmappable { reason } => Self::Exhausted(reason),
            other => Self::Violation(other.into()),
        }
    }
}

/// What could not be read from a link socket.
#[derive(Debug)]
pub(crate) enum ReadError {
    /// The next message waits there until this process has a descriptor left for it.
    NoDescriptor,
    /// Nothing comes any more.
    End(LinkEnd),
}

impl From<ReadError> for LinkEnd {
    fn from(unread: ReadError) -> Self {
        match unread {
            ReadError::NoDescriptor => {
                Self::Exhausted("no descriptor is left for a link (RLIMIT_NOFILE: raise it with ulimit -n)".into())
            }
            ReadError::End(end) => end,
        }
    }
}

/// Sends a message that has to arrive. Between honest peers there is always room: what one of them
/// may send is bounded, and each reads its socket whenever it has slept. Only a send buffer that the kernel
/// keeps [narrow](PacketSocket::narrow) may be full of that, which passes.
pub(crate) fn send(socket: &PacketSocket, message: &LinkMessage) -> Result<(), LinkEnd> {
    socket.send(&encode(message)?).map_err(|error| unsent(socket, &error))
}

/// Sends a greeting, or its answer: whether it could be sent now. It can be later if too many descriptors of this user are
/// under way.
pub(crate) fn greet(socket: &PacketSocket, message: &LinkMessage) -> Result<bool, LinkEnd> {
    match socket.send_as(&encode(message)?, Kind::Greeting) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => Ok(false),
        Err(error) => Err(unsent(socket, &error)),
    }
}

fn encode(message: &LinkMessage) -> Result<Letter, LinkEnd> {
    Ok(wire::encode(message).map_err(|error| Violation::Garbage { reason: error.to_string() })?)
}

/// What follows for the link.
fn unsent(socket: &PacketSocket, error: &io::Error) -> LinkEnd {
    match error.kind() {
        _ if means_gone(error) => LinkEnd::HangUp,
        io::ErrorKind::WouldBlock => match socket.narrow() {
            None => Violation::SocketFull.into(),
            Some(size) => LinkEnd::Exhausted(full(size)),
        },
        // Too many descriptors of this user are under way, or the kernel has no memory.
        _ => LinkEnd::Exhausted(said(error)),
    }
}

/// Says that a narrow send buffer is full.
pub(crate) fn full(size: usize) -> String {
    format!("the send buffer of a link is full, of which the kernel grants {size} bytes (net.core.wmem_max)")
}

/// Wakes the peer: whether that need not be tried again. A full socket is a bell that rings already,
/// and a dead one is noticed elsewhere.
pub(crate) fn ring(socket: &PacketSocket) -> bool {
    match socket.send_bytes(&BELL) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::WouldBlock || means_gone(&error) || socket.is_given_up(),
    }
}

/// Takes the first message, if it is there.
pub(crate) fn receive_first(socket: &PacketSocket) -> Result<Option<LinkMessage>, LinkEnd> {
    let first = read(socket.receive::<LONGEST>())?;
    if first.is_some() {
        socket.expect_few(MOST_LATER);
    }
    Ok(first)
}

/// Takes the next message, if one is there, where none may carry more than so many descriptors.
pub(crate) fn receive(socket: &PacketSocket, descriptors: usize) -> Result<Option<LinkMessage>, ReadError> {
    read(socket.receive_few::<LONGEST>(descriptors))
}

fn read(arrival: io::Result<Arrival>) -> Result<Option<LinkMessage>, ReadError> {
    let garbage = |reason| ReadError::End(Violation::Garbage { reason }.into());
    match arrival {
        Ok(Arrival::Message(_, descriptors)) if !descriptors.iter().all(Foreign::is_memory) => {
            // All that has its place here is memory. What else there is, nothing is asked of: a file system that is a
            // program of the peer's need not answer.
            Foreign::drop_together(descriptors);
            Err(ReadError::End(Violation::from(Unsuitable::NotSealable).into()))
        }
        Ok(Arrival::Message(bytes, descriptors)) => {
            wire::decode(&bytes, descriptors).map(Some).map_err(|error| garbage(error.to_string()))
        }
        Ok(Arrival::TooLong) => Err(garbage("longer, or with more descriptors, than any may be".into())),
        Ok(Arrival::NoDescriptors) => Err(ReadError::NoDescriptor),
        Ok(Arrival::Nothing) => Ok(None),
        Ok(Arrival::HangUp) => Err(ReadError::End(LinkEnd::HangUp)),
        Err(error) => Err(ReadError::End(LinkEnd::Exhausted(said(&in_call("recvmsg")(error))))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_welcome_with_all_segments_is_not_too_long() {
        let memory = || Descriptor::from(std::os::fd::OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        let segment = || NewSegment { memory: memory(), slots: u32::MAX };
        let segments = std::iter::repeat_with(segment).take(crate::limits::MAX_SEGMENTS).collect();
        let slots = std::iter::repeat_with(memory).take(crate::limits::MAX_LEASED as usize).collect();
        let welcome = Welcome { lane: memory(), format: LaneFormat::PLAIN, first_sequence: u64::MAX, segments, slots };
        assert!(wire::encode(&LinkMessage::Welcome(welcome)).unwrap().bytes.len() <= LONGEST);
    }

    #[test]
    fn the_bell_is_the_shortest_message() {
        assert_eq!(wire::encode(&LinkMessage::Bell).unwrap().bytes, BELL);
    }
}
