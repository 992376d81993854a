//! What survives a broker without being written down anywhere: which client has an endpoint's number, and which two endpoints are
//! linked. Both rest on random numbers that no other process knows or can guess.

use std::{fmt, io};

use fbuf_core::process::sys;
use serde::{Deserialize, Serialize};

/// What proves to the next broker that an endpoint is the one of a number: only the client that opened it has it. The
/// number follows from it, and not the other way round, so the next broker need not know anything.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret([u8; 16]);

impl Secret {
    /// A new one.
    ///
    /// # Errors
    /// What getrandom(2) says.
    pub fn draw() -> io::Result<Self> {
        sys::random().map(Self)
    }

    /// The number by which all know the endpoint: the first 64 bits of a hash. Finding another secret for the number of
    /// an endpoint takes 2⁶⁴ attempts, divided by the number of endpoints that would do.
    #[must_use]
    pub fn number(&self) -> u64 {
        let mut hash = hmac_sha256::Hash::new();
        hash.update(b"fbuf endpoint");
        hash.update(self.0);
        let hash = hash.finalize();
        hash.iter().take(8).fold(0, |number, &byte| number << 8 | u64::from(byte))
    }
}

/// Not to be read in a log.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_follows_from_its_secret_and_from_no_other() {
        // Brokers of all versions that speak the same protocol must agree.
        assert_eq!(Secret([7; 16]).number(), NUMBER_OF_SEVENS);
        let secrets = [(); 1000].map(|()| Secret::draw().unwrap());
        let numbers: std::collections::BTreeSet<_> = secrets.iter().map(Secret::number).collect();
        assert_eq!(numbers.len(), secrets.len());
        assert!(secrets.iter().all(|secret| secret.number() == secret.number()));
    }

    #[test]
    fn a_secret_is_not_shown() {
        let shown = format!("{:?}", Secret([7; 16]));
        assert!(!shown.contains('7'), "{shown}");
    }

    const NUMBER_OF_SEVENS: u64 = 0xe598_e868_6155_5ec0;
}
