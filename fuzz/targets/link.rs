//! Feeds any bytes, beside descriptors of several kinds, over a real socket to both halves of a link, before it is
//! open and afterwards, while they go on with what they do. What comes out is messages inside their slots, nothing,
//! or a violation that ends the link; nothing panics, no more than is bounded is kept, and nothing stays open.
#![no_main]

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::atomic::Ordering,
};

use arbitrary::{Result, Unstructured};
use fbuf_core::{
    limits::{MAX_LEASED, MAX_SEGMENTS},
    memory::Map,
    protection::Mechanism,
    receive::{
        link::{Answered, Greeted, Inbound},
        received::Received,
    },
    ring::{
        board::BoardTable,
        entry::{LaneFormat, capacity_for},
        lane::LaneTable,
    },
    send::{
        fbuf::Fbuf,
        link::{Arrived, Expected},
        pool::{Pool, Unsent},
    },
    socket::{
        PacketSocket,
        link_message::{Hello, LinkEnd, LinkMessage, Welcome},
        wire::{self, Letter},
    },
    violation::Violation,
};
use fbuf_fuzz::{
    SLOT_BYTES, SLOTS, all_are_closed, answer, content, descriptor, geometry, greet, head_of, introduced, leased,
    lodged, next_descriptor, peer, pool, rooms, segments, slot_source, wake,
};
use libfuzzer_sys::fuzz_target;

/// More than one half of a link, and its peer here, can have open at a time.
const MOST_DESCRIPTORS: i32 = 4 * MAX_LEASED as i32 + MAX_SEGMENTS as i32;

/// The half that is tried, as far as it is.
enum Half {
    Greeted(Greeted),
    Receiving(Box<Inbound>, Vec<Received>),
    Expected(Expected, Pool),
    Sending(Box<Pool>, Vec<Fbuf>),
    Over,
}

/// What its peer has, if the link was opened in order.
struct Hostile {
    socket: PacketSocket,
    lane: Option<LaneTable>,
    board: Option<BoardTable>,
}

impl Half {
    fn receiver(input: &mut Unstructured) -> Result<(Self, Hostile)> {
        let mechanism = *input.choose(&[Mechanism::Shared, Mechanism::Copy, Mechanism::Lease, Mechanism::OneShot])?;
        let (choice, same_user, skip_above) = (input.int_in_range(0..=3)?, input.arbitrary()?, input.arbitrary()?);
        let lodged = lodged(mechanism, choice);
        let peer = peer(same_user, input.arbitrary()?);
        let (introduced, socket) = introduced(peer, geometry(), mechanism, slot_source(lodged));
        let greeted = greet(introduced, skip_above);
        if !input.arbitrary()? {
            return Ok((Self::Greeted(greeted), Hostile { socket, lane: None, board: None }));
        }
        let format = LaneFormat { gaps: skip_above.is_some(), ..LaneFormat::PLAIN };
        let capacity = capacity_for(SLOTS, format);
        let (lane, descriptor) = LaneTable::create("fbuf-fuzz", capacity).expect("there is memory");
        // As a sender has them that begins with half of its slots.
        let segments = if lodged == 0 && mechanism != Mechanism::OneShot {
            pool(SLOTS / 2).announce(0).collect()
        } else {
            Vec::new()
        };
        let mut slots = if lodged == 3 { rooms() } else { Vec::new() };
        slots.truncate(input.int_in_range(0..=SLOTS as usize)?);
        let all = lodged != 3 || slots.len() == SLOTS as usize;
        let welcome = Welcome { lane: descriptor.into(), format, first_sequence: 0, segments, slots };
        say(&socket, &LinkMessage::Welcome(welcome));
        let half = Self::Greeted(greeted).attend();
        assert_eq!(matches!(half, Self::Receiving(..)), all, "it is open with all slots, and only with all");
        Ok((half, Hostile { socket, lane: Some(lane), board: None }))
    }

