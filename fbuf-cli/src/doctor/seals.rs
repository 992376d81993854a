//! Seals: whether each one forbids what it should, and leaves the rest. See F_ADD_SEALS in fcntl(2).

use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::atomic::{AtomicU64, Ordering},
};

use fbuf_core::memory::{MemoryError, Table, Trial, try_page};
use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl},
};

use super::{
    finding::{Consequence, Finding, Section, Setback, first, refused, works},
    memfd::{NAME, PAGE, SIZE, reopen, small},
};

const OLD: Consequence = Consequence {
    follows: "A peer could pull memory away from under its readers, which then die of SIGBUS.",
    remedy: "A kernel that is 3.17 or later and keeps its seals; sandboxes that imitate Linux may not.",
};

const UNSOUND: Consequence = Consequence {
    follows: "The receiver of a buffer could write it, so nothing that fbuf promises would hold.",
    remedy: "A newer kernel: 5.1 to 5.4 know the seal but leave ways around it, and older ones do not.",
};

/// The group.
pub fn section() -> Section {
    let mut findings = vec![
        Finding::tried("SHRINK", shrink(), OLD).required(),
        Finding::tried("GROW", grow(), OLD).required(),
        Finding::tried("SEAL", seal_itself(), OLD).required(),
    ];
    let trials: [(_, fn(&Sealed) -> _); 6] = [
        ("FUTURE_WRITE: its writer", writer_goes_on),
        ("FUTURE_WRITE: new mappings", no_new_mapping),
        ("FUTURE_WRITE: write(2)", no_write),
        ("FUTURE_WRITE: reopening", no_way_back),
        ("FUTURE_WRITE: holes", no_holes),
        ("FUTURE_WRITE: its readers", readers_read),
    ];
    findings.extend(trials.map(|(name, trial)| {
        let result = Sealed::create().and_then(|sealed| trial(&sealed));
        Finding::tried(name, result, UNSOUND).required()
    }));
    findings.push(Finding::tried(
        "WRITE",
        write(),
        Consequence {
            follows: "There are no one-shot messages; the sealed level copies instead.",
            remedy: "Nothing, unless you need one-shot buffers: then a kernel that is 3.17 or later.",
        },
    ));
    findings.push(Finding::tried(
        "WRITE: shared mapping",
        shared_after_write(),
        Consequence {
            follows: "Readers of one-shot buffers map them privately, which costs the same.",
            remedy: "Nothing; kernels before 6.7, and some after it, are like that.",
        },
    ));
    Section { title: "Seals", findings }
}

fn add(file: &File, seal: SealFlag) -> Result<(), Setback> {
    works("adding the seal", fcntl(file, FcntlArg::F_ADD_SEALS(seal))).map(drop)
}

fn shrink() -> Result<String, Setback> {
    let file = small()?;
    add(&file, SealFlag::F_SEAL_SHRINK)?;
    refused("ftruncate to half the size", file.set_len(SIZE / 2), &[Errno::EPERM])?;
    Ok("making it smaller is refused".into())
}

fn grow() -> Result<String, Setback> {
    let file = small()?;
    add(&file, SealFlag::F_SEAL_GROW)?;
    refused("ftruncate to twice the size", file.set_len(2 * SIZE), &[Errno::EPERM])?;
    refused("writing behind the end", file.write_at(b"x", SIZE), &[Errno::EPERM])?;
    Ok("making it larger and writing behind its end are refused".into())
}

fn seal_itself() -> Result<String, Setback> {
    let file = small()?;
    add(&file, SealFlag::F_SEAL_SEAL)?;
    refused("a further seal", fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)), &[Errno::EPERM])?;
    Ok("any further seal is refused".into())
}

/// A memfd as fbuf makes them: mapped by its one writer, then sealed.
struct Sealed {
    mapping: Table<AtomicU64, AtomicU64>,
    /// Open for writing, as none is that fbuf passes on: what is tried is the seals, and not the descriptor.
    descriptor: File,
}

impl Sealed {
    fn create() -> Result<Self, Setback> {
        match Table::create(NAME, 8) {
            Ok((mapping, descriptor)) => {
                let reopened = reopen(&descriptor, File::options().read(true).write(true));
                Ok(Self { mapping, descriptor: first("open through /proc/self/fd", reopened)? })
            }
            Err(error @ MemoryError::Refused { call: "F_ADD_SEALS", .. }) => Err(Setback::WorksNot(cause(&error))),
            Err(error) => Err(Setback::Untried(cause(&error))),
        }
    }

