//! Descriptors that children do not get.

use std::{
    ops::Deref,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use super::withheld;

/// What owns a descriptor, always the same one, for as long as it lives. Which types do is settled here: to register the
/// number of a descriptor that is closed meanwhile would have children close what has got that number since.
mod owner {
    use std::{
        os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        sync::Arc,
    };

    use nix::sys::{epoll::Epoll, eventfd::EventFd, timerfd::TimerFd};

    pub trait Owner {
        fn number(&self) -> RawFd;
    }

    impl Owner for OwnedFd {
        fn number(&self) -> RawFd {
            self.as_raw_fd()
        }
    }

    impl Owner for EventFd {
        fn number(&self) -> RawFd {
            self.as_fd().as_raw_fd()
        }
    }

    impl Owner for Epoll {
        fn number(&self) -> RawFd {
            self.0.as_raw_fd()
        }
    }

    impl Owner for TimerFd {
        fn number(&self) -> RawFd {
            self.as_fd().as_raw_fd()
        }
    }

    impl<T: Owner> Owner for Arc<T> {
        fn number(&self) -> RawFd {
            (**self).number()
        }
    }
}

/// A descriptor in the place of which children get one that is connected to nothing: an `OwnedFd`, an eventfd, a timerfd or
/// an epoll, or an `Arc` of one.
///
/// ```
/// use fbuf_core::process::fork::Withheld;
/// use std::{fs::File, os::fd::{AsFd, OwnedFd}};
///
/// let file = Withheld::from(OwnedFd::from(File::open("/dev/null")?));
/// let _descriptor = file.as_fd();
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// It owns the descriptor. One that is only borrowed could be closed, and its number be that of another:
///
/// ```compile_fail,E0277
/// use fbuf_core::process::fork::Withheld;
/// use std::{fs::File, os::fd::AsFd};
///
/// let file = File::open("/dev/null").unwrap();
/// let _withheld = Withheld::from(file.as_fd());
/// ```
#[derive(Debug)]
pub struct Withheld<T: owner::Owner> {
    registered: Registered,
    // Closed when it is registered no more.
    descriptor: T,
}

/// The number of a descriptor that is closed after this is dropped.
#[derive(Debug)]
struct Registered(RawFd);

impl<T: owner::Owner> From<T> for Withheld<T> {
    fn from(descriptor: T) -> Self {
        let number = descriptor.number();
        set_withheld(number, true);
        Self { registered: Registered(number), descriptor }
    }
}

impl<T: owner::Owner> Withheld<T> {
    /// The descriptor, which children share from here on.
    pub fn into_inner(self) -> T {
        drop(self.registered);
        self.descriptor
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        set_withheld(self.0, false);
    }
}

impl<T: owner::Owner> Deref for Withheld<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.descriptor
    }
}

impl<T: owner::Owner + AsFd> AsFd for Withheld<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl<T: owner::Owner> AsRawFd for Withheld<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.registered.0
    }
}

fn set_withheld(number: RawFd, is_withheld: bool) {
    let (word, bit) = (number as usize / 64, 1 << (number % 64));
    let mut withheld = withheld();
    if withheld.descriptors.len() <= word {
        withheld.descriptors.resize(word + 1, 0);
    }
    let word = &mut withheld.descriptors[word];
    *word = if is_withheld { *word | bit } else { *word & !bit };
}
