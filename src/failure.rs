//! How a command fails: with a sentence and a status, or because nobody reads its output any more.

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

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(error.to_string())
    }
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
