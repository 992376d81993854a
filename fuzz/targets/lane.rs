//! Feeds any words to the reader of a lane and to the reader of a board, among honest ones, while the halves of a
//! link that read them go on with what they do. What is received lies inside a slot, and each slot is held once;
//! what is allocated is a slot of the pool, and each is allocated once; nothing panics, nothing stays open.
#![no_main]

use std::{collections::BTreeSet, ops::Deref, sync::atomic::Ordering};

use arbitrary::{Result, Unstructured};
use fbuf_core::{
    protection::Mechanism,
    receive::{
        link::{Answered, Inbound},
        received::Received,
    },
    ring::{
        board::BoardTable,
        entry::{Body, LaneFormat, capacity_for},
        lane::LaneTable,
    },
    send::{
        fbuf::Fbuf,
        link::Arrived,
        pool::{Pool, Unsent},
        retained::Retained,
    },
    socket::{
        PacketSocket,
        link_message::{Hello, LinkEnd, LinkMessage, OneShot, Welcome},
        wire,
    },
};
use fbuf_fuzz::{
    SLOT_BYTES, SLOTS, all_are_closed, answer, content, geometry, greet, head_of, introduced, lodged, next_descriptor,
    peer, pool, segments, shot, slot_source,
};
use libfuzzer_sys::fuzz_target;

/// A receiver, and the lane of its sender.
struct Receiving {
    inbound: Inbound,
    held: Vec<Received>,
    lane: LaneTable,
    /// How many cells each of its entries has.
    width: u64,
    socket: PacketSocket,
    /// Where honest messages were: the beginnings of slots, if those do not move.
    starts: BTreeSet<*const u8>,
}

impl Receiving {
    fn open(mechanism: Mechanism, skip_above: Option<u32>, tags: bool, times: bool) -> Self {
        let segments = if matches!(mechanism, Mechanism::Shared | Mechanism::Copy) { segments() } else { Vec::new() };
        let (introduced, socket) =
            introduced(peer(true, true), geometry(), mechanism, slot_source(lodged(mechanism, 0)));
        let greeted = greet(introduced, skip_above);
        let format = LaneFormat { gaps: skip_above.is_some(), tags, times };
        let capacity = capacity_for(SLOTS, format);
        let (lane, descriptor) = LaneTable::create("fbuf-fuzz", capacity).expect("there is memory");
        let welcome = Welcome { lane: descriptor.into(), format, first_sequence: 0, segments, slots: Vec::new() };
        say(&socket, &LinkMessage::Welcome(welcome));
        let Ok(Answered::Open(inbound)) = greeted.look() else { panic!("an honest welcome was refused") };
        let width = format.width();
        let mut receiving = Self { inbound: *inbound, held: Vec::new(), lane, width, socket, starts: BTreeSet::new() };
        for slot in 0..SLOTS {
            if mechanism == Mechanism::OneShot {
                receiving.shoot(slot.into(), slot);
            }
            receiving.write(u64::from(slot) + 1, 0, slot.into(), SLOT_BYTES.into());
            let received = receiving.inbound.take().expect("an honest message was refused");
            assert!(received.iter().all(|&byte| byte == content(slot)) && received.len() == SLOT_BYTES as usize);
            if mechanism == Mechanism::Shared || mechanism == Mechanism::Copy {
                receiving.starts.insert(received.as_ptr());
            }
        }
        receiving
    }

    /// Writes the first cell of an entry.
    fn write(&self, entry: u64, kind: u64, slot: u64, body: u64) {
        let position = entry * self.width;
        self.lane.at(position as usize).scribble(head_of(position, kind, slot), body);
    }

    fn shoot(&self, sequence: u64, slot: u32) {
        say(&self.socket, &LinkMessage::OneShot(OneShot { memory: shot(content(slot)).into(), sequence }));
    }

    fn hold(&mut self, received: Received) {
        assert!(received.len() <= SLOT_BYTES as usize);
        let known = |byte: u8| (0..SLOTS).any(|slot| content(slot) == byte);
        if let Some(&first) = received.first() {
            assert!(known(first) && received.iter().all(|&byte| byte == first), "bytes of no slot: {received:?}");
        }
        let start = self.starts.range(..=received.as_ptr()).next_back();
        let is_inside =
            |start: &*const u8| received.as_ptr() as usize + received.len() <= *start as usize + SLOT_BYTES as usize;
        assert!(self.starts.is_empty() || start.is_some_and(is_inside), "it lies in no slot");
        self.held.push(received);
        assert!(self.held.len() <= SLOTS as usize && self.inbound.held() == self.held.len());
        assert!(self.starts.is_empty() || are_distinct(&self.held), "a slot is held twice");
    }

