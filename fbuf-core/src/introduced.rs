//! What the broker says of a link: the one thing that this process believes and cannot check.
//!
//! Which process is at the other end of a link, whether it is trusted, how messages are protected and to which process the
//! memory of slots belongs, only the broker knows. Of a trusted peer memory becomes a slice that this peer could write
//! ([`trust`](crate::trust)); and the socket of a link tells each side that the other has ended, whereupon a sender uses
//! slots again. So half a link is made of an [`Introduced`] and of nothing else, and that is unsafe to make: the code that
//! makes it says that the broker has said so, and that no other code has the descriptors.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::io;

use serde::{Deserialize, Serialize};

use crate::{
    peer::Peer,
    process::sys::said,
    protection::Mechanism,
    receive::link::{GreetError, Greeted, SlotSource},
    send::link::Expected,
    slot::{Geometry, GeometryError, GeometryTerms},
    socket::{PacketSocket, forms, wire::Descriptor},
};

/// A link that is to be made: a sender and a receiver get one each.
#[derive(Debug, Serialize, Deserialize)]
pub struct Introduction {
    /// Which endpoint of this client it is for.
    pub endpoint: u64,
    /// The endpoint at the other end, and its process.
    #[serde(with = "forms::Peer")]
    pub peer: Peer,
    /// The slots of the sender, which will never have more.
    pub geometry: GeometryTerms,
    /// How messages are protected on this link.
    #[serde(with = "forms::Mechanism")]
    pub mechanism: Mechanism,
    /// Where its slots are.
    pub slot_source: SlotSource,
    /// This end of the link socket.
    pub socket: Descriptor,
}

impl Introduction {
    /// How many descriptors it carries.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        match &self.slot_source {
            SlotSource::FromBroker(slots) => 1 + slots.len(),
            SlotSource::Segments | SlotSource::FromReceiver | SlotSource::FromSender => 1,
        }
    }
}

/// A link that is to be made, by the word of the broker.
#[derive(Debug)]
pub struct Introduced {
    endpoint: u64,
    peer: Peer,
    socket: PacketSocket,
    geometry: Geometry,
    mechanism: Mechanism,
    slot_source: SlotSource,
}

/// An introduction of which no link can be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IntroductionError {
    /// The slots cannot be like that.
    #[error("the broker introduced a sender with slots that cannot be: {0}")]
    Geometry(GeometryError),
    /// This process has no descriptor left for the socket of the link, or is refused a call of it, or what came is no socket.
    #[error("the socket of a link cannot be used: {}", said(.0))]
    Socket(io::Error),
}

impl From<GeometryError> for IntroductionError {
    fn from(error: GeometryError) -> Self {
        Self::Geometry(error)
    }
}

impl From<io::Error> for IntroductionError {
    fn from(error: io::Error) -> Self {
        Self::Socket(error)
    }
}

impl Introduction {
    /// Takes an introduction for what the broker has said.
    ///
    /// Safe code cannot do so:
    ///
    /// ```compile_fail,E0133
    /// fn claim(introduction: fbuf_core::introduced::Introduction) {
    ///     let _ = introduction.assume_genuine();
    /// }
    /// ```
    ///
    /// # Errors
    /// [`IntroductionError`]
    ///
    /// # Safety
    /// A broker that this process trusts with its memory has sent this introduction, for the endpoint of which the link
    /// will be, and nothing in it has been changed. No other code of this process has, or had, its descriptors.
    pub unsafe fn assume_genuine(self) -> Result<Introduced, IntroductionError> {
        let Self { endpoint, peer, geometry, mechanism, slot_source, socket } = self;
        let socket = PacketSocket::new(socket.into_owned()?)?.of_link_with(&peer);
        let geometry = Geometry::try_from(geometry)?;
        Ok(Introduced { endpoint, peer, socket, geometry, mechanism, slot_source })
    }
}

