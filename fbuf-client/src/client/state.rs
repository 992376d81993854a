//! Whether a client is connected, as all of its threads see it, and if not, why.

use std::{
    fmt, io,
    sync::{Mutex, PoisonError},
};

use super::{ClientFailed, OpenError};

/// Why there is no connection.
#[derive(Debug, Clone)]
pub(super) enum NotConnected {
    /// It is being made again. Why it is not there, and what to do.
    Now(String),
    /// The thread that would make it again has ended.
    Ever,
    /// Other code of the program has closed the descriptors of the client.
    Closed,
}

impl From<NotConnected> for OpenError {
    fn from(why: NotConnected) -> Self {
        match why {
            NotConnected::Now(reason) => Self::BrokerGone { reason },
            NotConnected::Ever => ClientFailed.into(),
            NotConnected::Closed => io::Error::other(CLOSED).into(),
        }
    }
}

impl fmt::Display for NotConnected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Now(reason) => f.write_str(reason),
            Self::Ever => ClientFailed.fmt(f),
            Self::Closed => f.write_str(CLOSED),
        }
    }
}

/// What is said of a client without descriptors.
const CLOSED: &str = "other code of this process has closed descriptors of this client, as closefrom(3) or close_range(2) do, and it can be \
                      used no more: have that code close only what it has opened, or run before this client connects";

/// What is said of a control thread that does not answer.
pub(super) const SILENT: &str =
    "the thread of this client does not answer: have predicates (accept), which run on it, return at once";

/// Why there is no connection now, if there is none.
#[derive(Debug, Default)]
pub(super) struct ConnectionState(Mutex<Option<NotConnected>>);

impl ConnectionState {
    pub(super) fn set(&self, why_not: Option<NotConnected>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = why_not;
    }

    pub(super) fn get(&self) -> Option<NotConnected> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
