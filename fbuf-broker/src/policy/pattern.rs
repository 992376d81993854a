//! Patterns of channel names.

use fbuf_protocol::channel::{ChannelName, ChannelNameError};

/// A pattern of channel names: `*` stands for any characters, also none, and `/` among them; every other character
/// stands for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern(ChannelName);

impl Pattern {
    /// Checks a pattern.
    ///
    /// # Errors
    /// [`ChannelNameError`]: no channel has such a name.
    pub(super) fn new(text: String) -> Result<Self, ChannelNameError> {
        ChannelName::new(text).map(Self)
    }

    /// All channels.
    pub(super) fn any() -> Option<Self> {
        Self::new("*".into()).ok()
    }

    pub(super) fn as_str(&self) -> &str {
        self.0.as_str()
    }

    pub(super) fn matches(&self, name: &ChannelName) -> bool {
        let mut parts = self.as_str().split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = name.as_str().strip_prefix(first) else { return false };
        let Some(last) = parts.next_back() else { return rest.is_empty() };
        // The first place where a part stands leaves most for those behind it.
        for part in parts {
            let Some(at) = rest.find(part) else { return false };
            rest = &rest[at + part.len()..];
        }
        rest.ends_with(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_is_any_characters_and_nothing_else_is_special() {
        let matches =
            |pattern: &str, name: &str| Pattern::new(pattern.into()).unwrap().matches(&ChannelName::new(name).unwrap());
        for (pattern, names) in [
            ("*", &["a", "a/b"][..]),
            ("camera/*", &["camera/1", "camera/", "camera/1/left"]),
            ("*/left", &["camera/left", "/left"]),
            ("a*b*c", &["abc", "a-b-c", "abbcc", "ab/cbc"]),
            ("ab[cd]", &["ab[cd]"]),
            ("a?", &["a?"]),
            ("a**b", &["ab", "a/b"]),
        ] {
            for name in names {
                assert!(matches(pattern, name), "{pattern} and {name}");
            }
        }
        for (pattern, names) in [
            ("camera/*", &["camera", "a/camera/1"][..]),
            ("a*b*c", &["ac", "abcd", "bac"]),
            ("ab*ba", &["aba"]),
            ("ab[cd]", &["abc", "abd"]),
            ("a?", &["ab", "a"]),
            ("exact", &["exactly", "an exact"]),
        ] {
            for name in names {
                assert!(!matches(pattern, name), "{pattern} and {name}");
            }
        }
    }

    #[test]
    fn what_names_no_channel_is_no_pattern() {
        assert_eq!(Pattern::new(String::new()), Err(ChannelNameError::Empty));
        assert!(matches!(Pattern::new("a\u{202e}*".into()), Err(ChannelNameError::Control { .. })));
    }
}
