//! What an [`io::Error`] is that comes of an error of this crate: its text stays, and its kind is that which the same event has
//! elsewhere. Each error of a call becomes one, so that a function that returns [`io::Result`] may use `?`.

use std::io::{self, ErrorKind};

use fbuf_core::memory::{CannotReopen, MemoryError};
use fbuf_protocol::Refusal;

use crate::{AllocateError, ConnectError, GetError, OpenError, WaitError, WriteError};

impl From<AllocateError> for io::Error {
    fn from(error: AllocateError) -> Self {
        let kind = match error {
            AllocateError::TimedOut { .. } => ErrorKind::TimedOut,
            AllocateError::Interrupted => ErrorKind::Interrupted,
            AllocateError::NoMemory { .. } => ErrorKind::OutOfMemory,
            AllocateError::NoDescriptor { .. } => ErrorKind::QuotaExceeded,
            AllocateError::WouldWait { .. } | AllocateError::NoRoom { .. } | AllocateError::UnderWay => {
                ErrorKind::WouldBlock
            }
            AllocateError::NotPermitted { .. } => ErrorKind::PermissionDenied,
            AllocateError::NoProc { .. } => ErrorKind::NotFound,
            AllocateError::Refused { code, .. } => io::Error::from_raw_os_error(code).kind(),
            AllocateError::ClientFailed(_) | AllocateError::Forked(_) => ErrorKind::NotConnected,
            #[cfg(feature = "tokio")]
            AllocateError::RuntimeEnded(_) => ErrorKind::NotConnected,
        };
        Self::new(kind, error)
    }
}

