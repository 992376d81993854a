//! The calls for which there is no safe wrapper: membarrier(2), accepting descriptors from recvmsg(2) and
//! accept4(2), refusing them, the groups of a peer, getauxval(3), getrandom(2), the scheduling of a
//! thread, what is unread in a socket, and attributes of files.
//!
//! One of the files of this crate that may be `unsafe`.
#![allow(unsafe_code)]

use std::{
    io, mem,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{SockFlag, accept4},
};

use crate::limits::{MAX_DESCRIPTORS, MAX_GROUPS};

/// A request to membarrier(2).
#[derive(Debug, Clone, Copy)]
pub enum Membarrier {
    /// From now on, be reached by the barriers of others.
    Register = 1 << 2,
    /// A full fence on every processor that runs a registered process.
    Everywhere = 1 << 1,
}

/// Performs it.
///
/// # Errors
/// What membarrier(2) says, or a filter before it.
pub fn membarrier(command: Membarrier) -> io::Result<()> {
    // SAFETY: neither command takes a pointer or touches memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command as libc::c_int, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether this program is executed with more rights than its caller has: set-user-id, set-group-id or with capabilities
/// of its file.
#[must_use]
pub fn is_secure() -> bool {
    // SAFETY: getauxval takes a number and reads what the kernel put there when the program was executed.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// Bytes that no other process can guess; at most 256 of them, which come all at once (getrandom(2)).
///
/// # Errors
/// What getrandom(2) says, or a filter before it.
pub fn random<const COUNT: usize>() -> io::Result<[u8; COUNT]> {
    const { assert!(COUNT <= 256) };
    let mut bytes = [0; COUNT];
    // SAFETY: `bytes` has `COUNT` bytes, which the kernel fills.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), COUNT, 0) };
    if usize::try_from(filled) == Ok(COUNT) { Ok(bytes) } else { Err(in_call("getrandom")(io::Error::last_os_error())) }
}

/// Whether a file may have more than a few extended attributes, which the kernel frees with it one by one. It looks at no more
/// than their first names.
pub(crate) fn has_attributes(file: BorrowedFd<'_>) -> bool {
    let mut names = [0; 64];
    // SAFETY: `names` has so many bytes, which the kernel may fill.
    let length = unsafe { libc::flistxattr(file.as_raw_fd(), names.as_mut_ptr().cast(), names.len()) };
    // More do not fit (ERANGE). Not all kernels know them.
    length < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EOPNOTSUPP)
}

/// Words of room for the descriptors of one message: their header, and four bytes each.
const CONTROL_WORDS: usize = 4 + MAX_DESCRIPTORS / 2;

/// What [`receive`] took from a socket.
pub(crate) struct Packet {
    /// How many bytes of the buffer are its text.
    pub length: usize,
    /// The descriptors that came with it, closed on exec.
    pub descriptors: Vec<OwnedFd>,
    /// Text did not fit and is lost.
    pub truncated: bool,
    /// Descriptors did not fit, here or into this process's table, and are lost.
    pub descriptors_lost: bool,
    /// Anything came beside the text.
    accompanied: bool,
}

/// Takes one message from a socket, without waiting, and without its descriptors: this thread closes them.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Packet> {
    receive_with(socket, buffer, 0, 0)
}

/// Whether so much memory could be mapped just now.
#[cfg(not(miri))]
pub(crate) fn try_map(bytes: usize) -> io::Result<()> {
    let (access, kind) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new mapping takes the place of no other.
    let found = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, -1, 0) };
    if found == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was mapped just now, and nothing points into it.
    unsafe { libc::munmap(found, bytes) };
    Ok(())
}

/// Looks at the next message of a socket, without waiting, and takes at most so many descriptors that it carries: a
/// second reference to each. The message stays where it is.
pub(crate) fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8], descriptors: usize) -> io::Result<Packet> {
    receive_with(socket, buffer, descriptors.min(MAX_DESCRIPTORS) * size_of::<RawFd>(), libc::MSG_PEEK)
}

/// What waits first in a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum First {
    /// Nothing.
    Nothing,
    /// A message without descriptors.
    Text,
    /// A message with descriptors.
    Descriptors,
}

/// Looks what waits first in a socket that is told the credentials of each sender (SO_PASSCRED): these come with each
/// message, also with one of no bytes, and not at the end.
pub(crate) fn first(socket: BorrowedFd<'_>) -> io::Result<First> {
    match receive_with(socket, &mut [], size_of::<libc::ucred>(), libc::MSG_PEEK) {
        Ok(packet) if packet.descriptors_lost => Ok(First::Descriptors),
        Ok(packet) if packet.accompanied => Ok(First::Text),
        Ok(_) => Ok(First::Nothing),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(First::Nothing),
        Err(error) => Err(error),
    }
}

