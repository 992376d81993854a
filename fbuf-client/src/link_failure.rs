//! Peers that the broker introduced, and with which no link could be made: what is known of the last one, or the last of the own user and root.

use std::fmt;

use fbuf_core::peer::Peer;

/// Why no link was made with a peer that the broker had introduced.
///
/// The two processes make a link without the broker. If the kernel or a limit refuses one of them something, that process
/// knows what, and the other one knows only that the link was closed: this says which of the two it is.
///
/// ```
/// use std::time::Duration;
/// use fbuf_client::WaitError;
///
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// let mut sender = client.sender("frames").open()?;
/// match sender.wait_for_receivers_timeout(1, Duration::from_millis(10)) {
///     Err(WaitError::TimedOut { failure: Some(failure), .. }) => eprintln!("{failure}"), // that of pid 4711 was closed …
///     Err(error) => eprintln!("{error}"),
///     Ok(_linked) => unreachable!("nobody receives"),
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LinkFailure {
    /// The peer.
    pub peer: Peer,
    /// What is missing here, or which rule the peer has broken. None if the peer's process has closed the link.
    pub reason: Option<String>,
}

impl fmt::Display for LinkFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { peer, reason } = self;
        match reason {
            Some(reason) => write!(f, "no link with {} could be made: {reason}", peer.process),
            None => write!(
                f,
                "{} has closed a link before it was made: it has ended, or does not accept this end, or lacks something or \
                 is refused a system call, which it reports",
                peer.process
            ),
        }
    }
}

/// A [failure](LinkFailure) behind another sentence, if there is one.
pub(crate) fn and_failure(failure: Option<&LinkFailure>) -> String {
    failure.map(|failure| format!("; {failure}")).unwrap_or_default()
}
