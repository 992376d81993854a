//! Writes what the targets begin with: honest messages, each among the steps that its target reads.
//!
//! To be run in `fuzz/` after the formats have changed: `RUSTFLAGS="--cfg fuzzing" cargo run --example seeds`

use std::{
    fs::{self, File},
    path::Path,
};

use fbuf_core::{
    introduced::Introduction,
    protection::{Mechanism, Protection},
    receive::link::SlotSource,
    ring::entry::LaneFormat,
    slot::GeometryTerms,
    socket::{
        link_message::{Hello, LinkMessage, NewSegment, OneShot, Welcome, WriteGrant},
        wire::{self, Descriptor},
    },
};
use fbuf_fuzz::{SLOT_BYTES, SLOTS, link as link_id, peer, secret};
use fbuf_protocol::{
    ControlRequest, ControlResponse, Limits, Mismatch, News, Oldest, Open, Opened, Page, Parcel, PreviousRegistration,
    Refusal, Report, Role, Slots, Unpaired, Wire,
};
use serde::Serialize;
use tarpc::{ClientMessage, Request, Response, ServerError, context};

const CAMERAS: &str = r#"[[rule]]
name = "cameras"
users = ["root", 1001]
groups = [44]
send = ["camera/*"]
receive = ["camera/*", "status"]
trusted = true

[rule.quota]
bytes = "1GiB"
slots = 65536
channels = 100
links = 1000
connections = 16
descriptors = 256
requests_per_second = 1000
"#;
const EVERYBODY: &str = r#"[[rule]]
users = ["*"]
receive = ["status", "c[a-z]m/**/?"]
quota = { bytes = "1.5 MB", links = 3 }
[[rule]]
groups = ["root"]
send = ["*"]
"#;
const UNKNOWN: &str = "[[rule]]\nusers = [\"no-such-user\"]\n";

fn any() -> Descriptor {
    Descriptor::from(std::os::fd::OwnedFd::from(File::open("/dev/null").expect("it is always there")))
}

fn bytes_of(message: &impl Serialize) -> Vec<u8> {
    wire::encode(message).expect("it is short").bytes
}

fn write(target: &str, name: &str, parts: &[&[u8]]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    fs::create_dir_all(&path).expect("this is where the seeds are");
    fs::write(path.join(name), parts.concat()).expect("this is where the seeds are");
}

/// A question, and the policy that it is about.
fn policy(name: &str, user: u32, group: u32, channel: &str, text: &str) {
    let (user, group, length) = (user.to_le_bytes(), group.to_le_bytes(), [channel.len() as u8]);
    write("policy", name, &[&user, &group, &length, channel.as_bytes(), text.as_bytes()]);
}

/// A step of `control` in which a client of this number says something, or in which (7) a broker does.
fn said(kind: u8, client: u8, descriptors: u8, message: impl Parcel) -> Vec<u8> {
    let bytes = bytes_of(&message.pack());
    [&[kind, client, descriptors, bytes.len() as u8], &bytes[..]].concat()
}

fn request(client: u8, message: ControlRequest) -> Vec<u8> {
    said(6, client, 0, ClientMessage::Request(Request { context: context::current(), id: 7, message }))
}

/// What is told of an endpoint with this secret and one link.
fn earlier(number: u8) -> PreviousRegistration {
    PreviousRegistration { secret: secret(number), links: vec![link_id(1)] }
}

fn open(client: u8, endpoint: u64, role: Role, earlier: Option<PreviousRegistration>) -> Vec<u8> {
    request(
        client,
        ControlRequest::Open { endpoint, open: Open { channel: "a".into(), role, label: None, users: None, earlier } },
    )
}

fn answer(descriptors: u8, message: Result<ControlResponse, ServerError>) -> Vec<u8> {
    said(7, 0, descriptors, Response { request_id: 7, message })
}

