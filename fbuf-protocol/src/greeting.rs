//! The first packet each way: eight bytes, the same in every version, so that a client and a broker
//! of different versions can tell each other so.

/// The version of everything behind the greeting, the link messages and the layouts in shared memory
/// included.
pub const VERSION: u16 = 8;

const MAGIC: [u8; 4] = *b"fbuf";

/// The first packet: `fbuf`, the sender's version, and from the broker what it thinks of the client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// The version that its sender speaks.
    pub version: u16,
    /// From the broker: whether it goes on. From the client: [`Verdict::Welcome`].
    pub verdict: Verdict,
}

/// Whether the broker goes on with a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Verdict {
    /// It does.
    Welcome = 0,
    /// It speaks another version.
    OtherVersion = 1,
    /// It does not serve this user.
    NotPermitted = 2,
    /// It has as many clients as it can serve.
    Full = 3,
    /// This user has as many connections as the quota allows: which quota of which rule, as [`QuotaExceeded`](super::QuotaExceeded), is
    /// in the packet behind this one.
    QuotaExceeded = 4,
}

/// A first packet that is no greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the first packet is not a greeting of fbuf")]
pub struct GreetingError;

impl Greeting {
    /// As it travels.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.version.to_le_bytes());
        bytes[6..].copy_from_slice(&(self.verdict as u16).to_le_bytes());
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`GreetingError`]
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, GreetingError> {
        let bytes: [u8; 8] = bytes.try_into().map_err(|_| GreetingError)?;
        let [m0, m1, m2, m3, v0, v1, d0, d1] = bytes;
        let verdict = match u16::from_le_bytes([d0, d1]) {
            0 => Verdict::Welcome,
            1 => Verdict::OtherVersion,
            2 => Verdict::NotPermitted,
            3 => Verdict::Full,
            4 => Verdict::QuotaExceeded,
            _ => return Err(GreetingError),
        };
        if [m0, m1, m2, m3] != MAGIC {
            return Err(GreetingError);
        }
        Ok(Self { version: u16::from_le_bytes([v0, v1]), verdict })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn greetings_survive_their_encoding() {
        for verdict in
            [Verdict::Welcome, Verdict::OtherVersion, Verdict::NotPermitted, Verdict::Full, Verdict::QuotaExceeded]
        {
            let greeting = Greeting { version: 0x1234, verdict };
            assert_eq!(Greeting::from_bytes(&greeting.to_bytes()), Ok(greeting));
        }
    }

    proptest! {
        #[test]
        fn anything_else_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..16)) {
            if let Ok(greeting) = Greeting::from_bytes(&bytes) {
                prop_assert_eq!(&greeting.to_bytes()[..], &bytes[..]);
            }
        }
    }
}
