//! Feeds announcements of slots, and boards, of any size and kind to both halves of a link that grow: segments that are too
//! small, too many, not sealed or without pages, slots that are named before they exist, boards that are not what they
//! are to be. A board takes as much memory as the slots that exist need, and no more; what is received lies in the slot
//! that was named, each slot is held once and allocated once; nothing panics, ends by a signal, or stays open.
#![no_main]

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::Ordering,
};

use arbitrary::{Result, Unstructured};
use fbuf_core::{
    limits::MAX_SEGMENTS,
    memory::Map,
    protection::Mechanism,
    receive::{
        link::{Answered, Inbound, SlotSource},
        received::Received,
    },
    ring::{
        board::BoardTable,
        entry::{LaneFormat, capacity_for},
        lane::LaneTable,
    },
    send::{
        fbuf::Fbuf,
        link::Arrived,
        pool::{Pool, Unsent},
    },
    slot::Geometry,
    socket::{
        Arrival, PacketSocket,
        link_message::{Hello, LinkEnd, LinkMessage, NewSegment, Welcome},
        wire,
    },
    violation::Violation,
};
use fbuf_fuzz::{all_are_closed, answer, filled, greet, head_of, introduced, next_descriptor, peer, sealed, wake};
use libfuzzer_sys::fuzz_target;
use nix::{fcntl::SealFlag, sys::stat::fstat};

/// How many slots there may be: the words of so many take ten pages.
const SLOTS: u32 = 5000;
/// How many there are at first.
const FIRST: u32 = 300;
/// By how many slots a segment grows, about a page of words and around.
const STEPS: [u32; 8] = [0, 1, 2, 211, 212, 213, 1000, 4000];

fn geometry() -> Geometry {
    Geometry::new(1, SLOTS.into()).expect("it is allowed")
}