fn control() {
    let (own, trusted) = ([0, 0, 0], [0, 0, 2]);
    let sender = |mechanism, slots| Role::sender(100, 4, mechanism, slots);
    let receiver = |require| Role::Receiver { require, accepts: Limits::DEFAULT };
    let (plain, leased) =
        (sender(Mechanism::Shared, Slots::Segments), sender(Mechanism::Lease, Slots::Broker { huge: false }));
    let sends = open(0, 1, plain, None);
    let receives = open(1, 2, receiver(Protection::Volatile), None);
    write("control", "introduction", &[&own, &own, &sends, &receives, &[2, 0, 1], &[1, 1]]);
    let (sends, receives) = (open(0, 1, leased, None), open(1, 2, receiver(Protection::Leased), None));
    let fetch = request(1, ControlRequest::News { receipt: 7 });
    write("control", "lease", &[&own, &trusted, &sends, &receives, &fetch, &[3, 0, 5, 0, 0, 0, 0, 0, 0, 0]]);
    let sends = open(0, 1, sender(Mechanism::Lease, Slots::Sender), Some(earlier(7)));
    let receives = open(1, 2, receiver(Protection::Sealed), Some(earlier(8)));
    let close = request(0, ControlRequest::Close { endpoint: 1, last: Report::default() });
    write("control", "resumption", &[&trusted, &own, &sends, &receives, &close]);
    let oldest = Some(Oldest { sequence: 3, behind: 1, milliseconds: 20 });
    let page = [(2, Report { held: 1, oldest, ..Report::default() })];
    let reports = Page::split(&page).next().expect("one");
    let (report, status) = (ControlRequest::Report { reports, last: true }, ControlRequest::Status { behind: 0 });
    let opened = open(0, 2, receiver(Protection::Volatile), None);
    write("control", "status", &[&own, &opened, &request(0, report), &request(0, status)]);
    let clients = request(1, ControlRequest::Clients { behind: 0 });
    write("control", "clients", &[&own, &trusted, &own, &opened, &clients]);
    let apart = request(0, ControlRequest::Unpaired { endpoint: 2, behind: 0 });
    let (sends, receives) = (open(0, 1, plain, None), open(1, 2, receiver(Protection::Sealed), None));
    write("control", "unpaired", &[&own, &trusted, &receives, &sends, &apart, &clients]);
    let introduction = |slot_source| Introduction {
        endpoint: 1,
        peer: peer(true, true),
        geometry: GeometryTerms::new(100, 4),
        mechanism: Mechanism::Lease,
        slot_source,
        socket: any(),
    };
    let lodgings = [
        SlotSource::Segments,
        SlotSource::FromBroker(vec![any(), any()]),
        SlotSource::FromReceiver,
        SlotSource::FromSender,
    ];
    let news =
        ControlResponse::News(News { introductions: lodgings.map(introduction).into(), report: true, receipt: 7 });
    let opened = ControlResponse::Open(Ok(Opened { endpoint: 3, secret: secret(3), slots: vec![any(), any()] }));
    let refused = ControlResponse::Open(Err(Wire(Refusal::OneReceiver { sender: peer(false, false) })));
    let failed = ServerError::new(std::io::ErrorKind::Other, "late".into());
    let why = Mismatch::SlotSize { found: 100, accepted: 64 };
    let unpaired = ControlResponse::Unpaired(vec![(3, Wire(Unpaired::new(peer(false, false), true, why)))]);
    let answers = [
        answer(0, Ok(unpaired)),
        answer(6, Ok(news)),
        answer(2, Ok(opened)),
        answer(0, Ok(refused)),
        answer(0, Err(failed)),
    ];
    write("control", "answers", &[&answers.concat()]);
}

/// What is sent over the socket, with descriptors of these kinds and sizes, and looked at.
fn packet(descriptors: &[[u8; 2]], message: &LinkMessage) -> Vec<u8> {
    let bytes = bytes_of(message);
    [&[3, descriptors.len() as u8], &descriptors.concat()[..], &[bytes.len() as u8 - 1], &bytes, &[1]].concat()
}

fn link() {
    let (lane, segment, board, room, shot) = ([11, 0], [9, 0], [13, 0], [14, 0], [6, 0]);
    let bell = packet(&[], &LinkMessage::Bell);
    let welcome = |segments, slots| {
        LinkMessage::Welcome(Welcome { lane: any(), format: LaneFormat::PLAIN, first_sequence: 0, segments, slots })
    };
    let new = |slots| NewSegment { memory: any(), slots };
    let hello = LinkMessage::Hello(Hello { board: any(), skip_above: Some(1), fences: false, wants_slots: true });
    // A receiver: by which means, where the slots are, of the same user, not skipped, open already with all slots.
    let receiver = |mechanism, lodged, open| [&[1, mechanism, lodged, 1, 0, open], &[4][..usize::from(open)]].concat();
    let entry = [0, 1, 0, 0, 50, 1];
    let greeted = packet(&[lane, segment], &welcome(vec![new(SLOTS)], Vec::new()));
    write("link", "welcome", &[&receiver(0, 0, 0), &greeted, &bell]);
    let greeted = packet(&[lane, room, room, room, room], &welcome(Vec::new(), vec![any(), any(), any(), any()]));
    write("link", "handed-over", &[&receiver(1, 3, 0), &greeted, &bell]);
    let grown = packet(&[[5, 0]], &LinkMessage::Segment(new(2)));
    write("link", "segment", &[&receiver(1, 0, 1), &entry, &grown, &entry]);
    let one_shot = packet(&[shot], &LinkMessage::OneShot(OneShot { memory: any(), sequence: 0 }));
    write("link", "one-shot", &[&receiver(3, 0, 1), &one_shot, &entry]);
    write("link", "lease", &[&receiver(2, 1, 1), &entry, &[2, 0], &entry]);
    // A sender: of which slots, to the same user, and then either what was said or that nothing was yet.
    let sender = |pool, open| [0, pool, 1, 0, 0, 0, open];
    let send = [1, 0, 0, 1];
    write("link", "hello", &[&sender(0, 0), &packet(&[board], &hello), &[1, 1], &bell]);
    let right = |slot, reader| LinkMessage::WriteGrant(WriteGrant { slot, writer: any(), reader });
    let (first, again) = (packet(&[[7, 0], [8, 0]], &right(0, Some(any()))), packet(&[[7, 0]], &right(0, None)));
    write("link", "right", &[&sender(3, 1), &first, &send, &again, &send]);
    write("link", "bell", &[&sender(1, 1), &send, &bell, &send]);
}