    fn sender(input: &mut Unstructured) -> Result<(Self, Hostile)> {
        let mut pool = match input.int_in_range(0..=3)? {
            0 => pool(SLOTS),
            1 => Pool::of_one_shots(geometry(), SLOTS, wake()).expect("there is memory"),
            2 => leased(),
            _ => Pool::of_receiver(geometry(), wake()).expect("there is memory"),
        };
        let peer = peer(input.arbitrary()?, input.arbitrary()?);
        let (introduced, socket) = introduced(peer, geometry(), Mechanism::Shared, slot_source(0));
        let expected = introduced.expect();
        let (skip_above, fences, wants_slots) = input.arbitrary()?;
        if !input.arbitrary()? {
            return Ok((Self::Expected(expected, pool), Hostile { socket, lane: None, board: None }));
        }
        let (board, descriptor) = BoardTable::create("fbuf-fuzz", SLOTS as usize).expect("there is memory");
        say(&socket, &LinkMessage::Hello(Hello { board: descriptor.into(), skip_above, fences, wants_slots }));
        let refused = pool.is_receivers() && !peer.same_user && !peer.trusted;
        match answer(&mut pool, expected) {
            Ok(Arrived::Here) if !refused => {}
            Err(LinkEnd::Violation(Violation::UntrustedReceiver)) if refused => {
                return Ok((Self::Over, Hostile { socket, lane: None, board: Some(board) }));
            }
            other => panic!("an honest hello, of a receiver that is refused or not ({refused}): {other:?}"),
        }
        let sending = Self::Sending(Box::new(pool), Vec::new());
        Ok((sending, Hostile { socket, lane: None, board: Some(board) }))
    }

    /// Looks what has come.
    fn attend(self) -> Self {
        match self {
            Self::Greeted(greeted) => match greeted.look() {
                Ok(Answered::Open(inbound)) => Self::Receiving(inbound, Vec::new()),
                Ok(Answered::NotYet(greeted)) => Self::Greeted(*greeted),
                Err(end) => over(&end),
            },
            Self::Receiving(mut inbound, mut held) => {
                inbound.attend();
                while let Some(received) = inbound.take() {
                    assert!(
                        received.len() <= SLOT_BYTES as usize
                            && received.iter().all(|&byte| byte <= content(SLOTS - 1))
                    );
                    held.push(received);
                    assert!(held.len() <= SLOTS as usize);
                }
                assert!(inbound.settle());
                match inbound.is_over().then(|| inbound.end()) {
                    Some(Err(end)) => over(&end),
                    Some(Ok(_)) => Self::Over,
                    None => Self::Receiving(inbound, held),
                }
            }
            Self::Expected(expected, mut pool) => match answer(&mut pool, expected) {
                Ok(Arrived::Here) => Self::Sending(Box::new(pool), Vec::new()),
                Ok(Arrived::NotYet(expected)) => Self::Expected(expected, pool),
                Err(end) => over(&end),
            },
            Self::Sending(mut pool, fbufs) => match pool.attend(0) {
                Ok(()) => Self::Sending(pool, fbufs),
                Err(end) => over(&end),
            },
            Self::Over => Self::Over,
        }
    }

    /// Allocates all that is free, fills it and sends one.
    fn send(&mut self) {
        let Self::Sending(pool, fbufs) = self else { return };
        while (pool.collect(64) || pool.search())
            && pool.collect(64)
            && let Some(mut fbuf) = pool.allocate()
        {
            fbuf.set_len(SLOT_BYTES as usize).expect("it is that large");
            fbuf.fill(1);
            fbufs.push(fbuf);
            assert!(fbufs.len() <= SLOTS as usize);
        }
        let Some(fbuf) = fbufs.pop() else { return };
        match pool.send(fbuf) {
            Ok(_) | Err(Unsent::NoReceiver(_)) => {}
            Err(unsent) => panic!("{unsent:?}"),
        }
    }
}

