//! The sender's half of a link: it writes the lane, reads the board, and knows what of the pool's ledger
//! concerns this link.

mod handshake;
mod skipping;

use std::{fmt, ops::Add, os::fd::OwnedFd, sync::Arc, time::Duration};

pub use self::handshake::{Arrived, Expected};
use self::skipping::Skipping;
use crate::{
    abort::Abort,
    limits::{MAX_AT_ONCE, MAX_LEASED, MESSAGE_COST},
    points,
    ring::{
        board::{BoardReader, BoardView},
        entry::Note,
        lane::{LaneTable, LaneWriter},
    },
    send::{fbuf::Outgoing, guard::LinkGuard, unread::Unread},
    slot::{Mark, SlotId},
    socket::{
        LinkSocket, PacketSocket,
        link_message::{self, LinkEnd, LinkMessage, NewSegment, OneShot, ReadError, ReceivedGrant},
        under_way::Kind,
        wire::Descriptor,
    },
    trust::Trusted,
    violation::Violation,
    wait::{self, Fencing},
};

pub use crate::peer::Peer;

/// How often the memory of one message is passed over a link at most, because other links could not take it.
const MOST_PASSES: u32 = 100;
const _: () = assert!((MOST_PASSES as usize) < MAX_AT_ONCE);

/// The sender's half of a link. It belongs to its [`Pool`](crate::send::pool::Pool), which alone can send over it, and shows it.
#[derive(Debug)]
pub struct Outbound {
    peer: Peer,
    socket: PacketSocket,
    /// Whether the receiver reads copies of messages, which it makes before it takes them.
    copies: bool,
    writer: LaneWriter<LaneTable>,
    board: BoardReader<BoardView>,
    /// The number of the first message that was sent over it.
    first: u64,
    /// Once the receiver is gone: the number of the first message that it never read.
    unread_from: Option<u64>,
    /// The messages from there on that were sent over it.
    unread: Option<Unread>,
    /// Whether it was noticed that the receiver has left. What its board says of that later does not count.
    noticed: bool,
    /// Once the link is closed: no slot with a number below this is lent over it.
    searched: u32,
    /// Whether a message needs no more care than to be sent in a narrow lane: the receiver is there and does not want to be
    /// skipped, this process needs no fence, nothing is guarded, no time is noted, and nothing goes over the socket.
    plain: bool,
    /// The same in a wide lane, with a tag.
    tagged: bool,
    /// Whether receivers are told when messages were sent.
    times: bool,
    skipping: Option<Skipping>,
    guard: Option<LinkGuard>,
    lost: Option<LinkEnd>,
    /// Whether the receiver reads nothing any more, or has no claim to it: it has hung up, or broken a rule.
    over: bool,
    /// How many segments the receiver was told of.
    announced: usize,
    /// Whether the slot that is being sent will be lent over this link.
    admitted: bool,
    /// The receiver, if the slots are its own.
    giver: Option<Trusted>,
    /// The size of the socket's send buffer, if that is smaller than it should be.
    narrow: Option<usize>,
    /// What the receiver gave and the pool has not yet.
    received_grants: Vec<ReceivedGrant>,
    lacks_descriptor: bool,
    /// Whether the receiver was passed the memory of the next message already. Then it gets that message.
    passed: bool,
    /// How often that was tried.
    passes: u32,
    /// Messages left out since the last one that was sent.
    gap: u64,
    /// The sleep of the receiver for which the bell was rung last.
    rung: u64,
    counts: LinkCounts,
}

/// Why no one-shot can be passed to a receiver that has not received enough of what it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoRoom {
    /// The send buffer of its link is full, of which the kernel grants so many bytes.
    Buffer(usize),
    /// As many descriptors as may be are under way to its user.
    UnderWay,
}

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Buffer(size) => f.write_str(&link_message::full(*size)),
            Self::UnderWay => f.write_str(
                "receivers of another user have not received the descriptors that they were sent, of which a part of RLIMIT_NOFILE may \
                 be under way",
            ),
        }
    }
}

