//! What an attacker says of slots and boards that are yet to come, or that are not what it says.

use std::{fs::File, os::fd::OwnedFd};

use ::memfd::{FileSeal, MemfdOptions};
use fbuf_core::{
    limits::{MAX_SEGMENTS, OTHERS_SLOTS},
    protection::Mechanism,
    ring::entry::{LaneFormat, capacity_for},
};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    sys::stat::fstat,
    unistd::ftruncate,
};

use super::*;
use crate::attack::BOARD_SLOTS;

/// As many slots as a receiver accepts of another user, each as small as can be.
const MANY: Role = Role::sender(1, OTHERS_SLOTS, Mechanism::Copy, fbuf_protocol::Slots::Segments);

fn pages(memory: &impl AsFd) -> Result<i64, String> {
    fstat(memory).map(|found| found.st_blocks / 8).map_err(|error| error.to_string())
}

/// A sender that has announced as many slots as it may, and has said hello with a few of them.
struct Growing {
    link: Link,
    board_fd: Descriptor,
    board: BoardReader<BoardView>,
    lane: LaneWriter<LaneTable>,
    _memory: Vec<Map>,
    known: u32,
    next: u64,
}

impl Growing {
    fn begin() -> Result<Self, String> {
        let link = Link::to("c", MANY)?;
        let LinkMessage::Hello(hello) = link.hear()? else { return Err("no hello".into()) };
        let found = pages(&hello.board)?;
        Effect::if_so(found == 1, || {
            format!("{OTHERS_SLOTS} slots were announced, and a board of {found} pages made")
        })?;
        let board = BoardReader::attach_first(hello.board.as_fd(), link.slots, 0).map_err(|end| format!("{end:?}"))?;
        let (lane, lane_fd) = LaneTable::create("fbuf-test", capacity_for(link.slots, LaneFormat::WITH_GAPS)).unwrap();
        let (map, memory) = Map::create("fbuf-test", 4096).unwrap();
        link.say(&welcome(lane_fd.into(), memory.into(), SLOTS))?;
        let (lane, memory) = (LaneWriter::new(lane, LaneFormat::WITH_GAPS), vec![map]);
        Ok(Self { link, board_fd: hello.board, board, lane, _memory: memory, known: SLOTS, next: 0 })
    }

    fn announce(&self, memory: impl Into<Descriptor>, slots: u32) -> Result<(), String> {
        self.link.say(&LinkMessage::Segment(NewSegment { memory: memory.into(), slots }))
    }

    /// Grows as it should.
    fn grow(&mut self, slots: u32) -> Result<(), String> {
        let (map, memory) = Map::create("fbuf-test", geometry().segment_bytes(slots)).unwrap();
        self.announce(memory, slots)?;
        self._memory.push(map);
        self.known += slots;
        Ok(())
    }

    /// Sends a message in its last slot.
    fn is_received(&mut self) -> Seen {
        let slot = SlotId::new(self.known - 1);
        self.board.provide(self.known).map_err(|error| error.to_string())?;
        self.lane.message(slot, 1);
        self.next += 1;
        let mark = Mark::of(self.next - 1);
        look_for("a slot to be handed back", || Ok(self.board.is_back(slot, mark).then_some(())))?;
        Effect::if_so(true, String::new)
    }
}

impl Growing {
    /// What may be on its way is not missed before it can come no more: then it is.
    fn is_waited_for(&self) -> Seen {
        self.link.say(&LinkMessage::Bell)?;
        look_for("the bell to be heard", || Ok((self.link.socket.unread() == 0).then_some(())))?;
        Effect::if_so(!self.link.socket.has_hung_up(), || "the link has ended".into())
    }
}

fn geometry() -> Geometry {
    Geometry::new(1, OTHERS_SLOTS).unwrap()
}

/// Memory that can be sealed, and is with these seals.
fn sealed(size: u64, seals: &[FileSeal]) -> OwnedFd {
    let memory = MemfdOptions::new().allow_sealing(true).create("fbuf-test").unwrap();
    memory.as_file().set_len(size).unwrap();
    memory.add_seals(seals).unwrap();
    memory.into_file().into()
}

const AS_DUE: [FileSeal; 4] = [FileSeal::SealFutureWrite, FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal];
const MAY_SHRINK: [FileSeal; 3] = [FileSeal::SealFutureWrite, FileSeal::SealGrow, FileSeal::SealSeal];