    /// One step: false if the link is over.
    fn step(&mut self, input: &mut Unstructured) -> Result<bool> {
        let entry = self.inbound.entries() + input.int_in_range(0..=7)?;
        let position = entry * self.width;
        match input.int_in_range(0..=9)? {
            0 => self
                .lane
                .at((position + input.int_in_range(0..=1)?) as usize)
                .scribble(input.arbitrary()?, input.arbitrary()?),
            1 => self.write(entry, input.int_in_range(0..=5)?, input.int_in_range(0..=5)?, input.arbitrary()?),
            2 => self.write(entry, 0, input.int_in_range(0..=3)?, input.int_in_range(0..=101)?),
            3 => {
                let (offset, length) = (input.int_in_range(0..=101)?, input.int_in_range(0..=101)?);
                let (slot, kind) = (input.int_in_range(0..=3)?, input.int_in_range(0..=4)?);
                self.write(entry + 1, 0, slot, Body::new(offset, length).word());
                self.write(entry, kind, 0, input.int_in_range(0..=2)?);
            }
            4 => {
                let dropped = u64::from(input.ratio(1, 8)?);
                self.lane.head().scribble(input.arbitrary()?, position, input.arbitrary()?, dropped);
            }
            5 => {
                self.inbound.begin_round(input.int_in_range(0..=3)?);
                while let Some(received) = self.inbound.take_fast() {
                    self.hold(received);
                }
            }
            6 => {
                let index = input.int_in_range(0..=3)?;
                if index < self.held.len() {
                    self.held.swap_remove(index);
                }
            }
            7 => {
                self.shoot(entry, input.int_in_range(0..=3)?);
                self.inbound.attend();
            }
            8 => {
                self.inbound.raise();
                self.inbound.lower();
            }
            // A lane full of gaps, or nearly, with or without messages among them.
            _ => {
                let (among, next) = (input.int_in_range(1..=8)?, self.inbound.entries() + 1);
                (0..2 * u64::from(SLOTS))
                    .for_each(|at| self.write(next + at, u64::from((at + 1) % among != 0), at / 2, 1));
            }
        }
        if input.arbitrary()? {
            let (read, messages) = (self.inbound.entries(), self.inbound.messages());
            let received = self.inbound.take();
            assert!(self.inbound.messages() - messages == u64::from(received.is_some()));
            assert!(self.inbound.entries() - read <= 2, "a call reads more than a gap and its message");
            received.into_iter().for_each(|received| self.hold(received));
        }
        let waiting = self.inbound.has_more_than(input.int_in_range(0..=9)?);
        let _ = (waiting, self.inbound.is_ready(), self.inbound.last_ring(), self.inbound.missed());
        assert!(self.inbound.bytes() <= self.inbound.messages() * u64::from(SLOT_BYTES));
        assert!(self.inbound.settle() && self.inbound.lost_leases() == 0);
        let over = self.inbound.is_over();
        if over {
            let broken = self.inbound.is_broken();
            match self.inbound.end() {
                Err(LinkEnd::Violation(_)) => assert!(broken),
                Err(LinkEnd::Disconnected) => {}
                Ok(_) => assert!(!broken),
                Err(end) => panic!("{end:?}, and the sender is there"),
            }
        }
        Ok(!over)
    }
}

/// A sender, and the board of its receiver.
struct Sending {
    pool: Pool,
    fbufs: Vec<Fbuf>,
    retained: Vec<Retained>,
    board: BoardTable,
    socket: PacketSocket,
    starts: BTreeSet<*const u8>,
}

impl Sending {
    fn open(skip_above: Option<u32>, fences: bool) -> Self {
        let (introduced, socket) = introduced(peer(false, false), geometry(), Mechanism::Shared, slot_source(0));
        let mut pool = pool(SLOTS);
        let mut fbufs = Vec::new();
        while pool.collect(SLOTS)
            && let Some(fbuf) = pool.allocate()
        {
            fbufs.push(fbuf);
        }
        let starts: BTreeSet<_> = fbufs.iter().map(|fbuf| fbuf.as_ptr()).collect();
        assert_eq!(starts.len(), SLOTS as usize);
        let (board, descriptor) = BoardTable::create("fbuf-fuzz", SLOTS as usize).expect("there is memory");
        let hello = Hello { board: descriptor.into(), skip_above, fences, wants_slots: false };
        say(&socket, &LinkMessage::Hello(hello));
        let Ok(Arrived::Here) = answer(&mut pool, introduced.expect()) else { panic!("an honest hello was refused") };
        Self { pool, fbufs, retained: Vec::new(), board, socket, starts }
    }

    fn allocate(&mut self) {
        while (self.pool.collect(64) || self.pool.search())
            && self.pool.collect(64)
            && let Some(fbuf) = self.pool.allocate()
        {
            assert!(self.starts.contains(&fbuf.as_ptr()), "it begins where no slot does");
            self.fbufs.push(fbuf);
            assert!(are_distinct(&self.fbufs), "a slot was allocated twice");
        }
        let kept = |retained: &Retained| self.fbufs.iter().any(|fbuf| fbuf.as_ptr() == retained.as_ptr());
        assert!(!self.retained.iter().any(kept), "a slot was allocated that its sender still reads");
    }

