//! What the sender of a link sends over its socket: bells, segments, one-shots, its end.

use std::os::fd::AsFd;

use super::{Inbound, Segment};
use crate::{
    limits::{MAX_AT_ONCE, MAX_SEGMENTS},
    memory::{Map, MemoryError},
    points,
    protection::Mechanism,
    receive::reading::{claim::Claim, copied::Copies},
    slot::SlotId,
    socket::link_message::{self, LinkEnd, LinkMessage, NewSegment, OneShot, ReadError},
    violation::{Unsuitable, Violation},
};

impl Inbound {
    /// Reads what the sender sent over the socket: bells, new segments, its end. Only so many messages, or one
    /// segment, which takes the longer to map the larger it is: what is left is reported again.
    ///
    /// Nothing more is read once there was no room for something: the slots of a segment have the numbers behind
    /// those of the one before.
    pub fn attend(&mut self) {
        let known = self.known;
        for _ in 0..MAX_AT_ONCE {
            // A message that came over the socket stays there until the one before it is taken.
            let full = !self.one_shots.is_empty() && self.is_ready();
            if full || self.lacks.is_some() || self.is_broken() || self.known != known {
                return;
            }
            if !self.read_one() {
                return;
            }
        }
    }

    /// Reads the next message on the socket: whether to go on.
    fn read_one(&mut self) -> bool {
        self.lacks_descriptor = false;
        let read = self.read_message();
        self.awaits_memory &= matches!(read, Ok(false));
        match read {
            Ok(more) => return more,
            Err(ReadError::NoDescriptor) => self.lacks_descriptor = true,
            Err(ReadError::End(LinkEnd::Exhausted(what))) => self.lacks = Some(what),
            Err(ReadError::End(end)) => self.end_with(end),
        }
        false
    }

    /// Whether something on the socket waits for a descriptor, of which this process has none left: a segment, or a
    /// message. Nothing is lost; it is tried again with each look, and this tries now.
    pub fn lacks_descriptor(&mut self) -> bool {
        if self.lacks_descriptor {
            if self.returns().mechanism == Mechanism::OneShot && self.is_ready() {
                self.fetch_shot();
            } else {
                self.attend();
            }
        }
        self.lacks_descriptor
    }

    /// Whether memory that the next message lies in is not here, and may come: it was sent before that was published, but another
    /// thread of the sender's process, or of this one, may be at it ([`crate::socket::waiters`]).
    pub(super) fn is_to_come(&mut self, may_come: bool) -> bool {
        self.awaits_memory = may_come && !self.lacks_descriptor && self.end.is_none() && self.lacks.is_none();
        self.lacks_descriptor || self.awaits_memory
    }

    /// Reads on until this slot is known. The sender announced it before it used it.
    pub(super) fn learn_of(&mut self, number: u32) {
        let mut before = None;
        while number >= self.known && before != Some(self.known) {
            before = Some(self.known);
            self.attend();
        }
    }

    /// Reads on until the memory of the next message is here, and nothing that takes its place: the sender may have passed
    /// it again before it told of it.
    pub(super) fn fetch_shot(&mut self) {
        let sequence = self.next_mark().sequence();
        let mut left = MAX_AT_ONCE;
        self.lacks_descriptor = false;
        while self.one_shots.back().is_none_or(|(last, _)| *last <= sequence) && left > 0 {
            left -= 1;
            if !self.read_one() {
                return;
            }
        }
    }

    /// Reads the next message on the socket: whether there was one.
    fn read_message(&mut self) -> Result<bool, ReadError> {
        let grows = self.receiver_slots.is_none() && self.known < self.geometry.max_slots();
        let descriptors = usize::from(grows || self.returns().mechanism == Mechanism::OneShot);
        match link_message::receive(&self.returns().socket, descriptors)? {
            None => return Ok(false),
            Some(LinkMessage::Bell) => {}
            Some(LinkMessage::Segment(segment)) => self.add_segment(&segment).map_err(ReadError::End)?,
            Some(LinkMessage::OneShot(one_shot)) if self.returns().mechanism == Mechanism::OneShot => {
                self.add_shot(one_shot).map_err(ReadError::End)?;
            }
            Some(other) => {
                let wanted = "a bell or a new segment";
                return Err(ReadError::End(Violation::OutOfTurn { found: other.name(), wanted }.into()));
            }
        }
        Ok(true)
    }

    fn add_shot(&mut self, one_shot: OneShot) -> Result<(), LinkEnd> {
        // The sender could not pass the last one to all other receivers, and passes another of the same number.
        if self.one_shots.back().is_some_and(|(number, _)| *number == one_shot.sequence) {
            self.one_shots.pop_back();
        }
        // The entry of the one before was published before this one was sent.
        if self.one_shots.len().checked_sub(1).is_some_and(|before| !self.reader.has(before as u64)) {
            return Err(
                Violation::OutOfTurn { found: "a message of its own", wanted: "the entry of the one before" }.into()
            );
        }
        self.one_shots.push_back((one_shot.sequence, one_shot.memory));
        Ok(())
    }

    pub(super) fn add_segment(&mut self, new: &NewSegment) -> Result<(), LinkEnd> {
        let (room, stride) = (self.geometry.max_slots() - self.known, self.geometry.stride());
        if self.segments.len() == MAX_SEGMENTS || new.slots == 0 || new.slots > room {
            return Err(Violation::Terms {
                what: "the number of slots of a new segment",
                found: new.slots.into(),
                allowed: "at least one, and all together no more than were announced",
            }
            .into());
        }
        let size = self.geometry.segment_bytes(new.slots);
        let exhausted = |error: MemoryError| LinkEnd::Exhausted(error.to_string());
        let (map, copies) = match self.returns().mechanism {
            Mechanism::Shared | Mechanism::Lease | Mechanism::OneShot => (Map::attach(new.memory.as_fd(), size)?, None),
            Mechanism::Copy => {
                let map = Map::attach_unread(new.memory.as_fd(), size)?;
                let claim = Claim::of(new.memory.as_fd(), self.peer())?;
                let others = self.segments.iter().filter_map(|segment| segment.copies.as_ref());
                if others.map(Copies::of).any(|other| other.is_of_memory_of(&claim)) {
                    return Err(Unsuitable::Shared.into());
                }
                (map, Some(Copies::new(size, claim).map_err(exhausted)?))
            }
        };
        let map = map.made_by(self.peer().other_user());
        points::reach("growth: mapped");
        self.returns().board.provide(self.known + new.slots).map_err(exhausted)?;
        let read = copies.as_ref().map_or(&map, Copies::map);
        for (number, bytes) in read.pieces(0..new.slots, stride, self.geometry.slot_bytes()).into_iter().flatten() {
            self.returns().held.add(SlotId::new(self.known + number), bytes.pointer().as_ptr());
        }
        if copies.is_none() {
            // What is copied is nobody else's, and needs no view that only this process writes.
            self.returns().memory().push((map.addresses(), new.memory.clone()));
        }
        self.segments.push(Segment { map, copies, first: self.known });
        self.known += new.slots;
        Ok(())
    }
}
