//! The receiver's half of a link: it reads the lane, checks what it finds, and writes the board.

mod arrivals;
mod handshake;
mod returns;

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use self::handshake::Parts;
pub use self::handshake::{Answered, GreetError, Greeted, SlotSource};
#[cfg(all(test, not(miri)))]
pub(crate) use self::returns::lock;
use self::returns::next_retired;
pub(crate) use self::returns::{RetiredLink, Returns};
use crate::{
    abort::Abort,
    limits::MAX_SEQUENCE,
    memory::CannotReopen,
    peer::Peer,
    points,
    process::deferred::DeferredDrop,
    protection::Mechanism,
    receive::{
        held::{Cell, Untaken},
        reading::{
            Reading, Unreadable,
            shared::{SharedSegments, Views},
        },
        received::Received,
    },
    ring::{
        board::BoardWriter,
        entry::{Body, LaneFormat, Note},
        lane::LaneReader,
    },
    slot::{Geometry, Mark, SlotId},
    socket::{
        LinkSocket,
        link_message::{LinkEnd, NewSegment, Welcome},
    },
    violation::Violation,
    wait::Fencing,
};

/// What is held of a link, for a report.
#[derive(Debug, Clone)]
pub struct Holdings(Weak<Returns>);

impl Holdings {
    /// How many messages are held, and the number of the one that was sent first. Goes through all slots.
    #[must_use]
    pub fn survey(&self) -> (usize, Option<u64>) {
        let (count, least) = self.0.upgrade().map_or((0, None), |returns| returns.held.survey());
        (count, least.map(Mark::sequence))
    }
}

/// The receiver's half of a link.
#[derive(Debug)]
pub struct Inbound {
    reader: LaneReader<Arc<Returns>>,
    geometry: Geometry,
    /// A message that is shorter than this fits into its slot, and begins where that does.
    below: u64,
    /// How many slots are known.
    known: u32,
    /// The mark of the next message, if nothing is left out before it.
    next: Mark,
    /// The mark at which the round ends.
    round_end: u64,
    /// The same, if messages are taken as they are and the lane is narrow; zero if not.
    plain_until: u64,
    /// The same, if messages are taken as they are, with their tags.
    tagged_until: u64,
    /// Bytes in the messages that were taken.
    bytes: u64,
    format: LaneFormat,
    missed: u64,
    /// How it ended, if it did not end in order.
    end: Option<LinkEnd>,
    /// Why this side will go, if not in order.
    abort: Option<Abort>,
    /// The number of the first message that is sent over it.
    first: u64,
    /// What this process had no room for, and what was published so far may do without.
    lacks: Option<String>,
    /// Whether the next message on the socket waits for a descriptor, of which this process had none left.
    lacks_descriptor: bool,
    /// Whether memory of the next message is on its way.
    awaits_memory: bool,
    /// What this process had no room for when the next message was last to be taken.
    lacks_memory: Option<String>,
    reading: DeferredDrop<Reading>,
}

/// A slot that was just taken, on its way to becoming a [`Received`].
pub(crate) struct Loan<'a> {
    pub cell: &'a Cell,
    pub slot: SlotId,
    pub offset: u32,
    pub length: u32,
    pub mark: Mark,
    /// Zero if it has none.
    pub tag: u64,
    pub home: &'a Returns,
}

impl<'a> Loan<'a> {
    /// Takes a slot for a message with this body, if it is one that can be taken as it is: it is shorter than `below`.
    #[inline(always)]
    fn simple(home: &'a Returns, (number, body): (u64, u64), below: u64, mark: Mark, tag: u64) -> Option<Self> {
        if body >= below {
            return None;
        }
        let cell = home.held.take(number, mark)?;
        Some(Self { cell, slot: SlotId::new(number as u32), offset: 0, length: body as u32, mark, tag, home })
    }
}

