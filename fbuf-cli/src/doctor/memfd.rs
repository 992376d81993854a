//! Memfds: whether they can be made as fbuf makes them, and which processes can reopen them.

use std::{
    error::Error,
    fs::{File, OpenOptions, Permissions, read_to_string},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{FileExt, PermissionsExt},
    },
};

use ::memfd::MemfdOptions;
use fbuf_core::memory::{Trial, try_page};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

use super::finding::{Consequence, Finding, Section, Setback, first, refused, works};

/// The name under which the memfds of the probes show in /proc/PID/maps.
pub const NAME: &str = "fbuf-doctor";
/// The size of these memfds: a page, and one more to cut off.
pub const SIZE: u64 = 2 * PAGE;
/// No page of Linux is smaller.
pub const PAGE: u64 = 4096;

/// MFD_NOEXEC_SEAL and F_SEAL_EXEC of linux/memfd.h and linux/fcntl.h.
const NO_EXECUTION: MFdFlags = MFdFlags::from_bits_retain(8);
const EXECUTION_SEALED: i32 = 0x20;

const PROC: Consequence = Consequence {
    follows: "Readers cannot be given a descriptor that is read-only, and nothing can be leased.",
    remedy: "Mount /proc; raise `ulimit -n` if descriptors ran out.",
};

/// A memfd of [`SIZE`] zeroes, created as fbuf does.
pub fn small() -> Result<File, Setback> {
    first("memfd_create", create())
}

fn create() -> Result<File, String> {
    let memfd = MemfdOptions::new().allow_sealing(true).create(NAME);
    // The crate's error says what was done, and only its source why it failed.
    let file = memfd.map_err(|error| error.source().unwrap_or(&error).to_string())?.into_file();
    file.set_len(SIZE).map_err(|error| error.to_string())?;
    Ok(file)
}

/// Opens the same memfd once more.
pub fn reopen(file: &impl AsRawFd, options: &OpenOptions) -> io::Result<File> {
    options.open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The group.
pub fn section() -> Section {
    let findings = vec![
        Finding::tried(
            "memfd with sealing",
            sealable(),
            Consequence {
                follows: "No buffer can be made.",
                remedy: "Set vm.memfd_noexec to 1 where it is 2 (below); raise `ulimit -n` where it is a handful; allow memfd_create and fcntl in the seccomp \
                         filter; else, a kernel with CONFIG_MEMFD_CREATE.",
            },
        )
        .required(),
        Finding::tried(
            "close-on-exec",
            closed_on_exec(),
            Consequence {
                follows: "Programs that a user of fbuf starts inherit its memory.",
                remedy: "Report it: every kernel with memfd_create knows MFD_CLOEXEC.",
            },
        ),
        Finding::tried(
            "MFD_NOEXEC_SEAL",
            never_executable(),
            Consequence {
                follows: "Memfds carry execute permission, which a hardened system may audit; fbuf does without.",
                remedy: "Nothing; kernel 6.3 or later has it.",
            },
        ),
        execution_policy(),
    ];
    Section { title: "Memory files", findings }
}

fn sealable() -> Result<String, Setback> {
    let file = works("memfd_create", create())?;
    let seals = works("F_GET_SEALS", fcntl(&file, FcntlArg::F_GET_SEALS))?;
    if seals & SealFlag::F_SEAL_SEAL.bits() != 0 {
        return Err(Setback::WorksNot("it is made, but takes no seals".into()));
    }
    Ok("made, and open for seals".into())
}

fn closed_on_exec() -> Result<String, Setback> {
    let file = small()?;
    let flags = works("F_GETFD", fcntl(&file, FcntlArg::F_GETFD))?;
    if flags & FdFlag::FD_CLOEXEC.bits() == 0 {
        return Err(Setback::WorksNot("the descriptor would be inherited".into()));
    }
    Ok("the descriptor is not inherited by programs".into())
}

fn never_executable() -> Result<String, Setback> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | NO_EXECUTION;
    let file = File::from(works("memfd_create", memfd_create(NAME, flags))?);
    let seals = works("F_GET_SEALS", fcntl(&file, FcntlArg::F_GET_SEALS))?;
    let mode = works("fstat", file.metadata())?.permissions().mode() & 0o777;
    if seals & EXECUTION_SEALED == 0 || mode & 0o111 != 0 {
        return Err(Setback::WorksNot(format!("the flag is taken, yet the mode is {mode:04o}, seals {seals:#x}")));
    }
    Ok(format!("made without execute permission (mode {mode:04o}), for good"))
}

