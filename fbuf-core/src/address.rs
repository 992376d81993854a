//! Where a broker listens: a path, or a name in the abstract namespace (unix(7)), written `@name`.

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::sys::socket::UnixAddr;

/// The address of a broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A socket in the file system.
    Path(PathBuf),
    /// A name of the network namespace; it leaves nothing behind.
    Abstract(OsString),
}

/// The environment variable that names the broker.
pub const VARIABLE: &str = "FBUF_BROKER";

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

    /// `$FBUF_BROKER`, else `$XDG_RUNTIME_DIR/fbuf.sock`, else `/run/fbuf/broker.sock`.
    #[must_use]
    pub fn default_for_user() -> Self {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        if let Some(address) = set(VARIABLE) {
            return Self::new(address);
        }
        set("XDG_RUNTIME_DIR").map_or_else(
            || Self::Path("/run/fbuf/broker.sock".into()),
            |folder| Self::Path(Path::new(&folder).join("fbuf.sock")),
        )
    }

    /// As the kernel wants it.
    ///
    /// # Errors
    /// `InvalidInput` if it is longer than a socket address can be (107 bytes).
    pub fn to_kernel(&self) -> io::Result<UnixAddr> {
        let address = match self {
            Self::Path(path) => UnixAddr::new(path),
            Self::Abstract(name) => UnixAddr::new_abstract(name.as_bytes()),
        };
        address.map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("the socket address {self} is longer than 107 bytes"))
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Abstract(name) => write!(f, "@{}", name.display()),
        }
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
    fn an_address_that_is_too_long_is_an_error() {
        let long = Address::new(format!("/{}", "x".repeat(200)));
        assert_eq!(long.to_kernel().unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
