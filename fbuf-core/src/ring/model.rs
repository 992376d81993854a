//! The model of a protocol that is in several files, growth: the lane, the board and the marks that run in production,
//! with a queue in the place of the link socket. What `Inbound::take` does is done here in the same order.

use std::{collections::VecDeque, ptr::without_provenance_mut};

use loom::{
    cell::UnsafeCell,
    sync::{Arc, Mutex},
    thread,
};

use crate::{
    receive::held::Held,
    ring::{
        board::{BoardReader, BoardWriter, heap::HeapBoard},
        entry::{Body, LaneFormat, Note},
        lane::heap::HeapLane,
    },
    slot::{Mark, SlotId},
};

/// What stands in the place of a slot's address.
fn address(slot: u32) -> *mut u8 {
    without_provenance_mut(slot as usize + 1)
}

/// How many slots are in the first segment, and how many in all.
const FIRST: u32 = 1;
const ALL: u32 = 2;

/// A sender with one slot grows by one: it announces it, uses it, and then the first one again, if another thread of
/// the receiver has let go of it by then. Every entry names a slot that the receiver knows or learns of from what is in
/// the socket by then; its holder knows where its bytes are; and nothing is written while it is read.
#[test]
fn a_slot_is_known_before_it_is_used() {
    // With up to four preemptions, seconds; with all, more than minutes.
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(4);
    model.check(|| {
        let (mut writer, mut reader) = HeapLane::ends(4, LaneFormat::PLAIN);
        let board = HeapBoard::new(ALL as usize);
        let bytes = Arc::new([UnsafeCell::new(0u8), UnsafeCell::new(0u8)]);
        let announced = Arc::new(Mutex::new(VecDeque::new()));
        let sender = {
            let board = BoardReader::new(board.clone());
            let (bytes, announced) = (bytes.clone(), announced.clone());
            thread::spawn(move || {
                let mut send = |slot: u32, value| {
                    bytes[slot as usize].with_mut(|p| {
                        // SAFETY: it is not lent (invariant 2); loom checks just that.
                        #[allow(unsafe_code)]
                        unsafe {
                            *p = value;
                        }
                    });
                    writer.message(SlotId::new(slot), Body::new(0, 1));
                };
                send(0, 1);
                announced.lock().unwrap().push_back(ALL - FIRST);
                send(1, 2);
                // It does not wait: loom takes no two threads that do.
                if board.is_back(SlotId::new(0), Mark::of(0)) {
                    send(0, 3);
                }
                writer.close(0, None);
            })
        };
        let board = Arc::new(BoardWriter::new(board));
        let held = Arc::new(Held::new(ALL as usize).unwrap());
        held.add(SlotId::new(0), address(0));
        let mut known = FIRST;
        let mut holders = Vec::new();
        for sequence in 0.. {
            let mark = Mark::of(sequence);
            let number = loop {
                let ((number, _), _) = reader.peek::<false>();
                if held.take(number, mark).is_some() {
                    break Some(number as u32);
                }
                match reader.look().expect("an honest sender") {
                    Some(Note { slot: number, .. }) => {
                        if number >= known {
                            for slots in announced.lock().unwrap().drain(..) {
                                (known..known + slots).for_each(|slot| held.add(SlotId::new(slot), address(slot)));
                                known += slots;
                            }
                        }
                        let cell = held.take_patiently(number.into(), mark, &board);
                        assert!(cell.is_ok(), "an honest sender was taken for another");
                        break Some(number);
                    }
                    None if reader.ending().is_some() => break None,
                    None => thread::yield_now(),
                }
            };
            let Some(number) = number else {
                assert!(sequence >= 2, "it ended too early");
                break;
            };
            reader.advance(1);
            let (held, board, bytes) = (held.clone(), board.clone(), bytes.clone());
            let let_go = move || {
                let cell = held.cell(number);
                assert_eq!(cell.bytes(), address(number), "its bytes are sought elsewhere");
                bytes[number as usize].with(|p| {
                    // SAFETY: it is held (invariant 2); loom checks just that.
                    #[allow(unsafe_code)]
                    unsafe {
                        assert_eq!(u64::from(*p), sequence + 1);
                    }
                });
                board.hand_back(SlotId::new(number), mark);
                cell.clear();
            };
            // The first message goes to another thread.
            match sequence {
                0 => holders.push(thread::spawn(let_go)),
                _ => let_go(),
            }
        }
        sender.join().unwrap();
        holders.into_iter().for_each(|holder| holder.join().unwrap());
        assert_eq!(held.count(), 0);
    });
}
