//! Memory that another user made, and that takes long to free: its maker sets attributes on it for as long as it is there.
#![allow(unsafe_code)]

use std::{fs, os::fd::AsRawFd, sync::mpsc, thread};

use super::*;
use crate::process::{
    deferred::{Cause, drop_deferred},
    foreign::Foreign,
};

/// Says which thread drops it.
#[derive(Debug)]
struct Witness(mpsc::SyncSender<thread::ThreadId>);

impl Drop for Witness {
    fn drop(&mut self) {
        let _ = self.0.send(thread::current().id());
    }
}

/// Waits, when it is dropped, until it may be.
struct Held(mpsc::Receiver<()>);

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.recv();
    }
}

/// Whether the kernel takes so many attributes.
fn mark(memory: &OwnedFd, count: u32) -> bool {
    (0..count).all(|number| {
        let name = std::ffi::CString::new(format!("user.{number:08}")).unwrap();
        // SAFETY: the name ends with a zero, and there is no value.
        unsafe { libc::fsetxattr(memory.as_raw_fd(), name.as_ptr(), std::ptr::null(), 0, 0) == 0 }
    })
}

#[test]
fn memory_with_attributes_is_closed_by_another_thread() {
    for (count, is_closed_here) in [(0, true), (1, true), (100, false)] {
        let memory = Kind::Sealed(4096).make();
        if !mark(&memory, count) {
            return println!("not tested: this kernel has no attributes of memory (before 6.6)");
        }
        for is_light in [false, true] {
            let (say, said) = mpsc::sync_channel(1);
            let foreign = Foreign::from(memory.try_clone().unwrap()).with(Witness(say));
            drop(if is_light { foreign.of_bytes(4096) } else { foreign });
            let thread = said.recv().unwrap();
            assert_eq!(thread == thread::current().id(), is_closed_here, "{count} attributes");
        }
    }
}

/// Whether a memfd of this name is mapped.
fn is_mapped(name: &str) -> bool {
    fs::read_to_string("/proc/self/maps").unwrap().contains(&format!("/memfd:{name} "))
}

/// Drops what has memory of these names mapped that this user made, while the thread for that user has something else to drop.
fn drop_beside(user: u32, names: &[&str], what: impl Sized) {
    let (go, gone) = mpsc::channel();
    drop_deferred(Cause::Peer(Some(user)), Held(gone));
    drop(what);
    for name in names {
        assert!(is_mapped(name), "the thread that drops a link frees {name}, which another user made");
    }
    drop(go);
    while names.iter().any(|name| is_mapped(name)) {
        thread::yield_now();
    }
}

#[test]
fn memory_of_a_link_that_another_user_made_is_unmapped_by_the_thread_for_that_user() {
    let user = 4_100_000_001;
    let peer = Peer { process: Credentials { uid: user, ..peer().process }, ..peer() };
    let made = |name| Map::create(name, geometry().segment_bytes(2)).unwrap().1;
    for (mechanism, segment) in [(Mechanism::Shared, "fbuf-read"), (Mechanism::Copy, "fbuf-copied")] {
        let (own, its) = sockets();
        let greeted = Greeted::new(peer, its, geometry(), mechanism, slot_source(mechanism), None).unwrap();
        let (_, lane) = LaneTable::create("fbuf-its-lane", capacity_for(SLOTS, LaneFormat::PLAIN)).unwrap();
        let segments = vec![NewSegment { memory: made(segment).into(), slots: 2 }];
        let welcome =
            Welcome { lane: lane.into(), format: LaneFormat::PLAIN, first_sequence: 0, segments, slots: Vec::new() };
        own.send(&wire::encode(&LinkMessage::Welcome(welcome)).unwrap()).unwrap();
        let Ok(Answered::Open(inbound)) = greeted.look() else { panic!("an honest welcome was refused") };
        drop_beside(user, &["fbuf-its-lane", segment], inbound);
    }
    let (own, its) = sockets();
    let mut pool = Pool::new(geometry(), SLOTS, Arc::new(EventFd::new().unwrap())).unwrap();
    let (_, board) = BoardTable::create("fbuf-its-board", SLOTS as usize).unwrap();
    let hello = Hello { board: board.into(), skip_above: None, fences: false, wants_slots: false };
    own.send(&wire::encode(&LinkMessage::Hello(hello)).unwrap()).unwrap();
    let Ok(Arrived::Here) = pool.link(Expected::new(peer, its)) else { panic!("an honest hello was refused") };
    drop_beside(user, &["fbuf-its-board"], pool);
}