fn execution_policy() -> Finding {
    let name = "vm.memfd_noexec";
    match setting("/proc/sys/vm/memfd_noexec").as_deref() {
        None => Finding::fact(name, "not there: memfds with execute permission are allowed"),
        Some("0") => Finding::fact(name, "0: memfds with execute permission are allowed"),
        Some("1") => Finding::fact(name, "1: memfds are made without execute permission unless they ask for it"),
        // From kernel 6.3 to 6.5, 2 refuses a process that does not ask for MFD_NOEXEC_SEAL; later, only one that
        // asks for execute permission. fbuf asks for neither, so making one tells which it is.
        Some(value) => Finding::tried(
            name,
            match create() {
                Ok(_) => Ok(format!("{value}: execute permission is refused, for which fbuf does not ask")),
                Err(error) => Err(Setback::WorksNot(format!("{value}, and memfd_create says: {error}"))),
            },
            Consequence {
                follows: "Memfds made without MFD_NOEXEC_SEAL may be refused, and fbuf does not set that flag.",
                remedy: "`sysctl vm.memfd_noexec=1` gives the same protection without refusing; or kernel 6.6.",
            },
        ),
    }
}

/// What a file of /proc or /sys says.
pub fn setting(path: &str) -> Option<String> {
    Some(read_to_string(path).ok()?.trim().to_owned())
}

/// The group about opening a memfd again.
pub fn reopening() -> Section {
    let findings = vec![
        Finding::tried("read-only reopening", read_only(), PROC),
        Finding::tried(
            "mode bits",
            mode_bits(),
            Consequence {
                follows: "Another user that holds a read-only descriptor of an unsealed memfd can make it writable.",
                remedy: "Allow fchmod in the seccomp filter.",
            },
        ),
    ];
    Section { title: "Reopening through /proc/self/fd", findings }
}

fn read_only() -> Result<String, Setback> {
    let file = small()?;
    let reader = works("opening", reopen(&file, File::options().read(true)))?;
    works("mapping it to read", try_page(reader.as_fd(), Trial::Shared))?;
    refused("writing through it", reader.write_at(b"x", 0), &[Errno::EBADF])?;
    refused("mapping it to write", try_page(reader.as_fd(), Trial::SharedWritable), &[Errno::EACCES])?;
    refused("upgrading its mapping", try_page(reader.as_fd(), Trial::MadeWritable), &[Errno::EACCES])?;
    Ok("gives a descriptor that reads and maps, and neither writes nor maps writable".into())
}

fn mode_bits() -> Result<String, Setback> {
    let file = small()?;
    let mode = |file: &File| Ok::<_, io::Error>(file.metadata()?.permissions().mode() & 0o777);
    let before = works("fstat", mode(&file))?;
    works("fchmod 0600", file.set_permissions(Permissions::from_mode(0o600)))?;
    let after = works("fstat", mode(&file))?;
    if after != 0o600 {
        return Err(Setback::WorksNot(format!("fchmod 0600 left them at {after:04o}")));
    }
    Ok(format!(
        "memfd_create gives {before:04o}: until it is sealed, a process with even a read-only descriptor, \
         under any user id, can reopen it for writing. fchmod 0600 works, and leaves that to its owner and root"
    ))
}
