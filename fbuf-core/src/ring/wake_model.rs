//! Loom models of parking: no wake-up is lost, in either direction, with either kind of fence.

use loom::{
    sync::{Arc, Condvar, Mutex},
    thread,
};

use super::{
    board::{BoardReader, BoardWriter, WritableBoard, heap::HeapBoard},
    lane::{WritableLane, heap::HeapLane},
};
use crate::{
    slot::{LaneFormat, Mark, SlotId},
    sync::read_only::ReadOnly,
    wait::{Fencing, Flag},
};

/// The bell: what a socket is in the real program.
#[derive(Clone)]
struct Bell(Arc<(Mutex<bool>, Condvar)>);

impl Bell {
    fn new() -> Self {
        Self(Arc::new((Mutex::new(false), Condvar::new())))
    }
    fn ring(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_one();
    }
    fn wait(&self) {
        let mut rung = self.0.0.lock().unwrap();
        while !*rung {
            rung = self.0.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}

/// Raises, looks again, sleeps. Loom reports a deadlock if a wake-up can be lost.
fn sleep_until(flag: &Flag, bell: &Bell, mut look: impl FnMut() -> bool) {
    while !look() {
        flag.raise();
        assert!(Fencing::Full.before_sleeping());
        let found = look();
        if !found {
            bell.wait();
        }
        flag.lower();
        if found {
            return;
        }
    }
}

fn ring_if_asleep(flag: &Flag, bell: &Bell, fencing: Option<Fencing>) {
    if let Some(fencing) = fencing {
        fencing.after_publishing();
    }
    if ReadOnly::of(flag).read_behind_fence().asleep().is_some() {
        bell.ring();
    }
}

/// The two ways: the publisher fences, or what stands for it; or the flag asks for it.
fn both_ways(model: impl Fn(Option<Fencing>) + Sync + Send + Copy + 'static) {
    for fencing in [Some(Fencing::Asymmetric), None] {
        loom::model(move || model(fencing));
    }
}

/// A receiver that sleeps on an empty lane wakes for every message.
#[test]
fn no_message_is_slept_over() {
    both_ways(|fencing| {
        let (board, bell) = (HeapBoard::new(1), Bell::new());
        if fencing.is_none() {
            board.head().flag.ask_for_fences();
        }
        let (mut writer, mut reader) = HeapLane::ends(2, LaneFormat::PLAIN);
        let sender = {
            let (board, bell) = (board.clone(), bell.clone());
            thread::spawn(move || {
                for length in 0..2 {
                    writer.message(SlotId::new(0), length);
                    ring_if_asleep(&board.head().flag, &bell, fencing);
                }
            })
        };
        for _ in 0..2 {
            sleep_until(&board.head().flag, &bell, || {
                let found = reader.look().expect("an honest sender").is_some();
                if found {
                    reader.advance(1);
                }
                found
            });
        }
        sender.join().unwrap();
    });
}

/// A sender that sleeps on an empty pool wakes when its slot is handed back.
#[test]
fn no_return_is_slept_over() {
    both_ways(|fencing| {
        let (lane, board, bell) = (HeapLane::new(2), HeapBoard::new(1), Bell::new());
        if fencing.is_none() {
            lane.head().flag.ask_for_fences();
        }
        let returned = BoardReader::new(board.clone());
        let receiver = {
            let (lane, bell) = (lane.clone(), bell.clone());
            thread::spawn(move || {
                BoardWriter::new(board).hand_back(SlotId::new(0), Mark::of(4));
                ring_if_asleep(&lane.head().flag, &bell, fencing);
            })
        };
        sleep_until(&lane.head().flag, &bell, || returned.is_back(SlotId::new(0), Mark::of(4)));
        receiver.join().unwrap();
    });
}

/// Whether a receiver that is armed looks again behind the fence.
#[derive(Clone, Copy, PartialEq)]
enum Second {
    Look,
    /// As it must not be: it shows that the model finds wake-ups that are lost.
    LeftOut,
}

/// A receiver that one thread arms, and leaves armed to an event loop that sleeps meanwhile. The two have it in turns, as a lock
/// says; the bell may ring before the one that arms has let go of it. Loom reports a deadlock if a wake-up can be lost.
fn armed_by_another_thread(fencing: Option<Fencing>, second: Second) {
    let (board, bell) = (HeapBoard::new(1), Bell::new());
    if fencing.is_none() {
        board.head().flag.ask_for_fences();
    }
    let (mut writer, reader) = HeapLane::ends(2, LaneFormat::PLAIN);
    let reader = Arc::new(Mutex::new(reader));
    let sender = {
        let (board, bell) = (board.clone(), bell.clone());
        thread::spawn(move || {
            writer.message(SlotId::new(0), 0);
            ring_if_asleep(&board.head().flag, &bell, fencing);
        })
    };
    let arming = {
        let (board, bell, reader) = (board.clone(), bell.clone(), reader.clone());
        thread::spawn(move || {
            let reader = reader.lock().unwrap();
            board.head().flag.raise();
            assert!(Fencing::Full.before_sleeping());
            if second == Second::Look && reader.look().expect("an honest sender").is_some() {
                // It is not armed: the event loop looks at once.
                bell.ring();
            }
        })
    };
    bell.wait();
    let reader = reader.lock().unwrap();
    board.head().flag.lower();
    assert!(reader.look().expect("an honest sender").is_some(), "it was woken for nothing");
    drop(reader);
    sender.join().unwrap();
    arming.join().unwrap();
}

#[test]
fn no_message_is_slept_over_by_an_event_loop() {
    both_ways(|fencing| armed_by_another_thread(fencing, Second::Look));
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_second_look_an_event_loop_sleeps_over_a_message() {
    both_ways(|fencing| armed_by_another_thread(fencing, Second::LeftOut));
}
