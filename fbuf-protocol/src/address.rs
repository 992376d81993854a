//! Where a broker listens: a path, or a name in the abstract namespace (unix(7)), written `@name`.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt::{self, Write},
    fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use fbuf_core::process::sys;
use nix::{errno::Errno, sys::socket::UnixAddr};

/// The address of a broker.
///
/// ```
/// use fbuf_protocol::address::Address;
/// assert_eq!(Address::new("/run/fbuf/broker.sock"), Address::Path("/run/fbuf/broker.sock".into()));
/// assert_eq!(Address::new("@test"), Address::Abstract("test".into()));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A socket in the file system.
    Path(PathBuf),
    /// A name of the network namespace; it leaves nothing behind.
    Abstract(OsString),
}

/// The environment variable that names the broker.
pub const VARIABLE: &str = "FBUF_BROKER";
/// The one that names the folder for the sockets of a user that has logged in (XDG Base Directory Specification).
const RUNTIME_FOLDER: &str = "XDG_RUNTIME_DIR";

impl Address {
    /// Reads an address as a user writes it.
    #[must_use]
    pub fn new(text: impl AsRef<OsStr>) -> Self {
        let text = text.as_ref();
        match text.as_bytes().strip_prefix(b"@") {
            Some(name) => Self::Abstract(OsStr::from_bytes(name).to_owned()),
            None => Self::Path(PathBuf::from(text)),
        }
    }

    /// Where a client of this user looks for its broker, one after the other: at `$FBUF_BROKER` if that is set; else at
    /// `$XDG_RUNTIME_DIR/fbuf.sock` and at `/run/fbuf/broker.sock`. In a program that is executed with more rights than its
    /// caller has (AT_SECURE in getauxval(3)), the environment is the caller's, and is not asked. Nor is a
    /// `$XDG_RUNTIME_DIR` that is no folder of this user: su(1) keeps that of the user of before.
    #[must_use]
    pub fn defaults() -> Vec<Self> {
        if let Some(address) = variable(VARIABLE) {
            return vec![Self::new(address)];
        }
        let own = runtime_folder().filter(|folder| is_own_folder(folder));
        let own = own.map(|folder| Self::Path(folder.join("fbuf.sock")));
        own.into_iter().chain([Self::Path("/run/fbuf/broker.sock".into())]).collect()
    }

    /// Where a broker of this user listens: the first of [`Self::defaults`].
    #[must_use]
    pub fn default_for_user() -> Self {
        Self::defaults().swap_remove(0)
    }

    /// The same place, in whatever folder this process is later.
    ///
    /// # Errors
    /// When there is no folder in which this process is.
    pub fn to_absolute(&self) -> io::Result<Self> {
        match self {
            // For what it says of it.
            Self::Path(path) if path.as_os_str().is_empty() => self.to_kernel().map(|_| self.clone()),
            Self::Path(path) => Ok(Self::Path(std::path::absolute(path)?)),
            Self::Abstract(_) => Ok(self.clone()),
        }
    }

    /// As the kernel wants it.
    ///
    /// # Errors
    /// `InvalidInput` if it is empty, if it is a path with a NUL character in it, or if it is longer than a socket address can be
    /// (107 bytes).
    pub fn to_kernel(&self) -> io::Result<UnixAddr> {
        let (address, name) = match self {
            Self::Path(path) => (UnixAddr::new(path), path.as_os_str()),
            Self::Abstract(name) => (UnixAddr::new_abstract(name.as_bytes()), name.as_os_str()),
        };
        let wrong = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        match address {
            _ if name.is_empty() => wrong("a socket address is empty: a path is needed, or @ and a name".into()),
            Ok(address) => Ok(address),
            Err(Errno::ENAMETOOLONG) => {
                wrong(format!("the socket address {self} is longer than 107 bytes: choose a shorter one"))
            }
            // Of a path with a NUL character.
            Err(Errno::EINVAL) => {
                wrong(format!("the socket address {self} has a NUL character in it, which no path may have"))
            }
            Err(error) => wrong(format!("the socket address {self} cannot be used: {error}")),
        }
    }
}

/// Why a variable that names a broker's place is left aside, if one is.
#[must_use]
pub fn set_aside() -> Option<String> {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    if sys::is_secure() && (is_set(VARIABLE) || is_set(RUNTIME_FOLDER)) {
        return Some("the environment is that of a caller with fewer rights, and is not asked".into());
    }
    let foreign = runtime_folder().filter(|folder| variable(VARIABLE).is_none() && !is_own_folder(folder))?;
    Some(format!("{RUNTIME_FOLDER} is {}, which is no folder of this user, and is left aside", foreign.display()))
}

/// A variable of the environment, unless that is the environment of a caller with fewer rights.
fn variable(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty() && !sys::is_secure())
}

fn runtime_folder() -> Option<PathBuf> {
    variable(RUNTIME_FOLDER).map(PathBuf::from)
}

fn is_own_folder(folder: &Path) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    folder.is_absolute() && fs::metadata(folder).is_ok_and(|found| found.is_dir() && found.uid() == own)
}

/// As a user writes it, but for control characters, which are escaped: it comes to terminals and logs.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, name) = match self {
            Self::Path(path) => ("", path.as_os_str()),
            Self::Abstract(name) => ("@", name.as_os_str()),
        };
        f.write_str(sign)?;
        name.to_string_lossy().chars().try_for_each(|character| match character.is_control() {
            true => write!(f, "{}", character.escape_debug()),
            false => f.write_char(character),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_at_sign_means_abstract() {
        assert_eq!(Address::new("@x"), Address::Abstract("x".into()));
        assert_eq!(Address::new("/run/x"), Address::Path("/run/x".into()));
        for text in ["@x", "/run/x"] {
            assert_eq!(Address::new(text).to_string(), text);
            assert!(Address::new(text).to_kernel().is_ok());
        }
    }

    #[test]
    fn an_address_that_cannot_be_is_refused_with_what_is_wrong() {
        let said = |text: &str| {
            let error = Address::new(text).to_kernel().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            let said = error.to_string();
            assert!(!said.contains(char::is_control), "{said:?}");
            said
        };
        let long = "x".repeat(200);
        for text in [format!("/{long}"), format!("@{long}")] {
            assert_eq!(
                said(&text),
                format!("the socket address {text} is longer than 107 bytes: choose a shorter one")
            );
        }
        assert_eq!(said("a\0b"), "the socket address a\\0b has a NUL character in it, which no path may have");
        for text in ["", "@"] {
            let wanted = "a socket address is empty: a path is needed, or @ and a name";
            assert_eq!(said(text), wanted);
            assert!(
                Address::new(text)
                    .to_absolute()
                    .and_then(|address| address.to_kernel())
                    .is_err_and(|error| error.to_string() == wanted)
            );
        }
    }

    #[test]
    fn an_address_is_shown_without_control_characters() {
        let shown = |text: &str| Address::new(text).to_string();
        assert_eq!(shown("/run/\x1b[2J\n"), "/run/\\u{1b}[2J\\n");
        assert_eq!((shown("@ä \0"), shown("/a\\b'c")), ("@ä \\0".into(), "/a\\b'c".into()));
    }
}