/// What happened on one link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounts {
    /// Messages left out because the receiver had as many as it wants, or its share of the slots of a lossy sender.
    pub skipped: u64,
    /// Times the receiver had to be woken.
    pub bells: u64,
}

impl Add for LinkCounts {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { skipped: self.skipped + other.skipped, bells: self.bells + other.bells }
    }
}

/// What became of a message on one link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    /// It was sent.
    Lent,
    /// The receiver has as many as it wants, or may have: left out.
    Skipped,
    /// The receiver is gone.
    Gone,
}

impl Outbound {
    /// Who receives.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> LinkSocket<'_> {
        self.socket.of_link()
    }

    /// The number of the first message that was sent over it, or will be.
    pub(crate) fn first_sequence(&self) -> u64 {
        self.first
    }

    /// What happened on it.
    #[must_use]
    pub fn counts(&self) -> LinkCounts {
        self.counts
    }

    /// Whether the receiver may be sent anything.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.unread_from.is_none()
    }

    /// Why the receiver has left, if it has failed.
    #[must_use]
    pub fn failure(&self) -> Option<Abort> {
        self.board.abort()
    }

    /// Whether the receiver has said that it leaves.
    #[must_use]
    pub fn has_left(&self) -> bool {
        self.board.left_at().is_some()
    }

    /// Whether the slot that is to be sent will be lent to this receiver: it is there, would not rather skip, and does not have
    /// as many messages as `limit`. Nothing is noted before [`Self::offer`], which follows if the slot can be sent at all.
    pub(crate) fn admit(&mut self, limit: usize) -> bool {
        let has_room = |skipping: &mut Skipping| self.passed || skipping.has_room(limit, &self.board);
        self.admitted = self.is_open() && self.skipping.as_mut().is_none_or(has_room);
        self.admitted
    }

    /// Whether the next message is left out for this receiver only because it has as many as `limit`.
    pub(crate) fn is_limited(&mut self, limit: usize) -> bool {
        self.is_open() && self.skipping.as_mut().is_some_and(|skipping| skipping.is_limited(limit, &self.board))
    }

    /// Leaves a message out that was [admitted](Self::admit), and could not be [passed](Self::pass).
    pub(crate) fn forgo(&mut self) {
        (self.admitted, self.passes) = (false, 0);
    }

    /// Sends the memory of a one-shot over the socket, if the message was [admitted](Self::admit). The receiver is told of
    /// the message by [`Self::offer`], once every link has taken the memory; if one could not, the next message has the same
    /// number, and its memory takes the place of this one.
    ///
    /// # Errors
    /// Which limit is in the way. That passes, and the link goes on.
    pub(crate) fn pass(&mut self, memory: &Arc<OwnedFd>, sequence: u64) -> Result<(), String> {
        if !self.admitted {
            return Ok(());
        }
        // A receiver does not look through more than so many that take each other's place.
        if self.passes == MOST_PASSES {
            if self.socket.unread() > 0 {
                return Err(format!(
                    "a receiver was sent {MOST_PASSES} messages that others could not be sent, and is to look at them first"
                ));
            }
            self.passes = 0;
        }
        let one_shot = OneShot { memory: Descriptor::from(memory.clone()), sequence };
        match link_message::send(&self.socket, &LinkMessage::OneShot(one_shot)) {
            Ok(()) => {
                self.passed = true;
                self.passes += 1;
                points::reach("seal: sent");
            }
            Err(LinkEnd::Exhausted(reason)) => return Err(reason),
            Err(end) => {
                self.admitted = false;
                self.lose(sequence, end);
            }
        }
        Ok(())
    }

    /// Whether so many one-shots more can be passed now, and one to each of these links with its user, of which this is one:
    /// none if so.
    #[must_use]
    pub(crate) fn lacks_room(&self, one_shots: usize, links: &[Self]) -> Option<NoRoom> {
        if !self.is_open() {
            return None;
        }
        let is_of_user = |link: &&Self| link.is_open() && link.peer.process.uid == self.peer.process.uid;
        if !self.socket.has_room(|| links.iter().filter(is_of_user).count(), Kind::Other) {
            return Some(NoRoom::UnderWay);
        }
        let size = self.narrow?;
        (self.socket.unread() + one_shots.saturating_sub(1) * MESSAGE_COST >= size).then_some(NoRoom::Buffer(size))
    }

    /// Lends a slot to the receiver and tells it, if it was [admitted](Self::admit).
    pub(crate) fn offer(&mut self, outgoing: &Outgoing, sequence: u64) -> Offer {
        let slot = outgoing.slot;
        if !std::mem::take(&mut self.admitted) {
            return self.leave_out(slot);
        }
        (self.passed, self.passes) = (false, 0);
        let mark = Mark::of(sequence);
        if let Some(skipping) = &mut self.skipping {
            skipping.lend(slot, mark);
        }
        if let Some(guard) = &self.guard {
            guard.lent(slot, mark);
        }
        let time = if self.times { wait::now().unwrap_or(0) } else { 0 };
        let gap = std::mem::take(&mut self.gap);
        self.writer.noted(&Note { gap, tag: outgoing.tag, time, ..Note::plain(slot, outgoing.body) });
        if self.needs_nothing(Fencing::of_this_process()) { Offer::Lent } else { self.notify(sequence) }
    }

    /// The link is over before this message was sent over it.
    fn lose(&mut self, sequence: u64, end: LinkEnd) {
        self.unread_from = Some(self.unread_from.unwrap_or(sequence).min(sequence));
        (self.plain, self.tagged) = (false, false);
        self.lost = Some(self.note(end));
    }

    /// Notes why the link ends.
    fn note(&mut self, end: LinkEnd) -> LinkEnd {
        self.over |= match &end {
            LinkEnd::HangUp | LinkEnd::Disconnected => true,
            // It may be stopped, or read in place, and have yet to hand back what it has.
            LinkEnd::Violation(violation) => !matches!(violation, Violation::SocketFull),
            LinkEnd::Exhausted(_) => false,
        };
        end
    }

    /// Whether the receiver reads nothing any more, or has no claim to it.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Why the link is over, if that was found out while something was sent.
    pub(crate) fn lost(&mut self) -> Option<LinkEnd> {
        self.lost.take()
    }

    /// Whether a message needs no more than to be [lent](Self::lend), in such a lane.
    #[inline]
    pub(crate) fn is_simple<const WIDE: bool>(&self) -> bool {
        if WIDE { self.tagged } else { self.plain }
    }

    /// Lends a slot over a [simple](Self::is_simple) link and tells: false if there is something to [`Self::notify`] of.
    #[inline]
    pub(crate) fn lend<const WIDE: bool>(&mut self, outgoing: &Outgoing) -> bool {
        self.writer.simple::<WIDE>(outgoing.slot, outgoing.body, outgoing.tag);
        self.needs_nothing(Fencing::Asymmetric)
    }

    /// Whether the receiver that was just told of a message neither sleeps nor leaves, nor asks for a fence.
    #[inline]
    fn needs_nothing(&self, fencing: Fencing) -> bool {
        points::reach("write: published");
        fencing.after_publishing();
        self.board.head().flag().read().needs_nothing()
    }

    /// Notes a message that is not sent over this link.
    fn leave_out(&mut self, slot: SlotId) -> Offer {
        if !self.is_open() {
            return Offer::Gone;
        }
        if let Some(skipping) = &mut self.skipping {
            skipping.leave_out(slot);
        }
        self.gap += 1;
        self.counts.skipped += 1;
        Offer::Skipped
    }

    /// After a message was sent to a receiver that sleeps, leaves, or asks for a fence: it may have read
    /// even this one before it left.
    #[cold]
    #[inline(never)]
    pub(crate) fn notify(&mut self, sequence: u64) -> Offer {
        if let Some(sleep) = self.board.head().flag().read_behind_fence().asleep()
            && self.rung != sleep
        {
            self.writer.head().last_ring.note();
            points::reach("write: bell");
            if link_message::ring(&self.socket) {
                self.rung = sleep;
                self.counts.bells += 1;
            }
        }
        // What it did not take of this message, the caller hears at once, and not as unread.
        self.close_from(sequence + 1, sequence);
        if self.unread_from.is_none_or(|unread| sequence < unread) { Offer::Lent } else { Offer::Gone }
    }

    /// Whether the receiver has the slot: it was lent with the message of this mark, and is not back.
    #[inline]
    pub(crate) fn has(&self, slot: SlotId, mark: Mark) -> bool {
        !self.board.is_back(slot, mark) && self.was_lent(slot, mark)
    }

    /// How many of these slots, from a first one on, are in the pool, or would be but for other links.
    #[inline]
    pub(crate) fn count_back(&self, first: SlotId, marks: &[Mark]) -> usize {
        let mut count = 0;
        for (slot, mark, back) in self.board.look_through(first, marks) {
            if !back && (mark == Mark::OUT || self.was_lent(slot, mark)) {
                break;
            }
            count += 1;
        }
        count
    }

    /// Whether the message of this mark reached the receiver, as far as is known.
    fn was_lent(&self, slot: SlotId, mark: Mark) -> bool {
        !mark.is_before(self.first)
            && self.unread_from.is_none_or(|unread| mark.is_before(unread))
            && self.skipping.as_ref().is_none_or(|skipping| skipping.lends(slot, mark))
    }

    /// No slot with a number below this is lent over it, or will be: nothing is lent over a link that is closed.
    pub(crate) fn searched(&self) -> u32 {
        self.searched
    }

    /// Below this number no slot was found that is lent over it. Of a link that is open nothing follows from that.
    pub(crate) fn note_searched(&mut self, searched: u32) {
        if !self.is_open() {
            self.searched = searched;
        }
    }

    /// Looks whether the receiver has left. What it never read is back at once; what it holds on to
    /// stays lent until it is handed back, or the link hangs up. `sent` is the number of the message that
    /// comes next: further than that nobody has read.
    pub(crate) fn notice_leaving(&mut self, sent: u64) {
        self.close_from(sent, sent);
    }

    /// If the receiver has left: sends nothing more, from the message on that it never read, at most from `end` on;
    /// and notes which messages before `sent` it has not read. Their slots may be used again at once.
    fn close_from(&mut self, end: u64, sent: u64) {
        // Once: a receiver that says something else each time would have its messages gone through each time.
        if self.noticed {
            return;
        }
        let Some(next) = self.board.left_at() else { return };
        self.noticed = true;
        let end = self.unread_from.unwrap_or(end);
        let unread = next.clamp(self.first.min(end), end)..end.min(sent);
        let more = match &self.skipping {
            None => Unread::all(unread.clone()),
            Some(skipping) => Unread::each(skipping.lent(&self.board).filter(|number| unread.contains(number))),
        };
        self.unread = Unread::add(self.unread, more);
        self.unread_from = Some(unread.start);
        (self.plain, self.tagged) = (false, false);
    }

    /// The messages before number `sent` that the receiver has not read to the end, where `lent` are those in slots
    /// that are not back.
    pub(crate) fn unread(&self, lent: impl Iterator<Item = Mark>, sent: u64) -> Option<Unread> {
        Unread::add(self.unread, Unread::each(lent.map(Mark::sequence).filter(|&number| number < sent)))
    }

    /// Whether the receiver's process has closed its end of the link, or died, as the kernel knows.
    #[must_use]
    pub fn has_hung_up(&self) -> bool {
        self.socket.has_hung_up()
    }

    /// How many segments the receiver was told of.
    pub(crate) fn announced(&self) -> usize {
        self.announced
    }

    /// As [`Pool::announce_to`], of these segments; `slots` are all that there are then.
    pub(crate) fn announce(&mut self, segments: Vec<NewSegment>, slots: u32) -> Result<bool, LinkEnd> {
        if self.board.provide(slots).is_err() {
            return Ok(false);
        }
        for segment in segments {
            match link_message::send(&self.socket, &LinkMessage::Segment(segment)) {
                Ok(()) => {
                    self.announced += 1;
                    points::reach("growth: announced");
                }
                Err(LinkEnd::Exhausted(_)) => return Ok(false),
                Err(end) => return Err(self.note(end)),
            }
        }
        Ok(true)
    }

    /// Reads what the receiver sent over the socket: bells, which need no answer but a look around; and
    /// looks whether it has left, as [`Self::notice_leaving`].
    ///
    /// # Errors
    /// [`LinkEnd`]: the link is over, and with its drop all that is lent over it is back.
    pub(crate) fn attend(&mut self, sent: u64) -> Result<(), LinkEnd> {
        self.read_socket().map_err(|end| self.note(end))?;
        self.notice_leaving(sent);
        Ok(())
    }

    fn read_socket(&mut self) -> Result<(), LinkEnd> {
        // Those of a right.
        let descriptors = if self.giver.is_some() { 2 } else { 0 };
        self.lacks_descriptor = false;
        // A peer that never stops is not listened to for ever; what is left is reported again.
        for _ in 0..MAX_AT_ONCE {
            match link_message::receive(&self.socket, descriptors) {
                // That this process has no memory to read a bell, or no descriptor for a right, passes: it waits. It
                // must not end the link, for then slots would be written that the receiver still reads.
                Ok(None) | Err(ReadError::End(LinkEnd::Exhausted(_))) => break,
                Err(ReadError::NoDescriptor) => {
                    self.lacks_descriptor = true;
                    break;
                }
                Ok(Some(LinkMessage::Bell)) => {}
                Ok(Some(other)) => match (other, self.giver) {
                    (LinkMessage::WriteGrant(right), Some(giver))
                        if self.received_grants.len() < MAX_LEASED as usize =>
                    {
                        self.received_grants.push(right.take(giver));
                    }
                    (other, _) => return Err(Violation::OutOfTurn { found: other.name(), wanted: "a bell" }.into()),
                },
                Err(ReadError::End(end)) => return Err(end),
            }
        }
        Ok(())
    }

    /// Whether the right to write a slot waits on the socket, for which this process had no descriptor at the last look.
    #[must_use]
    pub fn lacks_descriptor(&self) -> bool {
        self.lacks_descriptor
    }

    /// What the receiver gave since the last time.
    pub(crate) fn received_grants(&mut self) -> Vec<ReceivedGrant> {
        std::mem::take(&mut self.received_grants)
    }

    /// How long ago the receiver rang.
    #[must_use]
    pub fn last_ring(&self) -> Option<Duration> {
        self.board.head().last_ring().elapsed()
    }

    /// Announces sleep to the receiver.
    pub fn raise(&self) {
        self.writer.head().flag.raise();
    }

    /// Takes it back.
    pub fn lower(&self) {
        self.writer.head().flag.lower();
    }

    /// Tells the receiver that it is disconnected: whether what it has can be used again at once. If it copies messages,
    /// it notices in time that a copy may be of another message; if it reads them where they lie, it has them until it
    /// lets go.
    pub(crate) fn disconnect_receiver(&mut self) -> bool {
        self.writer.disconnect_receiver();
        link_message::ring(&self.socket);
        self.copies
    }

    /// Ends the link: everything that was sent before message number `sent` arrives, and then the end, or why there is no
    /// more.
    pub(crate) fn close(&mut self, sent: u64, abort: Option<Abort>) {
        self.writer.close(self.gap, abort);
        self.unread_from = Some(self.unread_from.unwrap_or(sent));
        (self.plain, self.tagged) = (false, false);
        // The hang-up of the socket, which follows, wakes the receiver.
    }
}
