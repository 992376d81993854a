//! The broker's socket: where a client of this user would look for it, and whether anything answers.

use std::{env, io, os::fd::AsRawFd};

use fbuf_core::process::sys::os_error;
use fbuf_protocol::address::{Address, VARIABLE, set_aside};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, connect, socket},
};

use super::finding::{Consequence, Finding, Outcome, Section, Setback};
use crate::Place;

const TAKEN: &str = "something listens there, and took the connection; `fbuf ls` tells whether it serves this user";
const NOT_NEEDED: &str = "nothing; the address before is the one that clients use";

/// The group: each address at which a client of this user looks, in turn.
pub fn section(place: &Place) -> Section {
    let (addresses, source) = match &place.socket {
        Some(address) => (vec![address.clone()], "from --socket"),
        None if is_set(VARIABLE) && set_aside().is_none() => (Address::defaults(), "from FBUF_BROKER"),
        None => (Address::defaults(), "the default; FBUF_BROKER overrides it"),
    };
    let mut findings: Vec<_> = set_aside().map(|why| Finding::fact("left aside", why)).into_iter().collect();
    let mut is_found = false;
    for address in addresses {
        let answer = match answer(&address) {
            Finding { outcome: Outcome::WorksNot(_), name, .. } if is_found => Finding::fact(name, NOT_NEEDED),
            answer => answer,
        };
        is_found |= matches!(answer.outcome, Outcome::Works);
        findings.extend([Finding::fact("address", format!("{address} ({source})")), answer]);
    }
    Section { title: "Broker", findings }
}

fn is_set(name: &str) -> bool {
    env::var_os(name).is_some_and(|value| !value.is_empty())
}

fn answer(address: &Address) -> Finding {
    let name = "answer";
    let error = match call(address) {
        Ok(()) => return Finding { outcome: Outcome::Works, ..Finding::fact(name, TAKEN) },
        Err(error) => error,
    };
    let remedy = match os_error(&error) {
        Some(Errno::ENOENT) => "Start one with `fbuf broker`, or set FBUF_BROKER if it listens elsewhere.",
        Some(Errno::ECONNREFUSED) => "The broker that was there is gone: start one with `fbuf broker`.",
        Some(Errno::EACCES) if matches!(address, Address::Path(_)) => {
            "Ask the user that runs it for permission on the socket and its folder."
        }
        Some(Errno::EACCES | Errno::EPERM | Errno::ENOSYS) => {
            "Allow socket and connect in the seccomp filter, and the address in the security module."
        }
        Some(Errno::EAGAIN) => "It listens but takes nobody: look whether the broker hangs.",
        Some(Errno::EPROTOTYPE) => "Another program's socket is there: set FBUF_BROKER to the broker's.",
        _ if error.kind() == io::ErrorKind::InvalidInput => "Set FBUF_BROKER to another one.",
        _ => "Set FBUF_BROKER to the broker's socket.",
    };
    let follows = "Programs of this user find no broker, so they cannot be introduced to each other.";
    let seen = Setback::WorksNot(format!("connect: {error}"));
    Finding::tried(name, Err(seen), Consequence { follows, remedy })
}

/// Connects and hangs up. Without waiting, so that a broker that hangs cannot hang its doctor.
fn call(address: &Address) -> io::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    Ok(connect(socket.as_raw_fd(), &address.to_kernel()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Backlog, bind, listen};

    #[test]
    fn an_address_answers_while_somebody_listens() {
        let address = Address::new(format!("@fbuf-doctor-{}", std::process::id()));
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(socket.as_raw_fd(), &address.to_kernel().unwrap()).unwrap();
        assert!(matches!(answer(&address).outcome, Outcome::WorksNot(_)), "nobody listens yet");
        listen(&socket, Backlog::new(0).unwrap()).unwrap();
        assert!(matches!(answer(&address).outcome, Outcome::Works));
        drop(socket);
        let Outcome::WorksNot(gone) = answer(&address).outcome else { panic!("nobody listens any more") };
        assert!(gone.remedy.contains("fbuf broker"), "{gone:?}");
    }

    #[test]
    fn a_broker_that_takes_nobody_is_told_from_none() {
        let address = Address::new(format!("@fbuf-doctor-full-{}", std::process::id()));
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(socket.as_raw_fd(), &address.to_kernel().unwrap()).unwrap();
        listen(&socket, Backlog::new(0).unwrap()).unwrap();
        // Its queue holds one; that one hung up, but stays in it until it is accepted.
        call(&address).unwrap();
        let Outcome::WorksNot(full) = answer(&address).outcome else { panic!("there was room for one more") };
        assert!(full.remedy.contains("takes nobody"), "{full:?}");
    }

    #[test]
    fn an_address_that_is_too_long_is_told() {
        let long = Address::new(format!("/{}", "x".repeat(200)));
        let Outcome::WorksNot(found) = answer(&long).outcome else { panic!("it cannot answer") };
        assert!(found.remedy.contains("another"), "{found:?}");
    }
}
