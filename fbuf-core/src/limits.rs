//! Every bound that a peer or a user can run into, by name.

use std::time::Duration;

/// The largest slot, in bytes: 1 GiB.
pub const MAX_SLOT_BYTES: u32 = 1 << 30;
/// The most slots that one sender may have, over all its segments.
pub const MAX_SLOTS: u32 = 1 << 20;
/// The most messages under way that carry a descriptor each: they have to find room on a socket.
pub const MAX_ONE_SHOTS: u32 = 128;
/// The most slots of a sender of leased messages: each is a descriptor in every process.
pub const MAX_LEASED: u32 = 32;
/// The most segments that one sender may have: the first one, and one for each growth.
pub const MAX_SEGMENTS: usize = 24;
/// The number beyond that of any message: at a thousand million a second, they last a century.
pub const MAX_SEQUENCE: u64 = 1 << 62;
/// The longest channel name, in bytes.
pub const MAX_CHANNEL_NAME: usize = 255;
/// The longest label of an endpoint, in bytes.
pub const MAX_LABEL: usize = 64;
/// The longest name of a program, in bytes: as much as the kernel keeps (TASK_COMM_LEN).
pub const MAX_PROGRAM: usize = 16;
/// The longest message on a control or link socket, in bytes.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// The most descriptors that one message may carry (the kernel's own limit is 253).
pub const MAX_DESCRIPTORS: usize = 64;
/// Slots begin at multiples of this many bytes at least: one cache line.
pub const SLOT_ALIGNMENT: u64 = 64;
/// The most that can be asked for: one page, since a segment begins at one.
pub const MAX_ALIGNMENT: u64 = 4096;
/// The largest user header of a slot, in bytes.
pub const MAX_HEADER_BYTES: u64 = 64;
/// The most endpoints that one client may have open at the broker.
pub const MAX_ENDPOINTS: usize = 4096;
/// The most senders of one channel, and the most receivers; and so the most links of one endpoint.
pub const MAX_LINKS: usize = 1024;
/// The most senders, or receivers, that one user may have on a channel, if the broker serves others as well. Each may
/// cost each end of the other kind memory and descriptors.
pub const MAX_ENDS_OF_USER: usize = MAX_LINKS / 8;
/// The last of the senders, or receivers, of a channel are root's.
pub const ENDS_OF_ROOT: usize = 16;
/// The most users that an endpoint may name as its only peers.
pub const MAX_PEER_USERS: usize = 256;
/// The largest slots of another user's sender that a receiver accepts which does not say more, in bytes: 4 MiB.
pub const OTHERS_SLOT_BYTES: u64 = 4 << 20;
/// The most slots of such a sender.
pub const OTHERS_SLOTS: u64 = 1 << 16;
/// The most departed links that a sender remembers until it is asked about them.
pub const MAX_DEPARTURES: usize = 64;
/// The most reports of senders (`GetError`) that a receiver remembers until a call tells them: one for each link that it may have.
pub const MAX_REPORTS: usize = MAX_LINKS;
/// The send buffer of each socket, in bytes as the kernel counts them: its default (net.core.wmem_default), and enough for
/// all that an honest peer can have waiting there while the other side is stopped.
pub const SEND_BUFFER: usize = 212_992;
/// What one message that carries a descriptor takes of a send buffer at most; 768 bytes were measured.
pub(crate) const MESSAGE_COST: usize = 1280;
/// How many messages one look at a link socket reads: more than an honest peer ever has waiting there, which is one
/// announcement for each segment, one bell for each sleep, and messages of their own or the right to write a slot.
pub const MAX_AT_ONCE: usize = 2 * MAX_SEGMENTS + MAX_ONE_SHOTS as usize;
/// In how many groups a client may be, beside its first one. A user that may map ids can be in as many as the kernel has room
/// for (65,536), each of which a broker would have to be told, and to keep, for each connection.
pub const MAX_GROUPS: usize = 4096;
/// How long a client has for its greeting.
pub const GREETING_TIME: Duration = Duration::from_secs(5);
/// How many requests of one client may be under way; our own client has at most seven.
pub const MAX_REQUESTS: usize = 8;
/// How many answers wait for room in a client's socket before no more of its requests are read.
pub const MAX_ANSWERS: usize = 4;
/// How many descriptors a broker holds ready for one client, and has on their way to it, before it waits with further
/// introductions until the client has read some: all clients together cannot take all that it may open.
pub const MAX_WAITING: usize = 96;

const _: () = assert!(
    MAX_LINKS * 10 + MAX_PEER_USERS * 5 + MAX_CHANNEL_NAME + MAX_LABEL + 256 <= MAX_MESSAGE,
    "links and users that are told to the next broker"
);
const _: () = assert!((MAX_ONE_SHOTS as usize + MAX_SEGMENTS + 2) * MESSAGE_COST <= SEND_BUFFER);
const _: () = assert!(MAX_SEGMENTS + 2 <= MAX_DESCRIPTORS && (MAX_LEASED as usize) < MAX_DESCRIPTORS);
