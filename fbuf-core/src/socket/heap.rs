//! Where Miri runs this, which knows no SOCK_SEQPACKET and passes no descriptors: a connection is two queues.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
};

use super::Arrival;
use crate::{memory::heap::Named, process::foreign::Foreign, socket::wire::Descriptor};

/// That the rest of `PacketSocket` is code for the compiler.
pub(super) const IS_USED: bool = true;

/// What one end has yet to receive.
#[derive(Debug, Default)]
struct End {
    /// Messages, with their descriptors.
    queue: VecDeque<(Vec<u8>, Vec<Descriptor>)>,
    /// Whether either end is closed.
    hung_up: bool,
}

/// What the descriptor of an end stands for: what it receives, and what its peer does.
#[derive(Debug, Clone)]
struct Ends {
    own: Arc<Mutex<End>>,
    peer: Arc<Mutex<End>>,
}

static ENDS: Named<Ends> = Named::new();

fn with<T>(end: &Mutex<End>, change: impl FnOnce(&mut End) -> T) -> T {
    change(&mut end.lock().unwrap_or_else(PoisonError::into_inner))
}

pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let ends = Ends { own: Arc::default(), peer: Arc::default() };
    let other = Ends { own: ends.peer.clone(), peer: ends.own.clone() };
    Ok((ENDS.add(ends), ENDS.add(other)))
}

pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[Descriptor]) -> io::Result<()> {
    with(&ENDS.of(socket).peer, |peer| {
        if peer.hung_up {
            return Err(nix::errno::Errno::EPIPE.into());
        }
        peer.queue.push_back((bytes.to_vec(), descriptors.to_vec()));
        Ok(())
    })
}

pub(super) fn receive(socket: BorrowedFd<'_>, longest: usize, most: usize) -> io::Result<Arrival> {
    with(&ENDS.of(socket).own, |own| {
        Ok(match own.queue.pop_front() {
            Some((bytes, descriptors)) if bytes.len() > longest || descriptors.len() > most => Arrival::TooLong,
            Some((bytes, descriptors)) => {
                let duplicate = |fd: &Descriptor| fd.as_fd().try_clone_to_owned().map(Foreign::from);
                Arrival::Message(bytes, descriptors.iter().map(duplicate).collect::<io::Result<_>>()?)
            }
            None if own.hung_up => Arrival::HangUp,
            None => Arrival::Nothing,
        })
    })
}

pub(super) fn has_hung_up(socket: BorrowedFd<'_>) -> bool {
    with(&ENDS.of(socket).own, |own| own.hung_up)
}

/// Closes an end, also if there are other descriptors of it.
pub(super) fn hang_up(socket: BorrowedFd<'_>) {
    let Ends { own, peer } = ENDS.of(socket);
    with(&own, |own| own.hung_up = true);
    with(&peer, |peer| peer.hung_up = true);
}