/// The fbuf is in the error, which [`io::Error::downcast`] gives back.
impl From<WriteError> for io::Error {
    fn from(error: WriteError) -> Self {
        let kind = match error {
            WriteError::NoReceiver { .. } => ErrorKind::BrokenPipe,
            WriteError::OtherSender { .. } => ErrorKind::InvalidInput,
            WriteError::Forked { .. } => ErrorKind::NotConnected,
            WriteError::NotPassed { .. } => ErrorKind::WouldBlock,
            WriteError::NotSealed { .. } | WriteError::NotKept { .. } => ErrorKind::OutOfMemory,
            // What it lacked is not known.
            WriteError::Lost => ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

impl From<WaitError> for io::Error {
    fn from(error: WaitError) -> Self {
        let kind = match error {
            WaitError::TimedOut { .. } | WaitError::StillLent { .. } => ErrorKind::TimedOut,
            WaitError::Interrupted => ErrorKind::Interrupted,
            WaitError::ClientFailed(_) | WaitError::Forked(_) => ErrorKind::NotConnected,
            #[cfg(feature = "tokio")]
            WaitError::RuntimeEnded(_) => ErrorKind::NotConnected,
        };
        Self::new(kind, error)
    }
}

impl From<GetError> for io::Error {
    fn from(error: GetError) -> Self {
        let kind = match error {
            GetError::Ended => ErrorKind::UnexpectedEof,
            GetError::Disconnected { .. } | GetError::Dropped { .. } => ErrorKind::ConnectionReset,
            GetError::Aborted { .. } => ErrorKind::ConnectionAborted,
            GetError::PeerViolation { .. } | GetError::LeaseLost { .. } => ErrorKind::InvalidData,
            GetError::Exhausted { .. } | GetError::NoMemory { .. } | GetError::GivenUp { .. } => ErrorKind::OutOfMemory,
            GetError::NoDescriptor { .. } => ErrorKind::QuotaExceeded,
            GetError::SlotsWithheld { why: CannotReopen::NoDescriptor, .. } => ErrorKind::QuotaExceeded,
            GetError::SlotsWithheld { why: CannotReopen::NotPermitted, .. } => ErrorKind::PermissionDenied,
            GetError::SlotsWithheld { .. } => ErrorKind::NotFound,
            GetError::TimedOut => ErrorKind::TimedOut,
            GetError::Interrupted => ErrorKind::Interrupted,
            GetError::ClientFailed(_) | GetError::Forked(_) => ErrorKind::NotConnected,
            #[cfg(feature = "tokio")]
            GetError::RuntimeEnded(_) => ErrorKind::NotConnected,
        };
        Self::new(kind, error)
    }
}

impl From<OpenError> for io::Error {
    fn from(error: OpenError) -> Self {
        let kind = match &error {
            OpenError::Channel(_) | OpenError::Label(_) | OpenError::Geometry(_) | OpenError::Options(_) => {
                ErrorKind::InvalidInput
            }
            OpenError::Memory(MemoryError::Refused { error, .. }) | OpenError::Local { error } => error.kind(),
            OpenError::Memory(_) => ErrorKind::OutOfMemory,
            OpenError::Refused(Refusal::NotPermitted { .. }) => ErrorKind::PermissionDenied,
            OpenError::Refused(Refusal::QuotaExceeded(_) | Refusal::Share { .. }) => ErrorKind::QuotaExceeded,
            OpenError::Refused(_) => ErrorKind::InvalidInput,
            OpenError::BrokerGone { .. } | OpenError::ClientFailed(_) | OpenError::Forked(_) => ErrorKind::NotConnected,
            OpenError::NoAnswer => ErrorKind::TimedOut,
            OpenError::InPredicate => ErrorKind::Deadlock,
        };
        Self::new(kind, error)
    }
}

impl From<ConnectError> for io::Error {
    fn from(error: ConnectError) -> Self {
        let kind = match &error {
            ConnectError::NoBroker { error, .. }
            | ConnectError::Unreachable { error, .. }
            | ConnectError::Local { error } => error.kind(),
            ConnectError::ForeignBroker { .. }
            | ConnectError::OtherBroker { .. }
            | ConnectError::NotPermitted { .. } => ErrorKind::PermissionDenied,
            ConnectError::Interrupted => ErrorKind::Interrupted,
            ConnectError::OtherVersion { .. } => ErrorKind::Unsupported,
            ConnectError::QuotaExceeded { .. } | ConnectError::Full { .. } => ErrorKind::QuotaExceeded,
            ConnectError::NotABroker { .. } => ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Shortage;

    #[test]
    fn an_io_error_has_the_kind_of_the_event_and_the_text_of_the_error() {
        let said = |error: io::Error| (error.kind(), error.to_string());
        let (full, cut) = (AllocateError::TimedOut { slots: 8 }, AllocateError::Interrupted);
        assert_eq!(said(full.into()), (ErrorKind::TimedOut, full.to_string()));
        assert!(full.to_string().starts_with("no free slot: all 8 are in use"), "{full}");
        assert_eq!(io::Error::from(cut).kind(), ErrorKind::Interrupted);
        let none = MemoryError::NotEnough { asked: 1, available: 0, bound: "the machine" };
        let none = AllocateError::NoMemory { bytes: 1, shortage: Shortage::behind(&none, "a slot") };
        assert_eq!(io::Error::from(none).kind(), ErrorKind::OutOfMemory);
        assert_eq!(io::Error::from(WaitError::StillLent { slots: 1 }).kind(), ErrorKind::TimedOut);
        assert_eq!(io::Error::from(GetError::Ended).kind(), ErrorKind::UnexpectedEof);
        assert_eq!(io::Error::from(WriteError::Lost).kind(), ErrorKind::Other);
        let refused = || io::Error::from(ErrorKind::PermissionDenied);
        let memory = MemoryError::Refused { call: "mmap", asked: 1, error: refused() };
        assert_eq!(io::Error::from(OpenError::from(memory)).kind(), ErrorKind::PermissionDenied);
        assert_eq!(io::Error::from(ConnectError::from(refused())).kind(), ErrorKind::PermissionDenied);
        let gone = OpenError::BrokerGone { reason: "it has gone".into() };
        assert_eq!(io::Error::from(gone).kind(), ErrorKind::NotConnected);
    }
}
