//! Messages as they come, for a loop over a receiver.

use std::iter::FusedIterator;

use fbuf_core::receive::received::Received;

use super::{GetError, Receiver};

impl Receiver {
    /// The messages as they come, as [`Self::get`] returns them: waits for each, and ends when all senders have ended
    /// ([`GetError::Ended`]), which is never the case if the receiver [keeps waiting](crate::ReceiverBuilder::keep_waiting).
    ///
    /// Each other error is an item, and no end: that one sender of several has died, or a signal came, must not be taken for
    /// the end of the stream. After the error the iterator goes on, as the receiver does; but for [`GetError::Forked`] and [`GetError::ClientFailed`],
    /// each of which is the last item.
    ///
    /// ```
    /// # use std::io::Write;
    /// # let broker = fbuf_broker::Embedded::start()?;
    /// # let client = fbuf_client::Client::connect_to(broker.address())?;
    /// let mut receiver = client.receiver("lines").open()?;
    /// # let mut sender = client.sender("lines").open()?;
    /// # sender.wait_for_receivers(1)?;
    /// # for line in ["one", "two"] {
    /// #     let mut fbuf = sender.allocate()?;
    /// #     fbuf.write_all(line.as_bytes())?;
    /// #     sender.write(fbuf)?;
    /// # }
    /// # sender.finish();
    /// let mut bytes = 0;
    /// for message in &mut receiver { // or receiver.iter()
    ///     bytes += message?.len();
    /// }
    /// assert_eq!(bytes, 6);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn iter(&mut self) -> Iter<'_> {
        Iter { receiver: self, is_over: false }
    }

    /// The messages that are there already, as [`Self::try_get`] returns them: never waits, and ends when there is none, or all
    /// senders have ended. Errors are items, as of [`Self::iter`]; one that each call reports until it passes
    /// ([`GetError::NoDescriptor`], [`GetError::NoMemory`]) is the last.
    pub fn try_iter(&mut self) -> TryIter<'_> {
        TryIter { receiver: self, is_over: false }
    }
}

/// Waits for messages: [`Receiver::iter`].
#[derive(Debug)]
#[must_use]
pub struct Iter<'a> {
    receiver: &'a mut Receiver,
    is_over: bool,
}

impl Iterator for Iter<'_> {
    type Item = Result<Received, GetError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let item = self.receiver.get();
        self.is_over = item.as_ref().is_err_and(GetError::is_last);
        Some(item).filter(|item| !matches!(item, Err(GetError::Ended)))
    }
}

impl FusedIterator for Iter<'_> {}

/// Messages that are there: [`Receiver::try_iter`].
#[derive(Debug)]
#[must_use]
pub struct TryIter<'a> {
    receiver: &'a mut Receiver,
    is_over: bool,
}

impl Iterator for TryIter<'_> {
    type Item = Result<Received, GetError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let item = self.receiver.try_get().transpose();
        self.is_over = match &item {
            None | Some(Err(GetError::NoDescriptor { .. } | GetError::NoMemory { .. })) => true,
            Some(item) => item.as_ref().is_err_and(GetError::is_last),
        };
        item.filter(|item| !matches!(item, Err(GetError::Ended)))
    }
}

impl FusedIterator for TryIter<'_> {}

/// As [`Receiver::iter`].
impl<'a> IntoIterator for &'a mut Receiver {
    type Item = Result<Received, GetError>;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}
