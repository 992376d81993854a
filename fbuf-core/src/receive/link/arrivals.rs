//! What the sender of a link sends over its socket: bells, segments, one-shots, its end.

use super::Inbound;
use crate::{
    limits::{MAX_AT_ONCE, MAX_SEGMENTS},
    points,
    slot::SlotId,
    socket::link_message::{self, LinkEnd, LinkMessage, NewSegment, ReadError},
    violation::Violation,
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
            let full = self.reading.has_arrived() && self.is_ready();
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
            if self.reading.is_one_shot() && self.is_ready() {
                self.fetch_one_shot();
            } else {
                self.attend();
            }
        }
        self.lacks_descriptor
    }

    /// Before a message is taken: reads on until its slot is known, which the sender announced before it used it, and, of a
    /// one-shot, until the message itself is here. False if that is to come.
    pub(super) fn fetch(&mut self, number: u32) -> bool {
        if number >= self.known {
            let mut before = None;
            while number >= self.known && before != Some(self.known) {
                before = Some(self.known);
                self.attend();
            }
            let may_come = number < self.geometry.max_slots() && self.reading.has_segments();
            return number < self.known || !self.is_to_come(may_come);
        }
        if !self.reading.is_one_shot() {
            return true;
        }
        self.fetch_one_shot();
        let may_come = !self.reading.has_arrived();
        !self.is_to_come(may_come)
    }

    /// Whether memory that the next message lies in is not here, and may come: it was sent before that was published, but another
    /// thread of the sender's process, or of this one, may be at it ([`crate::socket::waiters`]).
    fn is_to_come(&mut self, may_come: bool) -> bool {
        self.awaits_memory = may_come && !self.lacks_descriptor && self.end.is_none() && self.lacks.is_none();
        self.lacks_descriptor || self.awaits_memory
    }

    /// Reads on until the memory of the next message is here, and nothing that takes its place.
    fn fetch_one_shot(&mut self) {
        let (message, mut left) = (self.next, MAX_AT_ONCE);
        self.lacks_descriptor = false;
        while self.reading.awaits(message) && left > 0 && self.read_one() {
            left -= 1;
        }
    }

    /// Reads the next message on the socket: whether there was one.
    fn read_message(&mut self) -> Result<bool, ReadError> {
        let descriptors = usize::from(self.known < self.geometry.max_slots() || self.reading.is_one_shot());
        match link_message::receive(&self.returns().socket, descriptors)? {
            None => return Ok(false),
            Some(LinkMessage::Bell) => {}
            Some(LinkMessage::Segment(segment)) => self.add_segment(&segment).map_err(ReadError::End)?,
            Some(LinkMessage::OneShot(one_shot)) if self.reading.is_one_shot() => {
                let added = self.reading.add_one_shot(one_shot, |count| self.reader.has(count));
                added.map_err(|violation| ReadError::End(violation.into()))?;
            }
            Some(other) => {
                let wanted = "a bell or a new segment";
                return Err(ReadError::End(Violation::OutOfTurn { found: other.name(), wanted }.into()));
            }
        }
        Ok(true)
    }

    pub(super) fn add_segment(&mut self, new: &NewSegment) -> Result<(), LinkEnd> {
        let room = self.geometry.max_slots() - self.known;
        if self.reading.segments() == MAX_SEGMENTS || new.slots == 0 || new.slots > room {
            return Err(Violation::Terms {
                what: "the number of slots of a new segment",
                found: new.slots.into(),
                allowed: "at least one, and all together no more than were announced",
            }
            .into());
        }
        let home = &**self.reader.memory();
        let slots = self.reading.add(new, self.known, self.geometry, home)?;
        points::reach("growth: mapped");
        let provided = home.board.provide(self.known + new.slots);
        provided.map_err(|error| LinkEnd::Exhausted(error.to_string()))?;
        for (number, bytes) in slots.into_iter().flatten() {
            home.held.add(SlotId::new(self.known + number), bytes.pointer().as_ptr());
        }
        self.known += new.slots;
        Ok(())
    }
}