fn lane() {
    // What comes next, of which kind, which slot, how long; then it is taken, and whether more than one waits is asked.
    let entry = |slot: u8| [1, 2, slot, SLOT_BYTES as u8, 1, 1];
    let taken = [0, 8, 1, 1];
    let drop = [0, 6, 0, 0, 1];
    for (name, mechanism) in [("shared", 0), ("copied", 1), ("leased", 2)] {
        write("lane", name, &[&[0, 1, mechanism, 0, 0], &entry(0), &entry(1), &drop, &entry(0), &taken]);
    }
    let round = [0, 5, 1, 0];
    write("lane", "tagged", &[&[0, 1, 0, 1, 0], &entry(0), &round, &entry(1), &taken]);
    write("lane", "timed", &[&[0, 1, 1, 1, 1], &entry(0), &entry(1), &taken]);
    write("lane", "one-shot", &[&[0, 1, 3, 0, 0], &[0, 7, 2, 0, 1], &entry(2), &taken]);
    let gap = [&[1, 1, 1, 0][..], &3u64.to_le_bytes(), &[1, 1]].concat();
    let behind = [2, 2, 1, SLOT_BYTES as u8, 1, 1];
    write("lane", "skipping", &[&[3, 1, 0, 0, 0], &gap, &behind, &taken]);
    // Allocates all and sends one; what was sent comes back; is kept and written again; the receiver leaves.
    let (send, back, keep) = ([8, 1, 1, 0], [1, 0, 0, 1, 1, 1], [8, 1, 1, 1]);
    let leave = [&[4, 2][..], &1u64.to_le_bytes(), &[1, 1, 0]].concat();
    write("lane", "board", &[&[0, 0, 0], &send, &send, &back, &keep, &[6, 1, 1, 0], &leave]);
    write("lane", "board-skipping", &[&[3, 0, 1], &send, &send, &send, &send, &back, &[7, 1, 0, 0], &leave]);
}

/// Histories of a broker with a client of each of four users: root, one with few links, one that all trust, and one more.
fn broker() {
    let join = [0, 0, 0, 1, 0, 2, 0, 3];
    let open = |client, endpoint, role: &[u8]| [&[15, client, endpoint, 0][..], role, &[1, 0]].concat();
    let receiver = |client, endpoint| open(client, endpoint, &[1, 0, 0]);
    let sender = |client, endpoint, mechanism, slots| open(client, endpoint, &[0, 0, 3, mechanism, slots]);
    let (settle, leave, unread) = ([8, 0], |client| [1, client], |client| [4, client]);
    let many = |client| (0..8).flat_map(|endpoint| receiver(client, endpoint)).collect::<Vec<_>>();
    write("broker", "quota", &[&join, &many(1), &sender(0, 0, 1, 0), &settle, &[2, 1, 0], &settle]);
    let exhausted = [5, 0, 1];
    write("broker", "exhausted", &[&join, &receiver(1, 0), &exhausted, &sender(0, 0, 1, 0), &[7, 0, 1], &settle]);
    let from = sender(0, 0, 2, 3);
    write("broker", "from-receiver", &[&join, &receiver(2, 0), &receiver(2, 1), &from, &[2, 2, 0], &settle]);
    write("broker", "unread", &[&join, &many(3), &sender(2, 0, 1, 0), &unread(3), &[7, 0, 3], &settle, &leave(3)]);
    let restart = [9, 0, 0, 1];
    write("broker", "restart", &[&join, &receiver(2, 0), &sender(3, 0, 1, 0), &restart, &[9, 2, 1, 0], &settle]);
}

fn growth() {
    // A receiver of volatile messages, with one segment of 211 slots: takes the last, is told of more, takes the last.
    let (grow, last) = ([0, 6, 9, 1], [4, 3, 0]);
    write("growth", "receiver", &[&[1, 0, 1, 3, 9], &last, &grow, &last, &[3, 0], &last]);
    write("growth", "unsuitable", &[&[1, 1, 1, 3, 9], &last, &[0, 5, 1, 1]]);
    write("growth", "beyond", &[&[1, 0, 1, 3, 9], &[4, 2, 0]]);
    // A sender, to a board in order: sends all it can, grows, sends again; and to one without pages.
    let (send, more) = ([1, 1, 144], [0]);
    for (name, board) in [("sender", 7), ("sparse", 4), ("short", 1)] {
        write("growth", name, &[&[0, board, 1], &send, &more, &send, &more, &send, &[6, 1]]);
    }
}

fn main() {
    policy("cameras", 1001, 44, "camera/1", CAMERAS);
    policy("everybody", 8, 8, "status", EVERYBODY);
    policy("nobody", 0, 0, "x", "");
    policy("unknown", 0, 0, "x", UNKNOWN);
    control();
    link();
    lane();
    broker();
    growth();
}
