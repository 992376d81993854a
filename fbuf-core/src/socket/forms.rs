//! How public types cross a socket. They implement no traits of serde, so that what a program sees is apart from the wire:
//! a form has the fields of its type in the order in which they are sent, and the compiler compares the two (`remote` of
//! serde). Another order, or a field more, is another version of the protocol.

use serde::{Deserialize, Serialize};

use crate::{peer, protection};

/// That of a [`peer::Peer`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "peer::Peer")]
pub struct Peer {
    endpoint: u64,
    #[serde(with = "Credentials")]
    process: peer::Credentials,
    same_user: bool,
    trusted: bool,
    #[serde(with = "LinkId")]
    link: peer::LinkId,
}

/// That of [`peer::Credentials`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "peer::Credentials")]
pub struct Credentials {
    pid: i32,
    uid: u32,
    gid: u32,
}

/// That of a [`peer::LinkId`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "peer::LinkId")]
pub struct LinkId(u64);

/// That of a [`protection::Protection`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "protection::Protection")]
pub enum Protection {
    Volatile,
    Leased,
    Sealed,
}

/// That of a [`protection::Mechanism`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "protection::Mechanism")]
pub enum Mechanism {
    Shared,
    Copy,
    Lease,
    OneShot,
}
