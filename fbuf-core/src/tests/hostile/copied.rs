//! What a link over which messages are copied keeps of the memory that it was given.

use crate::ring::entry::{LaneFormat, capacity_for};
use nix::sys::stat::fstat;

use super::*;

/// A receiver that copies, linked with a sender of this user that says this of its memory.
fn linked(user: u32, segments: Vec<NewSegment>) -> Result<Box<Inbound>, LinkEnd> {
    let (own, its) = sockets();
    let process = Credentials { uid: user, ..peer().process };
    let peer = Peer { endpoint: user.into(), process, trusted: false, ..peer() };
    let greeted = Greeted::new(peer, its, geometry(), Mechanism::Copy, slot_source(Mechanism::Copy), None).unwrap();
    let (_lane, lane_fd) = LaneTable::create("fbuf-test", capacity_for(SLOTS, LaneFormat::PLAIN)).unwrap();
    let welcome =
        Welcome { lane: lane_fd.into(), format: LaneFormat::PLAIN, first_sequence: 0, segments, slots: Vec::new() };
    own.send(&wire::encode(&LinkMessage::Welcome(welcome)).unwrap()).unwrap();
    match greeted.look()? {
        Answered::Open(inbound) => Ok(inbound),
        Answered::NotYet(greeted) => panic!("no welcome: {greeted:?}"),
    }
}

fn segment(memory: &OwnedFd) -> NewSegment {
    NewSegment { memory: memory.try_clone().unwrap().into(), slots: 1 }
}

/// A sender may grow often, and a process has few descriptors.
#[test]
fn a_link_over_which_messages_are_copied_keeps_no_descriptor_of_their_memory() {
    let memory: Vec<_> = (0..3).map(|_| Map::create("fbuf-test", 4096).unwrap()).collect();
    let files: Vec<_> = memory.iter().map(|(_, memory)| fstat(memory).unwrap()).collect();
    let link = linked(5, memory.iter().map(|(_, memory)| segment(memory)).collect()).unwrap();
    drop(memory);
    let kept = std::fs::read_dir("/proc/self/fd").unwrap().flatten().filter(|entry| {
        // Those of other tests come and go.
        let found = nix::sys::stat::stat(&entry.path());
        found.is_ok_and(|found| files.iter().any(|file| (file.st_dev, file.st_ino) == (found.st_dev, found.st_ino)))
    });
    assert_eq!(kept.count(), 0);
    drop(link);
}