/// The end of a link, for which there is a reason that its peer has given.
fn over(end: &LinkEnd) -> Half {
    assert!(matches!(end, LinkEnd::Violation(_)), "{end:?}, and the peer is there");
    Half::Over
}

fn say(socket: &PacketSocket, message: &LinkMessage) {
    socket.send(&wire::encode(message).expect("it is short")).expect("it is there");
}

/// A descriptor of some kind, and of a size that may be the one that was due.
fn any_descriptor(input: &mut Unstructured, hostile: &Hostile) -> Result<OwnedFd> {
    let kind: u8 = input.arbitrary()?;
    let segment = geometry().segment_bytes(SLOTS);
    let size = *input.choose(&[segment, 2 * segment, segment + 1])?;
    Ok(match kind % 16 {
        // The segments of another sender.
        9 | 10 => segments().remove(0).memory.into_owned().expect("few descriptors are open"),
        // As a lane or a board has to be.
        11 | 12 => {
            Map::create("fbuf-fuzz", LaneTable::size(capacity_for(SLOTS, LaneFormat::WITH_GAPS)))
                .expect("there is memory")
                .1
        }
        13 => Map::create("fbuf-fuzz", BoardTable::size(SLOTS as usize)).expect("there is memory").1,
        14 => rooms().remove(0).into_owned().expect("few descriptors are open"),
        // The peer's end of the link socket, which then never hangs up.
        15 => hostile.socket.as_fd().try_clone_to_owned().expect("few descriptors are open"),
        kind => descriptor(kind, size),
    })
}

fn step(half: &mut Half, hostile: &Hostile, input: &mut Unstructured, sequence: &mut u64) -> Result<()> {
    match input.int_in_range(0..=5)? {
        0 => {
            if let Some(lane) = &hostile.lane {
                let position = *sequence + input.int_in_range(0..=3)?;
                let head = head_of(position, input.int_in_range(0..=1)?, input.int_in_range(0..=4)?);
                lane.at(position as usize).scribble(head, input.int_in_range(0..=101)?);
                *sequence += 1;
            }
        }
        1 => {
            if let Some(board) = &hostile.board {
                let word = *sequence + input.int_in_range(0..=3)?;
                board.at(input.int_in_range(0..=3)?).store(word, Ordering::Release);
            }
            half.send();
            *sequence += 1;
        }
        2 => match half {
            Half::Receiving(_, held) => drop(held.pop()),
            Half::Sending(_, fbufs) => drop(fbufs.pop()),
            _ => {}
        },
        _ => {
            let count = input.int_in_range(0..=5)?;
            let descriptors = (0..count).map(|_| Ok(any_descriptor(input, hostile)?.into())).collect::<Result<_>>()?;
            let length = input.int_in_range(1..=64)?;
            let letter = Letter { bytes: input.bytes(length)?.to_vec(), descriptors };
            // The half may have hung up already, or read nothing for long.
            let _ = hostile.socket.send(&letter);
        }
    }
    if input.arbitrary()? {
        *half = std::mem::replace(half, Half::Over).attend();
    }
    Ok(())
}

fn run(input: &mut Unstructured) -> Result<()> {
    let before = next_descriptor();
    let (mut half, hostile) = if input.arbitrary()? { Half::receiver(input)? } else { Half::sender(input)? };
    let mut sequence = 0;
    while !input.is_empty() && !matches!(half, Half::Over) {
        step(&mut half, &hostile, input, &mut sequence)?;
        assert!(next_descriptor() < before + MOST_DESCRIPTORS, "more and more descriptors are kept");
    }
    half.attend();
    Ok(())
}

fuzz_target!(
    // What a process makes once for all links of its is made.
    init: drop(Half::receiver(&mut Unstructured::new(&[2, 1, 1, 0, 1]))),
    |bytes: &[u8]| {
        let before = next_descriptor();
        let _ = run(&mut Unstructured::new(bytes));
        assert!(all_are_closed(before), "descriptors stayed open");
    }
);
