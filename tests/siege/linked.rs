//! What an attacker does to the peers that it is linked with.

pub mod growing;
pub mod restless;

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use fbuf_core::{
    limits::{MAX_AT_ONCE, MAX_MESSAGE, MAX_SEQUENCE},
    memory::Map,
    ring::{
        board::{BoardReader, BoardTable, BoardView, BoardWriter},
        entry::{GAP, LaneFormat, capacity_for},
        lane::{LaneReader, LaneTable, LaneView, LaneWriter},
    },
    send::pool::Pool,
    slot::{Geometry, Mark, SlotId},
    socket::{
        PacketSocket,
        link_message::{Hello, LinkMessage, NewSegment, Welcome},
        wire::{self, Descriptor, Letter},
    },
};
use fbuf_protocol::{ControlRequest, Report, Role};

use crate::{
    attack::Attack,
    attacker::{self, RECEIVER, SENDER, random_bytes, send_many},
    caller::{Caller, Effect, Seen, look_for, receive},
    lingering::{lingering, pass},
    support::Random,
};

/// As many slots as it says that it has as a sender.
const SLOTS: u32 = 4;

/// A link to an honest peer.
struct Link {
    caller: Option<Caller>,
    socket: PacketSocket,
    /// The most slots of its sender.
    slots: u32,
}

impl Link {
    fn to(channel: &str, role: Role) -> Result<Self, String> {
        let caller = Caller::join()?;
        let introduction = caller.open_linked(channel, role)?;
        let socket = introduction.socket.into_owned().and_then(PacketSocket::new);
        let socket = socket.map_err(|error| error.to_string())?;
        Ok(Self { caller: Some(caller), socket, slots: introduction.geometry.max_slots as u32 })
    }

    /// In each role by turns.
    fn by_turns(turn: usize) -> Result<Self, String> {
        Self::to("c", if turn.is_multiple_of(2) { RECEIVER } else { SENDER })
    }

    fn say(&self, message: &LinkMessage) -> Result<(), String> {
        let letter = wire::encode(message).map_err(|error| error.to_string())?;
        self.socket.send(&letter).map_err(|error| format!("to send over a link: {error}"))
    }

    fn broker(&self) -> Result<&Caller, String> {
        self.caller.as_ref().ok_or("no connection".into())
    }

    /// What the peer says first.
    fn hear(&self) -> Result<LinkMessage, String> {
        let (bytes, descriptors) = receive(&self.socket)?.ok_or("the peer has hung up")?;
        wire::decode(&bytes, descriptors).map_err(|error| error.to_string())
    }
}

/// A board, or a lane, or a segment, that says this, and then nothing.
fn memory(bytes: &[u8]) -> Descriptor {
    let wake = nix::sys::eventfd::EventFd::new().unwrap().into();
    let mut pool = Pool::new(Geometry::new(4096, 1).unwrap(), 1, wake).unwrap();
    pool.collect(1);
    let mut fbuf = pool.allocate().unwrap();
    fbuf.set_len(bytes.len()).unwrap();
    fbuf.copy_from_slice(bytes);
    pool.announce(0).next().unwrap().memory
}

/// Names of slots, be there such ones or not.
fn slots(count: u32) -> Vec<SlotId> {
    (0..count).map(SlotId::new).collect()
}

fn hello(board: Descriptor, skip_above: Option<u32>) -> LinkMessage {
    LinkMessage::Hello(Hello { board, skip_above, fences: false, wants_slots: false })
}

fn welcome(lane: Descriptor, memory: Descriptor, slots: u32) -> LinkMessage {
    let segments = vec![NewSegment { memory, slots }];
    LinkMessage::Welcome(Welcome {
        lane,
        format: LaneFormat::WITH_GAPS,
        first_sequence: 0,
        segments,
        slots: Vec::new(),
    })
}

/// The board of an honest receiver.
fn attach(hello: &Hello) -> Result<BoardReader<BoardView>, String> {
    BoardReader::attach(hello.board.as_fd(), SLOTS).map_err(|end| format!("{end:?}"))
}

/// A receiver that keeps to the rules as long as it wants to.
struct Receiving {
    link: Link,
    board: BoardWriter<BoardTable>,
    lane: LaneReader<LaneView>,
    names: Vec<SlotId>,
    /// The number of the next message.
    next: u64,
}

