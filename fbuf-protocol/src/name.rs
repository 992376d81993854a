//! What people know processes and endpoints by: the program of a process, and the label that a program gives an endpoint. Both
//! are chosen by users, and say nothing about what a process is; they are safe to print.

use std::fmt;

use fbuf_core::limits::{MAX_LABEL, MAX_PROGRAM};

/// The label of an endpoint: 1 to 64 bytes of UTF-8, each character of which is seen when it is printed: no white space, and
/// none that controls how text is shown.
///
/// ```
/// use fbuf_protocol::name::{Label, LabelError};
/// assert_eq!(Label::new("decoder/2").unwrap().as_str(), "decoder/2");
/// assert_eq!(Label::new(""), Err(LabelError::Empty));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Label(String);

/// A label that no endpoint can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LabelError {
    /// No characters.
    #[error("the label is empty: give it 1 to {MAX_LABEL} bytes, or give no label")]
    Empty,
    /// Too many.
    #[error("the label has {bytes} bytes: at most {MAX_LABEL} are possible")]
    TooLong {
        /// How many it has.
        bytes: usize,
    },
    /// One that is not seen when it is printed.
    #[error(
        "the label {label:?} has the character U+{:04X} in it, which is white space or does not print: leave it out",
        u32::from(*character)
    )]
    Unprintable {
        /// The label.
        label: String,
        /// The first such character.
        character: char,
    },
}

impl Label {
    /// Checks a label.
    ///
    /// # Errors
    /// [`LabelError`]: empty, too long, or with a character that is not seen when it is printed.
    pub fn new(label: impl Into<String>) -> Result<Self, LabelError> {
        let label = label.into();
        if label.is_empty() {
            return Err(LabelError::Empty);
        }
        if label.len() > MAX_LABEL {
            return Err(LabelError::TooLong { bytes: label.len() });
        }
        if let Some(character) = label.chars().find(|&character| character.is_whitespace() || !is_seen(character)) {
            return Err(LabelError::Unprintable { label, character });
        }
        Ok(Self(label))
    }

    /// The label.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Label {
    type Error = LabelError;
    fn try_from(label: String) -> Result<Self, LabelError> {
        Self::new(label)
    }
}

impl From<Label> for String {
    fn from(label: Label) -> Self {
        label.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of the program that a process runs, as the kernel has it (comm in proc(5)): up to 15 bytes, which the process can
/// change at any time. Empty if it is not known. What cannot be printed in it is U+FFFD here, and white space is one blank.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Program(String);

impl Program {
    /// From the bytes of a name, which may be any.
    #[must_use]
    pub fn from_bytes(name: &[u8]) -> Self {
        String::from_utf8_lossy(&name[..name.len().min(MAX_PROGRAM)]).into_owned().into()
    }

    /// The name; empty if it is not known.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for Program {
    fn from(name: String) -> Self {
        let words: Vec<_> = name.split_whitespace().collect();
        let printed = |character| if is_seen(character) { character } else { char::REPLACEMENT_CHARACTER };
        Self(words.join(" ").chars().map(printed).take(MAX_PROGRAM).collect())
    }
}

impl From<Program> for String {
    fn from(program: Program) -> Self {
        program.0
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a character controls how text is shown: of the categories Cc, Zl and Zp of Unicode, or with the property
/// Bidi_Control (PropList.txt).
pub(crate) fn controls_text(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Whether something is seen where a character is printed, and nothing else is changed: it controls no text, and has not
/// the property Default_Ignorable_Code_Point (DerivedCoreProperties.txt), as those of no width have.
fn is_seen(character: char) -> bool {
    !controls_text(character)
        && !matches!(character,
            '\u{ad}' | '\u{34f}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Wire;
    use proptest::prelude::*;

    /// Escape sequences, other controls, bidirectional text, no width, white space of several kinds.
    const UNSEEN: [char; 12] = [
        '\u{1b}',
        '\n',
        '\u{7f}',
        '\u{9b}',
        '\u{202e}',
        '\u{2066}',
        '\u{61c}',
        '\u{200b}',
        '\u{feff}',
        '\u{e0041}',
        '\u{a0}',
        ' ',
    ];

    #[test]
    fn impossible_labels_are_told_apart() {
        assert_eq!(Label::new(""), Err(LabelError::Empty));
        assert_eq!(Label::new("x".repeat(65)), Err(LabelError::TooLong { bytes: 65 }));
        for character in UNSEEN {
            let error = Label::new(format!("a{character}b")).unwrap_err();
            assert!(error.to_string().contains(&format!("U+{:04X}", u32::from(character))), "{error}");
        }
        assert!(Label::new("x".repeat(64)).is_ok());
        assert!(Label::new("Müller/2 \"".replace(' ', "_")).is_ok());
    }

    #[test]
    fn impossible_labels_do_not_deserialize() {
        let bytes = postcard::to_stdvec("a\u{1b}[31m").unwrap();
        assert!(postcard::from_bytes::<Wire<Label>>(&bytes).is_err());
    }

    #[test]
    fn a_program_is_printed_whatever_it_calls_itself() {
        let printed = |name: &[u8]| String::from(Program::from_bytes(name));
        assert_eq!(printed(b"ffmpeg"), "ffmpeg");
        assert_eq!(printed(b" tmux:  server\n"), "tmux: server");
        assert_eq!(printed(b"\x1b[31mred"), "\u{fffd}[31mred");
        assert_eq!(printed("a\u{202e}b\u{200b}c".as_bytes()), "a\u{fffd}b\u{fffd}c");
        assert_eq!(printed(b"a\xffb\x9bc"), "a\u{fffd}b\u{fffd}c");
        assert_eq!(printed(b""), "");
    }

    proptest! {
        #[test]
        fn a_program_of_any_bytes_is_printed_and_stays_as_it_is(name in prop::collection::vec(any::<u8>(), 0..100)) {
            let program = Program::from_bytes(&name);
            prop_assert!(program.as_str().chars().all(|character| character == ' ' || is_seen(character)));
            prop_assert!(program.as_str().len() <= 3 * MAX_PROGRAM && !program.as_str().contains("  "));
            let program = Wire(program);
            prop_assert_eq!(postcard::from_bytes(&postcard::to_stdvec(&program).unwrap()), Ok(program));
        }
    }
}