fn receive_with(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    control_bytes: usize,
    flag: libc::c_int,
) -> io::Result<Packet> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid msghdr: no name, no parts, no control.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if control_bytes > 0 {
        debug_assert!(control_bytes <= MAX_DESCRIPTORS * size_of::<RawFd>());
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: CMSG_LEN is arithmetic. What it says is less than `control` has.
        header.msg_controllen = unsafe { libc::CMSG_LEN(control_bytes as libc::c_uint) } as _;
    }
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT | flag;
    // SAFETY: the header points at `part` and `control`, which live here, with their true sizes.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    Ok(Packet {
        length,
        // SAFETY: the kernel has filled in `header` and `control`.
        descriptors: unsafe { descriptors(&header) },
        truncated: header.msg_flags & libc::MSG_TRUNC != 0,
        descriptors_lost: header.msg_flags & libc::MSG_CTRUNC != 0,
        accompanied: control_bytes > 0 && header.msg_controllen > 0,
    })
}

/// Whether messages with descriptors may be sent to a socket (socket(7), Linux 6.16).
const SO_PASSRIGHTS: libc::c_int = 83;

/// Has the kernel refuse each message with descriptors that is sent to this socket from now on, with EPERM; of a
/// listening socket, also those to connections that are made from now on.
///
/// # Errors
/// `ENOPROTOOPT` on a kernel before 6.16. What else setsockopt(2) says.
pub fn refuse_descriptors(socket: BorrowedFd<'_>) -> io::Result<()> {
    let no: libc::c_int = 0;
    // SAFETY: `no` lives here, and has as many bytes as is said.
    let result = unsafe {
        let (place, size) = ((&raw const no).cast(), size_of_val(&no) as libc::socklen_t);
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, place, size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether the kernel refuses messages with descriptors that are sent to this socket.
#[must_use]
pub fn refuses_descriptors(socket: BorrowedFd<'_>) -> bool {
    let mut passes: libc::c_int = 1;
    let mut size = size_of_val(&passes) as libc::socklen_t;
    // SAFETY: `passes` has `size` bytes, and `size` is where the kernel says how many it has filled in.
    let result = unsafe {
        let place = (&raw mut passes).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, place, &raw mut size)
    };
    result == 0 && passes == 0
}

/// How many bytes that were sent over a socket the peer has not read, as the kernel counts them against its send
/// buffer (SIOCOUTQ in unix(7)).
pub(crate) fn unread_bytes(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which is TIOCOUTQ, stores one int, for which there is room.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 { Ok(bytes.max(0) as usize) } else { Err(io::Error::last_os_error()) }
}

/// All descriptors of a message, also where some were lost: what came must be closed.
///
/// # Safety
/// `header` is as a successful recvmsg left it, its control buffer is 8-aligned and not yet read.
unsafe fn descriptors(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut found = Vec::new();
    // SAFETY: the macros walk the control messages that the kernel wrote, within `msg_controllen`.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = at.as_ref() {
            if message.cmsg_level == libc::SOL_SOCKET && message.cmsg_type == libc::SCM_RIGHTS {
                let bytes = message.cmsg_len - libc::CMSG_LEN(0) as usize;
                let first = libc::CMSG_DATA(at).cast::<RawFd>();
                // The kernel has just made these for us and told nobody else.
                found.extend((0..bytes / size_of::<RawFd>()).map(|n| own(first.add(n).read_unaligned())));
            }
            at = libc::CMSG_NXTHDR(header, at);
        }
    }
    found
}

/// The supplementary groups of the peer of a connected socket, or `ERANGE` if they are more than a client may be in.
pub(crate) fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups = vec![0u32; 32];
    loop {
        let mut size = size_of_val(&groups[..]) as libc::socklen_t;
        // SAFETY: `groups` has `size` bytes, and `size` is where the kernel says how many it has filled in.
        let result = unsafe {
            let place = groups.as_mut_ptr().cast();
            libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERGROUPS, place, &raw mut size)
        };
        let found = size as usize / size_of::<u32>();
        match io::Error::last_os_error() {
            _ if result == 0 => {
                groups.truncate(found);
                return Ok(groups);
            }
            error if error.raw_os_error() == Some(libc::ERANGE) && found > groups.len() && found <= MAX_GROUPS => {
                groups.resize(found, 0);
            }
            error => return Err(error),
        }
    }
}

