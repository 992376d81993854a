//! How a command fails: with a sentence and a status, or because its output has no reader any more. Errors of the
//! library name neither calls nor options; where an option is what to change, it is named here.

use std::{error::Error, io};

use bytesize::ByteSize;
use fbuf_client::{ConnectError, GeometryError, MemoryError, Mismatch, OpenError, Refusal, Unpaired};
use fbuf_core::{
    limits::{MAX_LEASED, MAX_SLOTS},
    process::sys,
};

/// Why the command does not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something went wrong.
    Said {
        /// What, and what to do about it, in a line.
        text: String,
        /// The exit status.
        status: u8,
    },
    /// What it has printed says so.
    Shown,
    /// The reader of its output closed the pipe, and has read enough: the command ends as by SIGPIPE, without a word.
    ClosedPipe,
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let error: &(dyn Error + 'static) = &error;
        let said = error.downcast_ref().and_then(of_open).or_else(|| error.downcast_ref().and_then(of_connect));
        let said = said.or_else(|| error.downcast_ref::<io::Error>().map(sys::said));
        Self::new(said.unwrap_or_else(|| error.to_string()))
    }
}

/// Which option links a command with an endpoint that it is not paired with, if one does.
pub(crate) fn remedy(unpaired: &Unpaired) -> Option<String> {
    match (unpaired.why, unpaired.sends) {
        (Mismatch::SlotSize { found, .. }, true) => Some(format!("receive with `--max-slot-size {found}`")),
        (Mismatch::SlotSize { accepted, .. }, false) => Some(format!("send with `--slot-size {accepted}`")),
        (Mismatch::Slots { accepted, .. }, false) => Some(format!("send with `--slots {accepted}`")),
        (Mismatch::Protection { found, .. }, true) => Some(format!("receive with `--require {found}`")),
        (Mismatch::Protection { required, .. }, false) => Some(format!("send with `--protection {required}`")),
        (Mismatch::FromUsers { user }, _) => Some(format!("receive with `--from-users {user}`")),
        (Mismatch::ToUsers { user }, _) => Some(format!("send with `--to-users {user}`")),
        _ => None,
    }
}

/// Which option to change when there is a broker of another user.
fn of_connect(error: &ConnectError) -> Option<String> {
    match error {
        ConnectError::ForeignBroker { address, user, own } => Some(format!(
            "the broker at {address} is run by user {user}, and this command takes the word of a broker of root or of user \
             {own} only: start one of your own with `fbuf broker`, or accept this one with `--broker-user {user}`"
        )),
        _ => None,
    }
}

/// Which option to change when an endpoint cannot be opened.
fn of_open(error: &OpenError) -> Option<String> {
    let size = |bytes: u64| ByteSize(bytes).display().iec();
    Some(match error {
        OpenError::Refused(Refusal::SenderGivesLess { sender, required, found }) => format!(
            "{required} messages are required, and those of sender {} ({}) are {found}: have it send with `--protection \
             {required}`, or receive with `--require {found}`",
            sender.endpoint, sender.process
        ),
        OpenError::Refused(Refusal::ReceiverRequiresMore { receiver, required, found }) => format!(
            "receiver {} ({}) of the channel requires {required} messages, and these would be {found}: send with \
             `--protection {required}`",
            receiver.endpoint, receiver.process
        ),
        OpenError::Refused(Refusal::OneReceiver { sender }) => format!(
            "the slots of sender {} ({}) come from the one receiver that the channel has: end that receiver first",
            sender.endpoint, sender.process
        ),
        OpenError::Geometry(GeometryError::SlotBytes { bytes }) => {
            format!("--slot-size can be 1B to 1GiB, and {bytes} bytes were asked for")
        }
        OpenError::Geometry(GeometryError::Slots { slots }) => {
            format!("--slots can be 1 to {MAX_SLOTS}, and {slots} were asked for")
        }
        OpenError::Geometry(GeometryError::Leased { slots }) => {
            format!("--slots can be 1 to {MAX_LEASED} with `--protection leased`, and {slots} were asked for")
        }
        OpenError::Memory(MemoryError::NotEnough { asked, available, bound }) => format!(
            "{} of shared memory were asked for, and {} are available ({bound}): give fewer --slots or a smaller \
             --slot-size, or free some memory",
            size(*asked),
            size(*available)
        ),
        _ => return None,
    })
}

impl Failure {
    /// The status if the command line cannot be understood.
    pub(crate) const USAGE: u8 = 2;

    /// With status 1.
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self::Said { text: text.into(), status: 1 }
    }

    /// The command line asks for something that cannot be meant.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::new(text).with_status(Self::USAGE)
    }

    /// The same, with another status.
    pub(crate) fn with_status(self, status: u8) -> Self {
        match self {
            Self::Said { text, .. } => Self::Said { text, status },
            other => other,
        }
    }
}