/// Grows as it should, and then announces, or uses, what it must not.
pub fn announce(turn: usize) -> Seen {
    let mut growing = Growing::begin()?;
    let size = |slots| geometry().segment_bytes(slots);
    match turn % 8 {
        0 => growing.announce(memory(&[]), 0)?,
        // One more than were announced.
        1 => growing.announce(memory(&[]), growing.link.slots - SLOTS + 1)?,
        2 => growing.announce(memory(&[]), u32::MAX)?,
        3 => {
            for _ in 1..MAX_SEGMENTS {
                growing.grow(1)?;
            }
            let _received = growing.is_received()?;
            growing.announce(memory(&[]), 1)?;
        }
        4 => growing.announce(Map::create("fbuf-test", size(1000) - 4096).unwrap().1, 1000)?,
        5 => growing.announce(sealed(size(1000), &MAY_SHRINK), 1000)?,
        // A slot that was announced, and does not exist.
        6 => {
            growing.lane.message(SlotId::new(growing.link.slots - 1), 1);
            return growing.is_waited_for();
        }
        _ => {
            growing.grow(4600)?;
            let _received = growing.is_received()?;
            let (found, wanted) = (pages(&growing.board_fd)?, 10);
            Effect::if_so(found == wanted, || format!("the board has {found} pages, not {wanted}"))?;
            growing.lane.message(SlotId::new(growing.known), 1);
            return growing.is_waited_for();
        }
    }
    Effect::hang_up(&growing.link.socket)
}

/// A receiver with a board of its own making.
fn receive_with(board: impl Into<Descriptor>) -> Result<Link, String> {
    let link = Link::to("patient", RECEIVER)?;
    Effect::if_so(link.slots == BOARD_SLOTS as u32, || format!("{} slots", link.slots))?;
    link.say(&hello(board.into(), None))?;
    Ok(link)
}

/// Has the sender grow, on a board that is, or is not, what it says.
pub fn lie_about_board(turn: usize) -> Seen {
    let size = BoardTable::size(BOARD_SLOTS);
    let link = match turn % 6 {
        // Of which nothing exists.
        0 => return grow_sender(sealed(size, &AS_DUE)),
        1 => return shrink(),
        2 => receive_with(sealed(size - 4096, &AS_DUE))?,
        3 => receive_with(sealed(size + 4096, &AS_DUE))?,
        4 => receive_with(sealed(size, &MAY_SHRINK))?,
        _ => {
            let link = receive_with(sealed(size, &AS_DUE))?;
            let LinkMessage::Welcome(_) = link.hear()? else { return Err("no welcome".into()) };
            let new = NewSegment { memory: memory(&[]), slots: 1 };
            link.say(&LinkMessage::Segment(new))?;
            link
        }
    };
    Effect::hang_up(&link.socket)
}

/// Holds all until the sender has as many slots as it may have. Its board exists for each slot by then, by the sender's
/// own doing.
fn grow_sender(board: OwnedFd) -> Seen {
    let copy = board.try_clone().map_err(|error| error.to_string())?;
    let link = receive_with(board)?;
    let LinkMessage::Welcome(welcome) = link.hear()? else { return Err("no welcome".into()) };
    let lane = LaneView::attach(welcome.lane.as_fd(), capacity_for(link.slots, LaneFormat::PLAIN));
    let mut lane = LaneReader::new(lane.map_err(|error| error.to_string())?, LaneFormat::PLAIN);
    for taken in 0..link.slots {
        let what = format!("message {taken}");
        look_for(&what, || Ok(lane.look().map_err(|violation| violation.to_string())?.map(drop)))?;
        lane.advance(1);
    }
    let found = pages(&copy)?;
    let wanted = size_of_board() / 4096;
    Effect::if_so(found == wanted, || format!("the board has {found} pages, not {wanted}"))?;
    Effect::if_so(!link.socket.hung_up(), || "the link was closed".into())
}

fn size_of_board() -> i64 {
    BoardTable::size(BOARD_SLOTS) as i64
}

/// Takes its board away from under the sender, which the kernel does not let it.
fn shrink() -> Seen {
    let board = sealed(size_of_board() as u64, &AS_DUE);
    let own = File::from(board.try_clone().map_err(|error| error.to_string())?);
    let link = receive_with(board)?;
    let LinkMessage::Welcome(_) = link.hear()? else { return Err("no welcome".into()) };
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let tried = [ftruncate(&own, 0), fallocate(&own, hole, 0, size_of_board())];
    Effect::if_so(tried == [Err(Errno::EPERM); 2], || format!("the kernel says {tried:?}"))?;
    Effect::if_so(!link.socket.hung_up(), || "the link was closed".into())
}
