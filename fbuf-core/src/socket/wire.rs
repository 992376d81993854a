//! Messages with descriptors in them, turned into the bytes and the descriptors of one packet and
//! back. Knows no system calls; used alike by the link sockets and the control socket.
//!
//! The bytes are postcard's; a [`Descriptor`] inside a message is written as its index among the
//! descriptors that travel beside the bytes (SCM_RIGHTS, unix(7)).

use std::{
    cell::RefCell,
    io,
    mem::ManuallyDrop,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};

use crate::{
    limits::{MAX_DESCRIPTORS, MAX_MESSAGE},
    process::foreign::Foreign,
};

/// A descriptor inside a message: one of this process, or one that came from another.
#[derive(Debug, Clone)]
pub struct Descriptor(Origin);

#[derive(Debug, Clone)]
enum Origin {
    Here(Arc<OwnedFd>),
    Elsewhere(Arc<Foreign>),
}

impl Descriptor {
    /// The descriptor itself, if nobody else shares it; otherwise a duplicate of it. To close one that came from another
    /// process may take [long](crate::process::deferred).
    ///
    /// # Errors
    /// What the kernel says when it has no descriptor left for the duplicate.
    pub fn into_owned(self) -> io::Result<OwnedFd> {
        match self.0 {
            Origin::Here(shared) => Arc::try_unwrap(shared).or_else(|shared| shared.try_clone()),
            Origin::Elsewhere(_) => self.into_foreign().map(Foreign::into_fd),
        }
    }

    /// As [`Self::into_owned`], of one that is closed apart.
    ///
    /// # Errors
    /// As [`Self::into_owned`].
    pub fn into_foreign(self) -> io::Result<Foreign> {
        match self.0 {
            Origin::Here(_) => self.into_owned().map(Foreign::from),
            Origin::Elsewhere(shared) => {
                Arc::try_unwrap(shared).or_else(|shared| Ok(shared.as_fd().try_clone_to_owned()?.into()))
            }
        }
    }
}

impl From<OwnedFd> for Descriptor {
    fn from(fd: OwnedFd) -> Self {
        Arc::new(fd).into()
    }
}

impl From<Arc<OwnedFd>> for Descriptor {
    fn from(fd: Arc<OwnedFd>) -> Self {
        Self(Origin::Here(fd))
    }
}

impl From<Foreign> for Descriptor {
    fn from(fd: Foreign) -> Self {
        Arc::new(fd).into()
    }
}

impl From<Arc<Foreign>> for Descriptor {
    fn from(fd: Arc<Foreign>) -> Self {
        Self(Origin::Elsewhere(fd))
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Origin::Here(fd) => fd.as_fd(),
            Origin::Elsewhere(fd) => fd.as_fd(),
        }
    }
}

// Without destructors, so that messages can be written and read in the destructors of other thread-locals; nothing is in
// them but while a message is written or read.
thread_local! {
    /// The descriptors of the one message that this thread is encoding.
    static LEAVING: RefCell<ManuallyDrop<Vec<Descriptor>>> = const { RefCell::new(ManuallyDrop::new(Vec::new())) };
    /// The descriptors of the one message that this thread is decoding, each until it is taken.
    static ARRIVING: RefCell<ManuallyDrop<Vec<Option<Foreign>>>> = const { RefCell::new(ManuallyDrop::new(Vec::new())) };
}

impl Serialize for Descriptor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let index = LEAVING.with_borrow_mut(|leaving| {
            leaving.push(self.clone());
            leaving.len() - 1
        });
        serializer.serialize_u32(index as u32)
    }
}

impl<'de> Deserialize<'de> for Descriptor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let index = u32::deserialize(deserializer)? as usize;
        ARRIVING
            .with_borrow_mut(|arriving| arriving.get_mut(index)?.take())
            .map(Self::from)
            .ok_or_else(|| serde::de::Error::custom(format!("descriptor {index} did not come, or is named twice")))
    }
}

/// One packet: bytes, and the descriptors that travel with them.
#[derive(Debug)]
pub struct Letter {
    /// At most [`MAX_MESSAGE`] of them.
    pub bytes: Vec<u8>,
    /// At most [`MAX_DESCRIPTORS`] of them.
    pub descriptors: Vec<Descriptor>,
}