impl Receiving {
    fn begin(channel: &str, skip_above: Option<u32>) -> Result<Self, String> {
        let (link, board, first) = loop {
            let link = Link::to(channel, RECEIVER)?;
            let (board, descriptor) = BoardTable::create("fbuf-test", link.slots as usize).unwrap();
            let heard = link.say(&hello(descriptor.into(), skip_above)).and_then(|()| link.hear());
            match heard {
                // A sender of an earlier attack that is about to close.
                Err(_) if link.socket.has_hung_up() => {}
                heard => break (link, board, heard?),
            }
        };
        let LinkMessage::Welcome(welcome) = first else { return Err("no welcome".into()) };
        let lane = LaneView::attach(welcome.lane.as_fd(), capacity_for(link.slots, welcome.format));
        let lane = LaneReader::new(lane.map_err(|error| error.to_string())?, welcome.format);
        let names = slots(link.slots);
        Ok(Self { link, board: BoardWriter::new(board), lane, names, next: welcome.first_sequence })
    }

    /// The next message, if there is one, with how many were left out before it.
    fn take(&mut self) -> Result<Option<(SlotId, Mark, u64)>, String> {
        let Some(note) = self.lane.look().map_err(|violation| violation.to_string())? else { return Ok(None) };
        let left_out = note.gap;
        let mark = Mark::of(self.next + left_out);
        self.next += left_out + 1;
        self.lane.advance(note.entries());
        Ok(Some((self.names[note.slot as usize], mark, left_out)))
    }

    /// Wakes the sender as well, if it sleeps.
    fn hand_back(&self, slot: SlotId, mark: Mark) {
        self.board.hand_back(slot, mark);
        if self.lane.head().flag().read_behind_fence().asleep().is_some() {
            // A full socket is a bell that rings already.
            let _ = self.link.socket.send_bytes(&[0]);
        }
    }

    fn wait(&mut self) -> Result<(SlotId, Mark, u64), String> {
        look_for("a message", || self.take())
    }
}

/// A sender that keeps to the rules as long as it wants to.
struct Sending {
    link: Link,
    board: BoardReader<BoardView>,
    lane: LaneWriter<LaneTable>,
    memory: Map,
}

impl Sending {
    fn begin() -> Result<Self, String> {
        let link = Link::to("c", SENDER)?;
        let LinkMessage::Hello(hello) = link.hear()? else { return Err("no hello".into()) };
        let board = attach(&hello)?;
        let (lane, lane_fd) = LaneTable::create("fbuf-test", capacity_for(SLOTS, LaneFormat::WITH_GAPS)).unwrap();
        let (memory, memory_fd) = Map::create("fbuf-test", 4096).unwrap();
        link.say(&welcome(lane_fd.into(), memory_fd.into(), SLOTS))?;
        Ok(Self { link, board, lane: LaneWriter::new(lane, LaneFormat::WITH_GAPS), memory })
    }
}

/// Waits until the first message of a link was read and handed back.
fn is_handed_back(board: &BoardReader<BoardView>, slot: SlotId) -> Seen {
    look_for("a slot to be handed back", || {
        let back = board.is_back(slot, Mark::of(0));
        Ok(back.then(|| Effect::if_so(back, String::new)))
    })?
}

pub fn garbage(random: &mut Random, turn: usize) -> Seen {
    let link = Link::by_turns(turn)?;
    let bytes = match turn / 2 % 3 {
        0 => random_bytes(random),
        1 => {
            let whole = wire::encode(&hello(memory(&[]), Some(1))).map_err(|error| error.to_string())?.bytes;
            whole[..1 + random.below(whole.len() as u64 - 1) as usize].to_vec()
        }
        _ => vec![0; 1025 + random.below(2 * MAX_MESSAGE as u64) as usize],
    };
    link.socket.send_bytes(&bytes).map_err(|error| error.to_string())?;
    Effect::hang_up(&link.socket)
}

pub fn descriptors(turn: usize) -> Seen {
    let link = Link::by_turns(turn)?;
    let bytes = wire::encode(&LinkMessage::Bell).map_err(|error| error.to_string())?.bytes;
    send_many(&link.socket, bytes)
}

pub fn wrong_descriptors(turn: usize) -> Seen {
    let mut kinds = attacker::wrong_descriptors();
    let kind = kinds.swap_remove(turn / 3 % kinds.len());
    let right = || memory(&[]);
    let (role, message) = match turn % 3 {
        0 => (RECEIVER, hello(kind.into(), Some(1))),
        1 => (SENDER, welcome(kind.into(), right(), SLOTS)),
        _ => (SENDER, welcome(right(), kind.into(), SLOTS)),
    };
    let link = Link::to("c", role)?;
    link.say(&message)?;
    Effect::hang_up(&link.socket)
}

/// Whoever closes what this sends waits for longer than the test lasts.
pub fn linger(turn: usize) -> Seen {
    let link = Link::by_turns(turn)?;
    let bytes = wire::encode(&LinkMessage::Bell).map_err(|error| error.to_string())?.bytes;
    for _ in 0..3 {
        let letter = Letter { bytes: bytes.clone(), descriptors: vec![lingering(1000)] };
        // After the first the peer may have hung up.
        let _ = pass(&link.socket, letter);
    }
    Effect::hang_up(&link.socket)
}

