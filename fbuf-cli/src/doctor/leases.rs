//! Read leases on memfds, by which the leased level recycles large slots: granted only where nobody
//! can write, and heard of before anybody will.
//!
//! The kernel tells a lease's holder of its end by a signal, which kills a process by default. So all of
//! this happens in a thread of its own, which blocks signals and has this one sent to itself alone; what is
//! left pending ends with the thread. The rest of the process never hears of it.

use std::{
    fs::File,
    io,
    os::{
        fd::AsFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    thread,
};

use fbuf_core::process::lease::{BreakSignal, Breaks, Lease, lease};
use nix::{errno::Errno, fcntl::OFlag};

use super::{
    finding::{Consequence, Finding, Section, Setback, first, refused, works},
    memfd::{reopen, setting, small},
};

const NO_LEASE: Consequence = Consequence {
    follows: "Large slots of the leased level are copied instead.",
    remedy: "Allow F_SETLEASE, F_SETOWN_EX and signalfd in the seccomp filter; else, a kernel with \
             CONFIG_FILE_LOCKING.",
};

/// The group.
pub fn section() -> Section {
    let trials: [(_, Trial); 3] = [
        ("lease beside a writer", beside_a_writer),
        ("lease without a writer", without_a_writer),
        ("opening a leased one", opening_a_leased_one),
    ];
    let mut findings: Vec<_> =
        trials.map(|(name, trial)| Finding::tried(name, apart(trial), NO_LEASE)).into_iter().collect();
    findings.push(Finding::fact(
        "maker's descriptor",
        apart(makers_descriptor).unwrap_or_else(|setback| match setback {
            Setback::WorksNot(seen) | Setback::Untried(seen) => format!("unknown: {seen}"),
        }),
    ));
    findings.push(Finding::fact(
        "fs.lease-break-time",
        setting("/proc/sys/fs/lease-break-time").map_or("cannot be read".into(), |seconds| {
            format!("{seconds} s until the kernel takes a lease away from a holder that does not answer")
        }),
    ));
    Section { title: "Leases", findings }
}

type Trial = fn(&Breaks) -> Result<String, Setback>;

/// Runs a trial in a thread that no signal hits.
fn apart(trial: Trial) -> Result<String, Setback> {
    let signal = BreakSignal::free();
    let blocked = move || trial(&first("signalfd", Breaks::here(signal))?);
    let thread = first("starting a thread", thread::Builder::new().spawn(blocked))?;
    thread.join().unwrap_or_else(|_| Err(Setback::Untried("the probing thread ended early".into())))
}

/// Takes a read lease whose end is told to this thread. The kernel forgets which thread to tell when a lease
/// is given up, so it is said anew each time.
fn take(reader: &File, breaks: &Breaks) -> io::Result<()> {
    Breaks::are_for(breaks.told(), reader.as_fd())?;
    lease(reader.as_fd(), Lease::Read)
}

/// A memfd opened read-only and read-write, with the descriptor of its maker closed.
fn reopened() -> Result<(File, File), Setback> {
    let made = small()?;
    let reader = first("opening it read-only", reopen(&made, File::options().read(true)))?;
    let writer = first("opening it for writing", reopen(&made, File::options().read(true).write(true)))?;
    Ok((reader, writer))
}

fn beside_a_writer(breaks: &Breaks) -> Result<String, Setback> {
    let (reader, _writer) = reopened()?;
    refused("a lease beside a writer", take(&reader, breaks), &[Errno::EAGAIN])?;
    Ok("refused while a descriptor is open that was reopened for writing".into())
}

fn without_a_writer(breaks: &Breaks) -> Result<String, Setback> {
    let (reader, writer) = reopened()?;
    drop(writer);
    works("F_SETLEASE", take(&reader, breaks))?;
    works("giving it up", lease(reader.as_fd(), Lease::Release))?;
    works("opening it for writing afterwards", open_for_writing(&reader))?;
    Ok("granted once that is closed, and given up again".into())
}

fn opening_a_leased_one(breaks: &Breaks) -> Result<String, Setback> {
    let (reader, writer) = reopened()?;
    drop(writer);
    first("F_SETLEASE", take(&reader, breaks))?;
    let opened = open_for_writing(&reader);
    let heard = breaks.next();
    works("giving it up", lease(reader.as_fd(), Lease::Release))?;
    refused("opening it for writing", opened, &[Errno::EWOULDBLOCK])?;
    match heard {
        Some(_) => Ok("opening it for writing has to wait, and the holder was told before".into()),
        None => Err(Setback::WorksNot("opening it for writing has to wait, but the holder was not told".into())),
    }
}

/// Without waiting: where a lease is in the way, this begins to break it and fails.
fn open_for_writing(reader: &File) -> io::Result<File> {
    reopen(reader, File::options().write(true).custom_flags(OFlag::O_NONBLOCK.bits()))
}

fn makers_descriptor(breaks: &Breaks) -> Result<String, Setback> {
    let made = small()?;
    let reader = first("opening it read-only", reopen(&made, File::options().read(true)))?;
    match take(&reader, breaks) {
        Ok(()) => {
            let writes = if made.write_at(b"x", 0).is_ok() { "and writes while one is held" } else { "but is held up" };
            Ok(format!(
                "the one that memfd_create returns does not stand in the way of a lease, {writes}: \
                 close it before anybody takes one"
            ))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Ok("the one that memfd_create returns counts as a writer, as it should".into())
        }
        Err(error) => Err(Setback::Untried(format!("F_SETLEASE: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breaking_a_lease_is_heard_and_kills_nobody() {
        let seen = apart(opening_a_leased_one).unwrap();
        assert!(seen.contains("the holder was told"), "{seen}");
        let blocked = nix::sys::signal::SigSet::thread_get_mask().unwrap();
        assert!(!blocked.contains(nix::sys::signal::Signal::SIGIO), "SIGIO stayed blocked");
    }

    #[test]
    fn a_lease_and_a_writer_exclude_each_other() {
        apart(beside_a_writer).unwrap();
        apart(without_a_writer).unwrap();
    }
}