impl Introduced {
    /// Which endpoint of this client it is for.
    #[must_use]
    pub fn endpoint(&self) -> u64 {
        self.endpoint
    }

    /// The endpoint at the other end.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// The slots of the sender.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// How many descriptors the link takes of this process, if the sender does not grow: its socket, the memory of a
    /// sender, and slots that are memory of their own.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        match &self.slot_source {
            SlotSource::Segments => 1 + usize::from(self.mechanism == Mechanism::Shared),
            SlotSource::FromBroker(memory) => 1 + memory.len(),
            SlotSource::FromReceiver | SlotSource::FromSender => 1 + self.geometry.max_slots() as usize,
        }
    }

    /// How much memory this process makes for the slots of a sender that takes them from its receiver.
    #[must_use]
    pub fn pool_bytes(&self) -> u64 {
        match self.slot_source {
            SlotSource::FromReceiver => self.geometry.cell_bytes() * u64::from(self.geometry.max_slots()),
            SlotSource::Segments | SlotSource::FromBroker(_) | SlotSource::FromSender => 0,
        }
    }

    /// Says hello to the sender. With `skip_above`, the sender leaves messages out rather than have more than so many of
    /// its slots held here.
    ///
    /// # Errors
    /// [`GreetError`]: there will be no link.
    pub fn greet(self, skip_above: Option<u32>) -> Result<Greeted, GreetError> {
        let Self { peer, socket, geometry, mechanism, slot_source, .. } = self;
        Greeted::new(peer, socket, geometry, mechanism, slot_source, skip_above)
    }

    /// Takes the sender's end: the receiver will say hello.
    #[must_use]
    pub fn expect(self) -> Expected {
        Expected::new(self.peer, self.socket).protected_by(self.mechanism)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::{Credentials, LinkId};

    fn introduction(mechanism: Mechanism, slot_source: SlotSource, max_slots: u64) -> Introduction {
        Introduction {
            endpoint: 7,
            peer: Peer {
                endpoint: 1,
                process: Credentials { pid: 1, uid: 1, gid: 1 },
                same_user: true,
                trusted: true,
                link: LinkId::default(),
            },
            geometry: GeometryTerms::new(64, max_slots),
            mechanism,
            slot_source,
            socket: PacketSocket::pair().unwrap().0.into(),
        }
    }

    fn introduced(introduction: Introduction) -> Result<Introduced, IntroductionError> {
        // SAFETY: the test is the broker, and nobody has the descriptors.
        unsafe { introduction.assume_genuine() }
    }

    #[test]
    fn slots_that_cannot_be_are_not_introduced() {
        assert!(introduced(introduction(Mechanism::Shared, SlotSource::Segments, 1)).is_ok());
        let refused = introduced(introduction(Mechanism::Shared, SlotSource::Segments, 0)).unwrap_err();
        assert!(matches!(refused, IntroductionError::Geometry(GeometryError::Slots { slots: 0 })), "{refused}");
    }

    /// Messages that are said to be leased, and lie in a segment that their sender may write, are none.
    #[test]
    fn what_contradicts_itself_is_not_greeted() {
        for (mechanism, slot_source, is_refused) in [
            (Mechanism::Lease, SlotSource::Segments, true),
            (Mechanism::Lease, SlotSource::FromReceiver, false),
            (Mechanism::OneShot, SlotSource::FromReceiver, true),
            (Mechanism::OneShot, SlotSource::FromSender, true),
            (Mechanism::OneShot, SlotSource::Segments, false),
            (Mechanism::Copy, SlotSource::FromReceiver, false),
        ] {
            // Its peer is gone, which is noticed later.
            let greeted = introduced(introduction(mechanism, slot_source, 1)).unwrap().greet(None);
            let refused = matches!(&greeted, Err(GreetError::Contradiction(found)) if *found == mechanism);
            assert_eq!(refused, is_refused, "{mechanism:?}: {greeted:?}");
        }
    }
}