/// The priority of this thread, if it runs under SCHED_FIFO or SCHED_RR.
pub(crate) fn real_time_priority() -> Option<i32> {
    // SAFETY: it takes a number, and changes no memory of this process.
    let policy = unsafe { libc::sched_getscheduler(0) };
    if !matches!(policy, libc::SCHED_FIFO | libc::SCHED_RR) {
        return None;
    }
    // SAFETY: all-zero is a valid sched_param, which holds nothing but numbers.
    let mut parameters: libc::sched_param = unsafe { mem::zeroed() };
    // SAFETY: `parameters` lives here.
    let result = unsafe { libc::sched_getparam(0, &raw mut parameters) };
    (result == 0).then_some(parameters.sched_priority)
}

/// Has this thread run under SCHED_FIFO at this priority, or at the highest that there is.
pub(crate) fn set_real_time_priority(priority: i32) -> io::Result<()> {
    // SAFETY: it takes a number, and changes no memory of this process.
    let highest = unsafe { libc::sched_get_priority_max(libc::SCHED_FIFO) };
    schedule(libc::SCHED_FIFO, priority.min(highest))
}

/// Has this thread run under SCHED_OTHER.
pub(crate) fn leave_real_time() -> io::Result<()> {
    schedule(libc::SCHED_OTHER, 0)
}

fn schedule(policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    // SAFETY: all-zero is a valid sched_param, which holds nothing but numbers.
    let mut parameters: libc::sched_param = unsafe { mem::zeroed() };
    parameters.sched_priority = priority;
    // SAFETY: `parameters` lives here and is only read.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has a write beyond RLIMIT_FSIZE return an error (EFBIG), in place of a signal that kills. For the whole process, and
/// for what it executes.
pub fn ignore_file_size_signal() {
    // SAFETY: to ignore a signal takes no handler. It cannot fail for this one.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Takes the next connection from a listening socket, without waiting.
///
/// # Errors
/// What accept4(2) says; `WouldBlock` when nobody is waiting.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let raw = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: the kernel has just made it for us and told nobody else.
    Ok(unsafe { own(raw) })
}

/// What the kernel said to a call.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {error}")]
struct Refused {
    call: &'static str,
    error: io::Error,
}

/// Names the call in its error. What the kernel said is found by [`os_error`].
pub fn in_call<E: Into<io::Error>>(call: &'static str) -> impl Fn(E) -> io::Error {
    move |error| {
        let error = error.into();
        io::Error::new(error.kind(), Refused { call, error })
    }
}

/// What the kernel said, also if the error names its [call](in_call).
#[must_use]
pub fn os_error(error: &io::Error) -> Option<Errno> {
    let refused = error.get_ref().and_then(|error| error.downcast_ref::<Refused>());
    refused.map_or(error, |refused| &refused.error).raw_os_error().map(Errno::from_raw)
}

/// In brackets, what an error of the kernel stands for, if that can be changed.
#[must_use]
pub fn limit_behind(error: &io::Error) -> &'static str {
    match os_error(error) {
        Some(Errno::EMFILE) => " (the limit of this process, RLIMIT_NOFILE: raise it with ulimit -n)",
        Some(Errno::ENFILE) => " (the limit of the machine, fs.file-max)",
        Some(Errno::EAGAIN) => {
            " (a limit on threads, RLIMIT_NPROC or pids.max of a control group; no memory for a stack, RLIMIT_AS or RLIMIT_DATA; or \
             the policy SCHED_DEADLINE, under which a thread starts no other)"
        }
        Some(Errno::ENOMEM) => " (no memory: free some, or raise RLIMIT_AS or the limit of the control group)",
        Some(Errno::EPERM | Errno::ENOSYS) => {
            " (a seccomp filter of this process or its container may refuse the call)"
        }
        Some(Errno::ENOBUFS) => " (no memory for what is sent: free some, or raise the limit of the control group)",
        _ => "",
    }
}

/// An error in words, with [what it stands for](limit_behind).
#[must_use]
pub fn said(error: &io::Error) -> String {
    format!("{error}{}", limit_behind(error))
}

/// # Safety
/// The descriptor is open and nobody else's.
unsafe fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: as the caller promises.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_names_its_call_is_that_of_the_kernel_still() {
        let error = in_call("epoll_create1")(Errno::EMFILE);
        assert_eq!(os_error(&error), Some(Errno::EMFILE));
        assert_eq!(os_error(&io::Error::other("no call")), None);
        let text = said(&error);
        assert!(text.starts_with("epoll_create1: Too many open files") && text.contains("ulimit -n"), "{text}");
        let text = said(&in_call("pthread_create")(Errno::EAGAIN));
        assert!(text.contains("RLIMIT_NPROC") && text.contains("RLIMIT_AS or RLIMIT_DATA"), "{text}");
        assert!(text.contains("SCHED_DEADLINE"), "{text}");
    }
}
