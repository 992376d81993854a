//! Names of channels.

use std::fmt;

use fbuf_core::limits::MAX_CHANNEL_NAME;

use crate::name::controls_text;

/// The name of a channel: 1 to 255 bytes of UTF-8 without characters that control how text is shown, such as U+202E,
/// which turns the order of what follows. Nothing in a file system carries it.
///
/// ```
/// use fbuf_protocol::channel::{ChannelName, ChannelNameError};
/// assert_eq!(ChannelName::new("camera/front")?.as_str(), "camera/front");
/// assert!(matches!(ChannelName::new("a\tb"), Err(ChannelNameError::Control { .. })));
/// # Ok::<(), ChannelNameError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChannelName(String);

/// A name that no channel can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelNameError {
    /// No characters.
    #[error("the channel name is empty: give it 1 to {MAX_CHANNEL_NAME} bytes")]
    Empty,
    /// Too many.
    #[error("the channel name has {bytes} bytes: at most {MAX_CHANNEL_NAME} are possible")]
    TooLong {
        /// How many it has.
        bytes: usize,
    },
    /// One that would not print, or change how others do.
    #[error("the channel name {name:?} has the control character U+{:04X} in it: leave it out", u32::from(*character))]
    Control {
        /// The name.
        name: String,
        /// The first such character.
        character: char,
    },
}

impl ChannelName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`ChannelNameError`]: empty, too long, or with control characters.
    pub fn new(name: impl Into<String>) -> Result<Self, ChannelNameError> {
        let name = name.into();
        if name.is_empty() {
            return Err(ChannelNameError::Empty);
        }
        if name.len() > MAX_CHANNEL_NAME {
            return Err(ChannelNameError::TooLong { bytes: name.len() });
        }
        if let Some(character) = name.chars().find(|&character| controls_text(character)) {
            return Err(ChannelNameError::Control { name, character });
        }
        Ok(Self(name))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ChannelName {
    type Error = ChannelNameError;
    fn try_from(name: String) -> Result<Self, ChannelNameError> {
        Self::new(name)
    }
}

impl From<ChannelName> for String {
    fn from(name: ChannelName) -> Self {
        name.0
    }
}

impl fmt::Display for ChannelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_names_are_told_apart() {
        assert_eq!(ChannelName::new(""), Err(ChannelNameError::Empty));
        assert_eq!(ChannelName::new("x".repeat(256)), Err(ChannelNameError::TooLong { bytes: 256 }));
        assert!(matches!(ChannelName::new("a\nb"), Err(ChannelNameError::Control { character: '\n', .. })));
        for character in ['\u{202e}', '\u{200f}', '\u{2029}', '\u{2066}', '\u{61c}'] {
            let error = ChannelName::new(format!("a{character}b")).unwrap_err();
            assert!(error.to_string().contains(&format!("U+{:04X}", u32::from(character))), "{error}");
        }
        assert!(ChannelName::new("x".repeat(255)).is_ok());
        assert!(ChannelName::new("Kamera 1/ä").is_ok());
    }
}