fn due() -> SealFlag {
    SealFlag::F_SEAL_FUTURE_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

fn pages(memory: impl AsFd) -> u64 {
    fstat(memory).expect("it is open").st_blocks as u64 / 8
}

/// How many pages the words of so many slots take.
fn pages_for(slots: u32) -> u64 {
    (128 + 8 * u64::from(slots)).div_ceil(4096)
}

fn say(socket: &PacketSocket, message: &LinkMessage) {
    // It may be full, or the other half gone.
    let _ = socket.send(&wire::encode(message).expect("it is short"));
}

/// A segment with so many slots, each with this byte, or what a peer may send instead: whether it is as is due.
fn segment(input: &mut Unstructured, slots: u32, byte: u8) -> Result<(OwnedFd, bool)> {
    let size = geometry().segment_bytes(slots.clamp(1, SLOTS));
    Ok(match input.int_in_range(0..=9)? {
        0 => (sealed(size, due()), false),
        1 => (sealed(size, due() - SealFlag::F_SEAL_SHRINK), false),
        2 => (Map::create("fbuf-fuzz", size + 4096).expect("there is memory").1, false),
        3 if size > 4096 => (Map::create("fbuf-fuzz", size - 4096).expect("there is memory").1, false),
        4 => (nix::unistd::pipe().expect("few descriptors are open").0, false),
        _ => (filled(size, byte, due()), true),
    })
}

/// A receiver, whose sender grows.
struct Receiving {
    inbound: Inbound,
    held: Vec<(u32, Received)>,
    lane: LaneTable,
    socket: PacketSocket,
    board: OwnedFd,
    /// How many slots are in segments that are in order, and were announced before anything that is not.
    known: u32,
    /// By segment, its first slot.
    firsts: Vec<u32>,
    in_order: bool,
    position: u64,
    /// Whether the message at that position has named a slot that may come with a segment: then it is waited for.
    waits: bool,
}

impl Receiving {
    fn open(input: &mut Unstructured) -> Result<Option<Self>> {
        let mechanism = *input.choose(&[Mechanism::Shared, Mechanism::Copy])?;
        let (introduced, socket) = introduced(peer(true, true), geometry(), mechanism, SlotSource::Segments);
        let greeted = greet(introduced, None);
        let Ok(Arrival::Message(bytes, descriptors)) = socket.receive::<1024>() else { panic!("nothing came") };
        let Ok(LinkMessage::Hello(hello)) = wire::decode(&bytes, descriptors) else { panic!("no hello") };
        let board = hello.board.into_owned().expect("few descriptors are open");
        assert_eq!(pages(&board), 1, "before a segment was announced");
        let (lane, lane_fd) =
            LaneTable::create("fbuf-fuzz", capacity_for(SLOTS, LaneFormat::PLAIN)).expect("there is memory");
        let (mut segments, mut firsts, mut known, mut in_order) = (Vec::new(), Vec::new(), 0, true);
        for _ in 0..input.int_in_range(0..=2)? {
            let slots = *input.choose(&STEPS)?;
            let (memory, is_due) = segment(input, slots, firsts.len() as u8 + 1)?;
            segments.push(NewSegment { memory: memory.into(), slots });
            in_order &= is_due && slots > 0 && known + slots <= SLOTS;
            if in_order {
                firsts.push(known);
                known += slots;
            }
        }
        let welcome =
            Welcome { lane: lane_fd.into(), format: LaneFormat::PLAIN, first_sequence: 0, segments, slots: Vec::new() };
        say(&socket, &LinkMessage::Welcome(welcome));
        let inbound = match greeted.look() {
            Ok(Answered::Open(inbound)) => *inbound,
            Ok(Answered::NotYet(_)) => panic!("it came"),
            Err(LinkEnd::Violation(_)) if !in_order => return Ok(None),
            Err(end) => panic!("{end:?}"),
        };
        assert!(in_order, "a segment that is not in order was taken");
        Ok(Some(Self {
            inbound,
            held: Vec::new(),
            lane,
            socket,
            board,
            known,
            firsts,
            in_order,
            position: 1,
            waits: false,
        }))
    }

    /// One step: false if the link is over.
    fn step(&mut self, input: &mut Unstructured) -> Result<bool> {
        match input.int_in_range(0..=4)? {
            0 | 1 => {
                let slots = *input.choose(&STEPS)?;
                let (memory, is_due) = segment(input, slots, self.firsts.len() as u8 + 1)?;
                say(&self.socket, &LinkMessage::Segment(NewSegment { memory: memory.into(), slots }));
                let fits = slots > 0 && self.known + slots <= SLOTS && self.firsts.len() < MAX_SEGMENTS;
                self.in_order &= is_due && fits;
                if self.in_order {
                    self.firsts.push(self.known);
                    self.known += slots;
                }
                if input.arbitrary()? {
                    self.inbound.attend();
                }
            }
            2 => self.inbound.attend(),
            3 if !self.held.is_empty() => {
                let index = input.choose_index(self.held.len())?;
                self.held.swap_remove(index);
            }
            _ => {
                let around = (self.known + 2).saturating_sub(input.int_in_range(0..=5)?);
                let number = *input.choose(&[around, 0, 211, 212, 300, SLOTS - 1])?;
                self.lane.at(self.position as usize).scribble(head_of(self.position, 0, number.into()), 1);
                let is_held = self.held.iter().any(|(slot, _)| *slot == number);
                match self.inbound.take() {
                    Some(received) => {
                        assert!(number < self.known && !is_held, "slot {number} of {}", self.known);
                        let segment = self.firsts.iter().rposition(|&first| first <= number);
                        assert_eq!(received[..], [segment.map_or(0, |at| at as u8 + 1)], "of another slot");
                        self.held.push((number, received));
                        (self.position, self.waits) = (self.position + 1, false);
                    }
                    None => {
                        self.waits |= (self.known..SLOTS).contains(&number);
                        assert!(self.inbound.is_over() || self.waits, "a message in slot {number} was not taken");
                    }
                }
            }
        }
        assert!(pages(&self.board) <= pages_for(self.known), "more words than slots exist");
        assert_eq!(self.inbound.held(), self.held.len());
        if !self.inbound.is_over() {
            return Ok(true);
        }
        match self.inbound.end() {
            Err(LinkEnd::Violation(Violation::Slot { .. } | Violation::StillHeld { .. })) => {}
            Err(LinkEnd::Violation(_)) if !self.in_order => {}
            other => panic!("{other:?}"),
        }
        Ok(false)
    }
}

/// A sender that grows, and the board of its receiver.
struct Sending {
    pool: Pool,
    fbufs: Vec<Fbuf>,
    /// To write it, if it is in order.
    table: Option<BoardTable>,
    board: OwnedFd,
    socket: PacketSocket,
    sent: u64,
}

impl Sending {
    fn open(input: &mut Unstructured) -> Result<Option<Self>> {
        let mut pool = Pool::new(geometry(), FIRST, wake()).expect("there is memory");
        let size = BoardTable::size(SLOTS as usize);
        let (table, board, is_due) = match input.int_in_range(0..=7)? {
            0 => (None, sealed(size, due() - SealFlag::F_SEAL_SHRINK), false),
            1 => (None, sealed(size - 4096, due()), false),
            2 => (None, sealed(size + 4096, due()), false),
            3 => (None, nix::unistd::pipe().expect("few descriptors are open").1, false),
            4 | 5 => (None, sealed(size, due()), true),
            _ => {
                let made = BoardTable::create_growing("fbuf-fuzz", SLOTS as usize).expect("there is memory");
                (Some(made.0), made.1, true)
            }
        };
        let copy = board.try_clone().expect("few descriptors are open");
        let peer = peer(input.arbitrary()?, false);
        let (introduced, socket) = introduced(peer, geometry(), Mechanism::Shared, SlotSource::Segments);
        let hello = Hello { board: copy.into(), skip_above: None, fences: false, wants_slots: false };
        say(&socket, &LinkMessage::Hello(hello));
        match answer(&mut pool, introduced.expect()) {
            Ok(Arrived::Here) => assert!(is_due, "a board that is not in order was taken"),
            Err(LinkEnd::Violation(Violation::Descriptor(_))) if !is_due => return Ok(None),
            other => panic!("{other:?}"),
        }
        Ok(Some(Self { pool, fbufs: Vec::new(), table, board, socket, sent: 0 }))
    }

    fn allocate(&mut self, most: usize) {
        while self.fbufs.len() < most
            && (self.pool.collect(64) || self.pool.search())
            && self.pool.collect(64)
            && let Some(fbuf) = self.pool.allocate()
        {
            self.fbufs.push(fbuf);
        }
        let distinct: BTreeSet<_> = self.fbufs.iter().map(|fbuf| fbuf.as_ptr()).collect();
        assert_eq!(distinct.len(), self.fbufs.len(), "a slot was allocated twice");
    }

    /// One step: false if the link is over.
    fn step(&mut self, input: &mut Unstructured) -> Result<bool> {
        match input.int_in_range(0..=6)? {
            0 => {
                if !self.pool.is_growing() && self.pool.can_grow() {
                    self.pool.grow().expect("there is memory");
                }
                match self.pool.announce_to(0) {
                    Ok(true) => self.pool.use_segment(),
                    Ok(false) => {}
                    Err(end) => return Ok(is_fault(&end)),
                }
            }
            1 | 2 => {
                self.allocate(input.int_in_range(0..=400)?);
                while let Some(mut fbuf) = self.fbufs.pop() {
                    fbuf.set_len(1).expect("it is that large");
                    match self.pool.send(fbuf) {
                        Ok(_) => self.sent += 1,
                        Err(Unsent::NoReceiver(_)) => {}
                        Err(unsent) => panic!("{unsent:?}"),
                    }
                }
            }
            3 => self.allocate(input.int_in_range(0..=40)?),
            4 => self.fbufs.truncate(input.int_in_range(0..=40)?),
            5 => {
                if let Some(table) = &self.table {
                    let (slot, back) = (input.int_in_range(0..=SLOTS - 1)?, input.int_in_range(0..=400)?);
                    table.provide(slot as usize + 1).expect("there is memory");
                    let word = match input.arbitrary()? {
                        true => self.sent.saturating_sub(back) + 1,
                        false => input.arbitrary()?,
                    };
                    table.at(slot as usize).store(word, Ordering::Release);
                }
            }
            _ => {
                if input.ratio(1, 8)? {
                    let (memory, _) = segment(input, 1, 1)?;
                    say(&self.socket, &LinkMessage::Segment(NewSegment { memory: memory.into(), slots: 1 }));
                }
                if let Err(end) = self.pool.attend(0) {
                    return Ok(is_fault(&end));
                }
            }
        }
        let places = self.pool.places();
        assert_eq!(places.free + places.held + places.lent, self.pool.slots() as usize, "{places:?}");
        assert!(
            self.table.is_some() || pages(&self.board) <= pages_for(self.pool.slots()),
            "more words than slots exist"
        );
        Ok(true)
    }
}

/// Whether a link goes on that ended; it must not, and for a reason.
fn is_fault(end: &LinkEnd) -> bool {
    assert!(matches!(end, LinkEnd::Violation(_)), "{end:?}, and the peer is there");
    false
}

fn run(input: &mut Unstructured) -> Result<()> {
    if input.arbitrary()? {
        let Some(mut receiving) = Receiving::open(input)? else { return Ok(()) };
        while !input.is_empty() && receiving.step(input)? {}
    } else {
        let Some(mut sending) = Sending::open(input)? else { return Ok(()) };
        while !input.is_empty() && sending.step(input)? {}
    }
    Ok(())
}

fuzz_target!(
    // What a process makes once for all links of its is made.
    init: drop(Receiving::open(&mut Unstructured::new(&[0, 0]))),
    |bytes: &[u8]| {
        let before = next_descriptor();
        let _ = run(&mut Unstructured::new(bytes));
        assert!(all_are_closed(before), "descriptors stayed open");
    }
);