/// A message that cannot be written or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// It is longer, or carries more descriptors, than any message may.
    #[error(
        "a message of {bytes} bytes with {descriptors} descriptors: at most {MAX_MESSAGE} and {MAX_DESCRIPTORS} are allowed"
    )]
    TooLong {
        /// Its bytes.
        bytes: usize,
        /// Its descriptors.
        descriptors: usize,
    },
    /// The bytes are no message of the kind that was expected.
    #[error("{0}")]
    Malformed(String),
}

/// Writes a message.
///
/// # Errors
/// [`WireError::TooLong`]
pub fn encode<T: Serialize>(message: &T) -> Result<Letter, WireError> {
    LEAVING.with_borrow_mut(|leaving| leaving.clear());
    let bytes = postcard::to_stdvec(message);
    let descriptors = ManuallyDrop::into_inner(LEAVING.take());
    let bytes = bytes.map_err(|error| WireError::Malformed(error.to_string()))?;
    if bytes.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
        return Err(WireError::TooLong { bytes: bytes.len(), descriptors: descriptors.len() });
    }
    Ok(Letter { bytes, descriptors })
}

/// Reads a message. Descriptors that it does not name are closed.
///
/// # Errors
/// [`WireError::Malformed`] if the bytes are not exactly one message, or name descriptors that did
/// not come.
pub fn decode<T: DeserializeOwned>(bytes: &[u8], descriptors: Vec<Foreign>) -> Result<T, WireError> {
    ARRIVING.set(ManuallyDrop::new(descriptors.into_iter().map(Some).collect()));
    let message = postcard::take_from_bytes(bytes);
    let unnamed = ManuallyDrop::into_inner(ARRIVING.take());
    Foreign::drop_together(unnamed.into_iter().flatten().collect());
    match message {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(WireError::Malformed(format!("{} bytes stand behind the message", rest.len()))),
        Err(error) => Err(WireError::Malformed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::fstat;

    fn file(path: &str) -> OwnedFd {
        std::fs::File::open(path).unwrap().into()
    }

    #[test]
    fn descriptors_arrive_where_they_were_put() {
        let message = (1u8, Descriptor::from(file("/dev/null")), "x".to_owned(), Descriptor::from(file("/dev/zero")));
        let letter = encode(&message).unwrap();
        assert_eq!(letter.descriptors.len(), 2);
        let arrived = letter.descriptors.iter().map(|fd| fd.as_fd().try_clone_to_owned().unwrap().into()).collect();
        let back: (u8, Descriptor, String, Descriptor) = decode(&letter.bytes, arrived).unwrap();
        assert_eq!((back.0, back.2.as_str()), (1, "x"));
        for (sent, came) in [(&message.1, &back.1), (&message.3, &back.3)] {
            assert_eq!(fstat(sent).unwrap().st_rdev, fstat(came).unwrap().st_rdev);
        }
    }

    #[test]
    fn missing_and_twice_named_descriptors_are_malformed() {
        let letter = encode(&Descriptor::from(file("/dev/null"))).unwrap();
        assert!(decode::<Descriptor>(&letter.bytes, vec![]).is_err());
        let mut twice = letter.bytes.clone();
        twice.extend_from_slice(&letter.bytes);
        assert!(decode::<(Descriptor, Descriptor)>(&twice, vec![file("/dev/null").into()]).is_err());
    }

    #[test]
    fn unnamed_descriptors_are_closed() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        assert_eq!(decode::<u8>(&[7], vec![writer.into()]), Ok(7));
        assert_eq!(nix::unistd::read(&reader, &mut [0]), Ok(0), "the writing end is still open somewhere");
    }

    #[test]
    fn trailing_bytes_are_malformed() {
        assert!(matches!(decode::<u8>(&[7, 7], vec![]), Err(WireError::Malformed(_))));
    }

    #[test]
    fn too_much_is_refused_before_it_is_sent() {
        assert!(matches!(encode(&vec![0u8; MAX_MESSAGE + 1]), Err(WireError::TooLong { .. })));
        let many: Vec<_> = (0..=MAX_DESCRIPTORS).map(|_| Descriptor::from(file("/dev/null"))).collect();
        assert!(matches!(encode(&many), Err(WireError::TooLong { .. })));
    }
}