/// Rings a bell that never stops, and reads nothing.
pub struct Ringing {
    socket: Arc<PacketSocket>,
    rung: Arc<AtomicUsize>,
    _rest: Box<dyn std::any::Any>,
}

impl Ringing {
    pub fn begin(attack: Attack) -> Result<Self, String> {
        let ringing = Self::one(attack)?;
        // No look at the socket may find it empty.
        for _ in 0..3 {
            let (socket, rung) = (ringing.socket.clone(), ringing.rung.clone());
            thread::spawn(move || {
                while !socket.hung_up() {
                    while socket.send_bytes(&[0]).is_ok() {
                        rung.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        Ok(ringing)
    }

    fn one(attack: Attack) -> Result<Self, String> {
        if attack == Attack::BellsToSender {
            let Receiving { link: Link { socket, caller, .. }, board, .. } = Receiving::begin("c", Some(1))?;
            Ok(Self { socket: Arc::new(socket), rung: Arc::default(), _rest: Box::new((caller, board)) })
        } else {
            let Sending { link: Link { socket, caller, .. }, lane, memory, .. } = Sending::begin()?;
            Ok(Self { socket: Arc::new(socket), rung: Arc::default(), _rest: Box::new((caller, lane, memory)) })
        }
    }

    /// The socket is full of bells, and yet more were rung than two looks hear: the peer stays, and hears some of them
    /// at each look.
    pub fn go_on(&mut self) -> Seen {
        let before = self.rung.load(Ordering::Relaxed);
        look_for("room for more bells", || {
            let is_full = self.socket.send_bytes(&[0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
            let rung = self.rung.load(Ordering::Relaxed) - before;
            Ok((is_full && rung > 2 * MAX_AT_ONCE).then_some(()))
        })?;
        Effect::if_so(!self.socket.hung_up(), || "the link was closed".into())
    }
}

/// Hands back messages that come over the socket, each with a descriptor, and never reads one of them.
pub fn fill() -> Seen {
    let mut receiving = Receiving::begin("patient", None)?;
    look_for("the socket to be full", || {
        if let Some((slot, mark, _)) = receiving.take()? {
            receiving.hand_back(slot, mark);
        }
        Ok(receiving.link.socket.hung_up().then_some(()))
    })?;
    Effect::hang_up(&receiving.link.socket)
}

/// Takes as many messages as the sender has slots, and keeps them: the sender sleeps, wakes without a slot, and sleeps
/// again.
pub fn never_acknowledge() -> Seen {
    let mut receiving = Receiving::begin("patient", None)?;
    for _ in 0..receiving.link.slots {
        receiving.wait()?;
    }
    let sleep = || receiving.lane.head().flag().read_behind_fence().asleep();
    let first = look_for("the sender to sleep", || Ok(sleep()))?;
    look_for("the sender to sleep again", || Ok(sleep().filter(|&again| again != first)))?;
    let more = receiving.take()?;
    Effect::if_so(more.is_none(), || format!("the sender goes on: {more:?}"))
}

pub fn lie_in_lane(random: &mut Random, turn: usize) -> Seen {
    // What stands at the first position: a mark, a kind, a slot; and a length.
    let entry = |mark: u64, kind: u64, slot: u64, length: u64| {
        let mut lane = vec![0; 128 + 16];
        lane.extend((mark << 24 | kind << 20 | slot).to_le_bytes());
        lane.extend(length.to_le_bytes());
        lane
    };
    let lane = match turn % 8 {
        0 => entry(1, 0, SLOTS.into(), 8),
        1 => entry(1, 0, 0, 65),
        2 => entry(1, 0, 0, u64::MAX),
        3 => entry(1, 1, 0, 0),
        4 => entry(1, 1, 0, MAX_SEQUENCE),
        5 => entry(1, 2 + random.below(14), 0, 8),
        6 => entry(2 + random.below(1 << 39), 0, 0, 8),
        // At least one of these is none that may stand there.
        _ => random.bytes(4096).into_iter().map(|byte| byte | 1).collect(),
    };
    let link = Link::to("c", SENDER)?;
    link.say(&welcome(memory(&lane), memory(&[]), SLOTS))?;
    Effect::hang_up(&link.socket)
}

/// Several links that share the memory of one lane, full of gaps, or of gaps and messages with one gap too many at the end.
pub fn gaps_without_end(turn: usize) -> Seen {
    let links: Vec<_> = (0..4).map(|_| Link::to("c", SENDER)).collect::<Result<_, _>>()?;
    let capacity = capacity_for(SLOTS, LaneFormat::WITH_GAPS);
    let (lane, lane_fd) = LaneTable::create("fbuf-test", capacity).unwrap();
    let (mut lane, lane_fd) = (LaneWriter::new(lane, LaneFormat::WITH_GAPS), Descriptor::from(lane_fd));
    let honest = if turn.is_multiple_of(2) { 0 } else { capacity / 2 - 1 };
    let names = slots(SLOTS);
    for &slot in &names[..honest] {
        lane.entry(GAP, 0, 1);
        lane.message(slot, 8);
    }
    (2 * honest..capacity).for_each(|_| lane.entry(GAP, 0, 1));
    let mut boards = Vec::new();
    for link in &links {
        let LinkMessage::Hello(hello) = link.hear()? else { return Err("no hello".into()) };
        boards.push(attach(&hello)?);
        link.say(&welcome(lane_fd.clone(), memory(&[]), SLOTS))?;
    }
    for (link, board) in links.iter().zip(&boards) {
        Effect::hang_up(&link.socket)?;
        // What was in order was received.
        let sent = (1..).step_by(2).zip(&names[..honest]).map(|(sequence, &slot)| (slot, Mark::of(sequence)));
        for (slot, mark) in sent {
            Effect::if_so(board.is_back(slot, mark), || format!("{slot:?} was not handed back"))?;
        }
    }
    Effect::if_so(true, String::new)
}

/// Hands back, again and again, what it was never lent. The sender, which was asked for that, leaves out messages
/// until it hands back what it has.
pub fn lie_on_board(random: &mut Random) -> Seen {
    let mut receiving = Receiving::begin("c", Some(1))?;
    let mut lie =
        |board: &BoardWriter<BoardTable>, slot| board.hand_back(slot, Mark::of((1 << 40) + random.below(1 << 40)));
    receiving.names.iter().for_each(|&slot| lie(&receiving.board, slot));
    let mut held = Vec::new();
    loop {
        let (slot, mark, left_out) = receiving.wait()?;
        if left_out > 0 {
            return Effect::if_so(left_out > 0, String::new);
        }
        lie(&receiving.board, slot);
        held.push((slot, mark));
        Effect::if_so(held.len() <= 2, || format!("a lie gave something back: {held:?} are held"))?;
        if held.len() == 2 {
            // In truth.
            let (slot, mark) = held.remove(0);
            receiving.hand_back(slot, mark);
        }
    }
}

/// Closes one thing, and sees that the others go on.
pub fn close(turn: usize) -> Seen {
    match turn % 8 {
        // The connection to the broker: messages come all the same.
        0 => {
            let mut receiving = Receiving::begin("c", Some(1))?;
            drop(receiving.link.caller.take());
            for _ in 0..10 {
                let (slot, mark, _) = receiving.wait()?;
                receiving.hand_back(slot, mark);
            }
            Effect::if_so(!receiving.link.socket.hung_up(), || "the link was closed as well".into())
        }
        // The same: messages go all the same.
        1 => {
            let mut sending = Sending::begin()?;
            drop(sending.link.caller.take());
            let slot = slots(SLOTS)[0];
            sending.lane.message(slot, 8);
            is_handed_back(&sending.board, slot)
        }
        // The endpoint, at the broker.
        2 => {
            let mut sending = Sending::begin()?;
            sending.link.broker()?.ask(ControlRequest::Close { endpoint: 1, last: Report::default() })?;
            let slot = slots(SLOTS)[0];
            sending.lane.message(slot, 8);
            is_handed_back(&sending.board, slot)
        }
        // The link: the broker need not know.
        3 => {
            let Sending { link: Link { caller, socket, .. }, .. } = Sending::begin()?;
            drop(socket);
            caller.ok_or("no broker")?.is_answered()
        }
        4 => {
            let Receiving { link: Link { caller, socket, .. }, .. } = Receiving::begin("c", Some(1))?;
            drop(socket);
            caller.ok_or("no broker")?.is_answered()
        }
        // The link, before it is one.
        5 => {
            let Link { caller, socket, .. } = Link::by_turns(turn / 8)?;
            drop(socket);
            caller.ok_or("no broker")?.is_answered()
        }
        // The lane and the segment, with a message that is not read yet.
        6 => {
            let Sending { link, board, mut lane, memory } = Sending::begin()?;
            let slot = slots(SLOTS)[0];
            lane.message(slot, 8);
            drop((lane, memory));
            let seen = is_handed_back(&board, slot)?;
            drop(link);
            Ok(seen)
        }
        // The board and the lane, with messages that are held.
        _ => {
            let mut receiving = Receiving::begin("c", Some(1))?;
            receiving.wait()?;
            let Receiving { link, board, lane, .. } = receiving;
            drop((board, lane));
            link.say(&LinkMessage::Bell)?;
            Effect::if_so(!link.socket.hung_up(), || "the link was closed as well".into())
        }
    }
}