    fn file(&self) -> Result<File, Setback> {
        first("dup", self.descriptor.try_clone())
    }
}

/// The kernel's reason alone: the full text refers its reader to this command.
fn cause(error: &MemoryError) -> String {
    match error {
        MemoryError::Refused { call, error, .. } => {
            let cause = error.get_ref().and_then(|inner| inner.source()).map_or(error.to_string(), |s| s.to_string());
            format!("{call}: {cause}")
        }
        other => other.to_string(),
    }
}

fn writer_goes_on(sealed: &Sealed) -> Result<String, Setback> {
    const MARK: u64 = 0x6662_7566;
    // Read back through the descriptor, that is by the kernel, and on this thread: no order is needed.
    sealed.mapping.head().store(MARK, Ordering::Relaxed);
    let mut found = [0; 8];
    works("reading it back", sealed.file()?.read_exact_at(&mut found, 0))?;
    if u64::from_ne_bytes(found) != MARK {
        return Err(Setback::WorksNot("what was written through the mapping did not arrive".into()));
    }
    Ok("the mapping that was there before the seal still writes".into())
}

fn no_new_mapping(sealed: &Sealed) -> Result<String, Setback> {
    let fd = sealed.descriptor.as_fd();
    refused("a writable mapping", try_page(fd, Trial::SharedWritable), &[Errno::EPERM])?;
    refused("mprotect to writable", try_page(fd, Trial::MadeWritable), &[Errno::EACCES, Errno::EPERM])?;
    Ok("writable ones are refused, and so is making one writable later (mprotect)".into())
}

fn no_write(sealed: &Sealed) -> Result<String, Setback> {
    refused("write", sealed.file()?.write_at(b"x", 0), &[Errno::EPERM])?;
    Ok("refused, also through a descriptor that is open for writing".into())
}

fn no_way_back(sealed: &Sealed) -> Result<String, Setback> {
    // Opening may succeed; what matters is that it leads nowhere.
    match reopen(&sealed.descriptor, File::options().read(true).write(true)) {
        Ok(file) => {
            refused("write after reopening", file.write_at(b"x", 0), &[Errno::EPERM])?;
            let mapped = try_page(file.as_fd(), Trial::SharedWritable);
            refused("a writable mapping after reopening", mapped, &[Errno::EPERM])?;
            Ok("opening it for writing succeeds, but write and writable mappings are refused".into())
        }
        Err(error) if matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::EPERM | Errno::EACCES)) => {
            Ok("opening it for writing is refused".into())
        }
        Err(error) => Err(Setback::Untried(format!("opening through /proc/self/fd: {error}"))),
    }
}

fn no_holes(sealed: &Sealed) -> Result<String, Setback> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let punched = fallocate(&sealed.descriptor, flags, 0, PAGE.cast_signed());
    refused("punching a hole", punched, &[Errno::EPERM])?;
    Ok("punching holes into it is refused".into())
}

fn readers_read(sealed: &Sealed) -> Result<String, Setback> {
    works("a read-only mapping", try_page(sealed.descriptor.as_fd(), Trial::Shared))?;
    Ok("mapping it read-only works".into())
}

fn write_sealed() -> Result<File, Setback> {
    let file = small()?;
    add(&file, SealFlag::F_SEAL_WRITE)?;
    Ok(file)
}

fn write() -> Result<String, Setback> {
    let file = write_sealed()?;
    refused("write", file.write_at(b"x", 0), &[Errno::EPERM])?;
    refused("a writable mapping", try_page(file.as_fd(), Trial::SharedWritable), &[Errno::EPERM])?;
    works("a private mapping", try_page(file.as_fd(), Trial::Private))?;
    Ok("write and writable mappings are refused; a private mapping reads".into())
}

fn shared_after_write() -> Result<String, Setback> {
    let file = write_sealed()?;
    if try_page(file.as_fd(), Trial::Shared).is_ok() {
        return Ok("it can also be mapped shared, read-only, through any descriptor".into());
    }
    let reader = first("opening it read-only", reopen(&file, File::options().read(true)))?;
    works("shared, read-only", try_page(reader.as_fd(), Trial::Shared))?;
    Ok("it can also be mapped shared, read-only, through a descriptor that was opened read-only".into())
}