impl Inbound {
    fn open(mut greeted: Greeted, mut welcome: Welcome) -> Result<Self, LinkEnd> {
        let parts = greeted.parts(&mut welcome).inspect_err(|end| greeted.board.abort = end.as_abort())?;
        let Parts { board, lane, format, next, reading, held, times } = parts;
        let Greeted { peer, socket, geometry, mechanism, grants, .. } = greeted;
        let returns = Returns {
            peer,
            mechanism,
            header: geometry.header(),
            socket,
            views: Views::default(),
            board: BoardWriter::new(board),
            held,
            times,
            lane,
            rung: AtomicU64::new(0),
            among: next_retired(Fencing::of_this_process()),
            grants,
            lost: AtomicU64::new(0),
        };
        let mut inbound = Self {
            reader: LaneReader::new(Arc::new(returns), format),
            geometry,
            below: u64::from(geometry.slot_bytes()) + 1,
            known: 0,
            next,
            round_end: 0,
            plain_until: 0,
            tagged_until: 0,
            bytes: 0,
            format,
            missed: 0,
            end: None,
            abort: None,
            first: welcome.first_sequence,
            lacks: None,
            lacks_descriptor: false,
            awaits_memory: false,
            lacks_memory: None,
            reading,
        };
        match inbound.add_slots(welcome.segments) {
            Ok(()) => Ok(inbound),
            Err(end) => {
                inbound.abort = end.as_abort();
                Err(end)
            }
        }
    }

    /// Adds the slots that the sender has to begin with.
    fn add_slots(&mut self, segments: Vec<NewSegment>) -> Result<(), LinkEnd> {
        if !self.reading.has_segments() {
            let slots = self.geometry.max_slots();
            self.returns().board.provide(slots).map_err(|error| LinkEnd::Exhausted(error.to_string()))?;
            // Slots are only numbers.
            (0..slots).for_each(|slot| self.returns().held.add(SlotId::new(slot), std::ptr::null_mut()));
            self.known = slots;
        }
        for segment in segments {
            match self.add_segment(&segment) {
                Ok(()) => {}
                Err(LinkEnd::Exhausted(what)) => {
                    self.lacks = Some(what);
                    break;
                }
                Err(end) => return Err(end),
            }
        }
        Ok(())
    }

    #[inline]
    fn returns(&self) -> &Arc<Returns> {
        self.reader.memory()
    }