    /// Sends the fbuf that was allocated last, to be read on or not.
    fn send(&mut self, keep: bool) {
        let Some(mut fbuf) = self.fbufs.pop() else { return };
        fbuf.set_len(SLOT_BYTES as usize).expect("it is that large");
        fbuf.fill(content(self.pool.next_sequence() as u32));
        let unsent = if keep {
            self.pool.send_and_keep(fbuf).map(|(_, retained)| self.retained.push(retained)).err()
        } else {
            self.pool.send_fast(fbuf).err().and_then(|fbuf| self.pool.send(fbuf).err())
        };
        assert!(matches!(unsent, None | Some(Unsent::NoReceiver(_))), "{unsent:?}");
    }

    fn step(&mut self, input: &mut Unstructured) -> Result<()> {
        match input.int_in_range(0..=8)? {
            0 => self.write(input.int_in_range(0..=3)?, input.arbitrary()?),
            // That a message came back which was sent, or soon will be.
            1 | 2 => self.write(
                input.int_in_range(0..=3)?,
                self.pool.next_sequence().saturating_sub(input.int_in_range(0..=5)?) + 1,
            ),
            3 => self
                .board
                .head()
                .scribble(input.arbitrary()?, self.pool.next_sequence().wrapping_sub(input.int_in_range(0..=3)?)),
            4 => self.board.head().scribble(input.int_in_range(0..=15)?, input.arbitrary()?),
            5 => drop(self.fbufs.pop()),
            6 => {
                if let Some(retained) = self.retained.pop() {
                    match self.pool.rewrite(retained) {
                        Ok(fbuf) => self.fbufs.push(fbuf),
                        Err(retained) => self.retained.push(retained),
                    }
                }
            }
            7 => drop(self.retained.pop()),
            _ => {
                self.pool.links()[0].raise();
                self.pool.links()[0].lower();
                self.pool.attend(0).expect("nothing came over the socket");
            }
        }
        let (allocates, sends, keeps) = input.arbitrary()?;
        if allocates {
            self.allocate();
        }
        if sends {
            self.send(keeps);
        }
        self.pool.notice_leaving();
        let places = self.pool.places();
        assert_eq!(places.free + places.held + places.lent, SLOTS as usize);
        let (link, sent) = (&self.pool.links()[0], self.pool.next_sequence());
        // A message to a receiver that has left is rung for and not counted.
        assert!(link.counts().skipped <= sent);
        let _ = (link.last_ring(), self.pool.lends(), self.pool.is_back(1));
        assert!(self.pool.lost().is_none());
        Ok(())
    }

    fn write(&self, slot: usize, word: u64) {
        self.board.at(slot).store(word, Ordering::Release);
    }

    /// Without its receiver, everything is back.
    fn end(mut self) {
        self.fbufs.clear();
        self.retained.clear();
        let Self { mut pool, socket, .. } = self;
        drop(socket);
        assert!(matches!(pool.attend(0), Err(LinkEnd::HangUp)));
        pool.end(0);
        let mut fbufs = Vec::new();
        while (pool.collect(64) || pool.search_all())
            && pool.collect(64)
            && let Some(fbuf) = pool.allocate()
        {
            fbufs.push(fbuf);
        }
        assert_eq!(fbufs.len(), SLOTS as usize);
    }
}

fn say(socket: &PacketSocket, message: &LinkMessage) {
    // It may be full, or the other half gone.
    let _ = socket.send(&wire::encode(message).expect("it is short"));
}

fn are_distinct(slots: &[impl Deref<Target = [u8]>]) -> bool {
    slots.iter().map(|slot| slot.as_ptr()).collect::<BTreeSet<_>>().len() == slots.len()
}

fn run(input: &mut Unstructured) -> Result<()> {
    let skip_above = *input.choose(&[None, None, Some(0), Some(2), Some(u32::MAX)])?;
    if input.arbitrary()? {
        let mechanism = *input.choose(&[Mechanism::Shared, Mechanism::Copy, Mechanism::Lease, Mechanism::OneShot])?;
        let mut receiving = Receiving::open(mechanism, skip_above, input.arbitrary()?, input.arbitrary()?);
        while !input.is_empty() && receiving.step(input)? {}
        let Receiving { inbound, held, .. } = receiving;
        drop(inbound);
        // They stay readable.
        assert!(held.iter().all(|received| received.iter().all(|byte| Some(byte) == received.first())));
    } else {
        let mut sending = Sending::open(skip_above, input.arbitrary()?);
        let mut more = Ok(());
        while !input.is_empty() && more.is_ok() {
            more = sending.step(input);
        }
        sending.end();
    }
    Ok(())
}

fuzz_target!(
    // What a process makes once for all links of its is made.
    init: drop(Receiving::open(Mechanism::Lease, None, false, false)),
    |bytes: &[u8]| {
        let before = next_descriptor();
        let _ = run(&mut Unstructured::new(bytes));
        assert!(all_are_closed(before), "descriptors stayed open");
    }
);