    /// Who sends.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.returns().peer
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> LinkSocket<'_> {
        self.returns().socket.of_link()
    }

    /// The number of the first message that was not taken, if none is left out before it.
    #[must_use]
    pub fn next_sequence(&self) -> u64 {
        self.next.sequence()
    }

    /// How many messages were taken.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.next.sequence() - self.first - self.missed
    }

    /// How many entries of the lane were read: messages, and the gaps before them.
    #[cfg(any(test, fuzzing))]
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.reader.entries()
    }

    /// How many bytes were in them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Begins a round: so many messages may be [taken simply](Self::take_fast).
    pub fn begin_round(&mut self, messages: u32) {
        let end = self.next.word() + u64::from(messages);
        let is_simple = self.reading.is_in_place() && !self.format.times;
        self.round_end = end;
        self.plain_until = if is_simple && !self.format.tags { end } else { 0 };
        self.tagged_until = if is_simple && self.format.tags { end } else { 0 };
    }

    /// How many messages the round has left.
    #[must_use]
    pub fn left_of_round(&self) -> u32 {
        self.round_end.saturating_sub(self.next.word()) as u32
    }

    /// How many messages were left out for this receiver.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.missed.saturating_add(self.reader.ending().unwrap_or(0))
    }

    /// What is held of this link, to be looked at by another thread.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        Holdings(Arc::downgrade(self.returns()))
    }

    /// How many messages of this link are held in this process.
    #[must_use]
    pub fn held(&self) -> usize {
        self.returns().held.count()
    }

    /// Takes what comes next, if it is a message that can be taken as it is, perhaps with a tag, and if the round is not over.
    #[inline(always)]
    pub fn take_fast(&mut self) -> Option<Received> {
        let mark = self.next;
        if mark.word() < self.plain_until {
            self.take_simply::<false>(mark)
        } else if mark.word() < self.tagged_until {
            self.take_simply::<true>(mark)
        } else {
            None
        }
    }

    #[inline(always)]
    fn take_simply<const WIDE: bool>(&mut self, mark: Mark) -> Option<Received> {
        let home = &**self.returns();
        let (named, tag) = self.reader.peek::<WIDE>();
        let received = Loan::simple(home, named, self.below, mark, tag)?.receive();
        points::reach("get: marked");
        self.reader.pass::<WIDE>();
        self.next = self.next.following();
        self.bytes += received.length() as u64;
        Some(received)
    }

    /// Takes the next message, if there is one, whatever it is: perhaps behind a gap, of a new segment, in a
    /// slot that its last holder is just about to release, copied or leased. None also if that holder does not get to it:
    /// the message is to be tried again. Reads no more entries of the
    /// lane than one message can have, whatever the sender has written. If that is something that it may
    /// not write, the link is over.
    pub fn take(&mut self) -> Option<Received> {
        self.lacks_memory = None;
        if self.awaits_memory {
            // Whoever waits is told when something comes over the socket.
            return None;
        }
        let note = match self.reader.look() {
            Ok(None) => return None,
            Ok(Some(note)) => note,
            Err(violation) => return self.break_off(violation),
        };
        match self.mark_of(&note) {
            Ok(mark) => self.take_message(&note, mark),
            Err(violation) => self.break_off(violation),
        }
    }

    fn take_message(&mut self, note: &Note, mark: Mark) -> Option<Received> {
        let (number, body) = (note.slot, note.body);
        if !self.fetch(number) {
            return None;
        }
        if number >= self.known || !body.fits(self.geometry.slot_bytes()) {
            return self.break_off(self.objection(number, body));
        }
        let slot = SlotId::new(number);
        if let Err(error) = self.reading.provide(slot, body) {
            self.lacks_memory = Some(error.to_string());
            return None;
        }
        let home = &**self.reader.memory();
        let cell = match home.held.take_patiently(number.into(), mark, &home.board) {
            Ok(cell) => cell,
            // It stays in the lane, and is ready.
            Err(Untaken::NotCleared) => return None,
            Err(Untaken::Held) => return self.break_off(Violation::StillHeld { slot: number }),
        };
        points::reach("get: held");
        let (offset, length) = (body.offset(), body.length());
        if let Some(times) = &home.times {
            // Relaxed: whatever passes the message to another thread orders this too.
            times.at(slot.index()).store(note.time, Ordering::Relaxed);
        }
        let loan = Loan { cell, slot, offset, length, mark, tag: note.tag, home };
        let kept = self.reading.read(slot, body, mark, home);
        points::reach("get: copied");
        let is_reused = self.reading.is_reused_when_disconnected() && self.reader.is_disconnected();
        let why = match kept {
            Ok(kept) if is_reused => {
                kept.into_iter().for_each(|kept| kept.let_go(slot, home));
                Unreadable::Never(LinkEnd::Disconnected)
            }
            Ok(kept) => {
                let received = loan.receive();
                self.pass(note, mark);
                return Some(match kept {
                    Some(kept) => received.with(kept, offset),
                    None => received,
                });
            }
            Err(why) => why,
        };
        // The word of the slot stays as it is: to its sender the message is unread.
        cell.clear();
        match why {
            Unreadable::Now(what) => self.lacks_memory = Some(what),
            Unreadable::Never(end) => self.end_with(end),
        }
        None
    }

    /// What this process had no room for when the next message was last to be taken. Nothing is lost: it stays where it is, and is
    /// tried again with each [look](Self::take).
    #[must_use]
    pub fn lacks_memory(&self) -> Option<&str> {
        self.lacks_memory.as_deref()
    }

    /// The mark of a message, behind the gap before it, if there may be one.
    fn mark_of(&self, note: &Note) -> Result<Mark, Violation> {
        if note.gap != 0 && !self.format.gaps {
            return Err(Violation::PrefixUndeclared { prefix: "a gap" });
        }
        check_sequence(self.next.sequence().checked_add(note.gap)).map(Mark::of)
    }

    /// Goes on behind a message that was taken.
    fn pass(&mut self, note: &Note, mark: Mark) {
        self.missed += note.gap;
        self.bytes += u64::from(note.body.length());
        self.reader.advance(note.entries());
        self.next = mark.following();
    }

    /// Gives rights to write back that could not be given before: whether all are given now.
    #[must_use]
    pub fn settle(&self) -> bool {
        self.returns().settle()
    }

    /// Why rights to write cannot be given back, so that the sender lacks slots; none, if it was told before.
    #[must_use]
    pub fn withholds_anew(&self) -> Option<CannotReopen> {
        self.returns().withholds_anew()
    }

    /// How many messages were to be leased, and the kernel refused: they were copied.
    #[must_use]
    pub fn refused_leases(&self) -> u64 {
        if self.returns().mechanism == Mechanism::Lease { self.reading.refused() } else { 0 }
    }

    /// How many leases the kernel took away before there was a copy, since the last time: what was read
    /// may have changed.
    #[must_use]
    pub fn lost_leases(&self) -> u64 {
        let lost = &self.returns().lost;
        if lost.load(Ordering::Relaxed) == 0 { 0 } else { lost.swap(0, Ordering::Relaxed) }
    }

    /// Why a message names nothing that could be taken.
    fn objection(&self, number: u32, body: Body) -> Violation {
        let (known, slot_bytes) = (self.known, self.geometry.slot_bytes());
        if number >= known {
            Violation::Slot { named: number, known }
        } else {
            Violation::Body { length: body.length(), offset: body.offset(), slot_bytes }
        }
    }

    #[cold]
    fn break_off<T>(&mut self, violation: Violation) -> Option<T> {
        self.end_with(violation.into());
        None
    }

    /// Notes how the link ended. What broke it first is what broke it: a rule is not made good by
    /// leaving, and what this process had no room for is not the sender's fault.
    fn end_with(&mut self, end: LinkEnd) {
        if !self.is_broken() {
            let lacks = if matches!(end, LinkEnd::Violation(_)) { self.lacks.take() } else { None };
            self.end = Some(lacks.map_or(end, LinkEnd::Exhausted));
        }
    }

    /// Whether a message waits. One that is none shows when it is taken. One whose memory is still on its way over the socket does not
    /// wait before that has come.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.reader.is_ready() && !self.awaits_memory
    }

    /// Whether more than `count` messages wait.
    #[must_use]
    #[inline]
    pub fn has_more_than(&self, count: u64) -> bool {
        self.reader.has(count)
    }

    /// Whether nothing more will come: the sender ended in order, or is gone, and all it sent was
    /// taken; or it broke a rule.
    #[inline]
    #[must_use]
    pub fn is_over(&self) -> bool {
        match &self.end {
            // In this order: what was published before the hang-up was seen is seen now.
            Some(LinkEnd::HangUp) => !self.is_ready(),
            Some(_) => true,
            None if self.lacks.is_some() => !self.is_ready(),
            None => self.reader.ending().is_some(),
        }
    }

    /// Whether the sender broke a rule, or the link could not go on here.
    #[inline]
    #[must_use]
    pub fn is_broken(&self) -> bool {
        !matches!(self.end, None | Some(LinkEnd::HangUp))
    }

    /// How it ended, once it [is over](Self::is_over): in order, or why the sender broke it off. If it was this side that ended it,
    /// the sender is told why when this is dropped.
    ///
    /// # Errors
    /// [`LinkEnd`]: the sender said nothing of an end.
    pub fn end(&mut self) -> Result<Option<Abort>, LinkEnd> {
        let ended = match self.end.take() {
            Some(LinkEnd::HangUp) | None if self.reader.is_disconnected() => Err(LinkEnd::Disconnected),
            None | Some(LinkEnd::HangUp) if self.reader.ending().is_some() => Ok(self.reader.abort()),
            Some(end) => Err(end),
            None => self.lacks.take().map_or(Ok(None), |lacks| Err(LinkEnd::Exhausted(lacks))),
        };
        self.abort = self.abort.or(ended.as_ref().err().and_then(LinkEnd::as_abort));
        ended
    }

    /// Has the sender told, when this is dropped, that this side has failed.
    pub fn fail(&mut self, abort: Abort) {
        self.abort = Some(abort);
    }

    /// How many messages the sender had written before this link was open.
    #[must_use]
    pub fn missed_before(&self) -> u64 {
        self.first
    }

    /// How long ago the sender rang.
    #[must_use]
    pub fn last_ring(&self) -> Option<Duration> {
        self.reader.head().last_ring().elapsed()
    }

    /// Announces sleep to the sender.
    pub fn raise(&self) {
        self.returns().board.head().flag.raise();
    }

    /// Takes it back.
    pub fn lower(&self) {
        self.returns().board.head().flag.lower();
    }
}

impl Drop for Inbound {
    fn drop(&mut self) {
        let returns = self.returns().clone();
        returns.board.leave(self.next.sequence(), self.abort);
        Fencing::of_this_process().after_publishing();
        returns.wake_sender();
        let among = returns.among;
        let none = Reading::Shared(SharedSegments::default());
        let segments = std::mem::replace(&mut *self.reading, none).into_remains();
        among.leave(RetiredLink { returns, _segments: segments, searched: 0 });
    }
}

/// The number of a message, if it is one that there can be.
fn check_sequence(number: Option<u64>) -> Result<u64, Violation> {
    number.filter(|&number| number < MAX_SEQUENCE).ok_or(Violation::Terms {
        what: "the number of the next message",
        found: number.unwrap_or(u64::MAX),
        allowed: "what a sender can count to, less than 2^62",
    })
}
