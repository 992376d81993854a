//! How much memory there is. `fallocate` on a memfd would happily eat all of it and wake the
//! kernel's out-of-memory killer, so the question is asked before.

use std::{fs, path::Path};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::MemoryError;

/// Refuses what the machine, or the control groups this process lives in, cannot give.
pub(crate) fn check(asked: u64) -> Result<(), MemoryError> {
    #[cfg(test)]
    if is_withheld() {
        return Err(MemoryError::NotEnough { asked, available: 0, bound: "memory of this test" });
    }
    match available() {
        Some((available, bound)) if available < asked => Err(MemoryError::NotEnough { asked, available, bound }),
        _ => Ok(()),
    }
}

/// What bounds the length of files.
pub(crate) const FILE_SIZE: &str = "the longest file of this process: RLIMIT_FSIZE, ulimit -f";

/// Refuses files that this process may not make so long: beyond RLIMIT_FSIZE the kernel sends SIGXFSZ, which kills.
pub(crate) fn check_length(asked: u64) -> Result<(), MemoryError> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((longest, _)) if longest != RLIM_INFINITY && longest < asked => {
            Err(MemoryError::NotEnough { asked, available: longest, bound: FILE_SIZE })
        }
        _ => Ok(()),
    }
}

/// The error for memory that was there a moment ago.
pub(crate) fn none_left(asked: u64) -> MemoryError {
    let (available, bound) = available().unwrap_or((0, "the kernel's word"));
    MemoryError::NotEnough { asked, available: available.min(asked), bound }
}

/// How many bytes can be had, and what sets that limit. None where /proc is not mounted: then the
/// kernel decides.
///
/// Page cache that can be reclaimed counts as available, as in MemAvailable.
#[must_use]
pub fn available() -> Option<(u64, &'static str)> {
    let read = |path| fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").into_iter().flat_map(|text| of_machine(&text, commits_strictly()));
    let groups = read("/proc/self/cgroup").into_iter().flat_map(|text| of_groups(&text, Path::new("/sys/fs/cgroup")));
    machine.chain(groups).min()
}

/// Bytes that can be had, and what sets that limit.
type Bound = (u64, &'static str);

/// Whether the kernel promises no more memory than there is (vm.overcommit_memory=2).
fn commits_strictly() -> bool {
    fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|text| text.trim() == "2")
}

fn of_machine(meminfo: &str, commits_strictly: bool) -> Vec<Bound> {
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    let available = field("MemAvailable").map(|bytes| (bytes, "MemAvailable of this machine"));
    let commit = field("CommitLimit").zip(field("Committed_AS")).filter(|_| commits_strictly);
    let commit = commit
        .map(|(limit, used)| (limit.saturating_sub(used), "CommitLimit of this machine, with vm.overcommit_memory=2"));
    available.into_iter().chain(commit).collect()
}

/// What every control group above this process still has, of version 2 and of version 1.
fn of_groups(cgroup: &str, root: &Path) -> Vec<Bound> {
    let mut bounds = Vec::new();
    for line in cgroup.lines() {
        // `number:controllers:/path`; version 2 has no controllers in it.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let path = Path::new(path.trim_start_matches('/'));
        if controllers.is_empty() {
            path.ancestors().for_each(|group| bounds.extend(of_group(&root.join(group), &VERSION_2)));
        } else if controllers.split(',').any(|controller| controller == "memory") {
            let root = root.join("memory");
            path.ancestors().for_each(|group| bounds.extend(of_group(&root.join(group), &VERSION_1)));
        }
    }
    bounds
}

/// The files of a control group.
struct Files {
    limits: &'static [(&'static str, &'static str)],
    usage: &'static str,
    /// The fields of memory.stat that count what can be reclaimed.
    reclaimable: &'static [&'static str],
}

const VERSION_2: Files = Files {
    limits: &[
        ("memory.max", "memory.max of a control group"),
        // Beyond it a process is slowed down until it hardly moves.
        ("memory.high", "memory.high of a control group"),
    ],
    usage: "memory.current",
    reclaimable: &["inactive_file", "active_file", "slab_reclaimable"],
};
const VERSION_1: Files = Files {
    limits: &[("memory.limit_in_bytes", "memory.limit_in_bytes of a control group")],
    usage: "memory.usage_in_bytes",
    reclaimable: &["total_inactive_file", "total_active_file"],
};

fn of_group(group: &Path, files: &Files) -> Vec<Bound> {
    let read = |file| fs::read_to_string(group.join(file)).ok();
    let number = |file| read(file)?.trim().parse::<u64>().ok();
    let Some(usage) = number(files.usage) else { return Vec::new() };
    let statistics = read("memory.stat").unwrap_or_default();
    let reclaimable = |line: &str| {
        let (field, bytes) = line.split_once(' ')?;
        files.reclaimable.contains(&field).then(|| bytes.trim().parse::<u64>().ok())?
    };
    let used = usage.saturating_sub(statistics.lines().filter_map(reclaimable).sum());
    // "max" is no number, and no limit.
    let bound = |&(file, name)| Some((number(file)?.saturating_sub(used), name));
    files.limits.iter().filter_map(bound).collect()
}

#[cfg(test)]
thread_local! {
    static WITHHELD: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Whether this thread is [without memory](without_memory).
#[cfg(test)]
pub(crate) fn is_withheld() -> bool {
    WITHHELD.get()
}

/// Does something while this thread can have no memory, and map none.
#[cfg(test)]
pub(crate) fn without_memory<T>(run: impl FnOnce() -> T) -> T {
    WITHHELD.set(true);
    let returned = run();
    WITHHELD.set(false);
    returned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_bytes() {
        let meminfo = "MemTotal: 9 kB\nMemAvailable:      12 kB\nCommitLimit:   7 kB\nCommitted_AS: 3 kB\n";
        assert_eq!(of_machine(meminfo, false), [(12 * 1024, "MemAvailable of this machine")]);
        assert_eq!(of_machine(meminfo, true).iter().min().unwrap().0, 4 * 1024);
        assert_eq!(of_machine("MemTotal: 9 kB\n", true), []);
    }

    #[test]
    fn this_machine_has_some_memory_but_not_everything() {
        assert!(check(4096).is_ok());
        assert!(matches!(check(u64::MAX), Err(MemoryError::NotEnough { asked: u64::MAX, .. })));
    }

    /// A control group in a folder, with files that say this.
    fn group(root: &Path, path: &str, files: &[(&str, &str)]) {
        let folder = root.join(path);
        fs::create_dir_all(&folder).unwrap();
        files.iter().for_each(|(name, text)| fs::write(folder.join(name), text).unwrap());
    }

    fn scratch(name: &str) -> std::path::PathBuf {
        let root = std::env::temp_dir().join(format!("fbuf-room-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        root
    }

    #[test]
    fn page_cache_of_a_control_group_is_available() {
        let root = scratch("cache");
        let stat = "anon 8\nfile 900\ninactive_file 500\nactive_file 300\nslab_reclaimable 50\nshmem 100\n";
        let files =
            [("memory.max", "1000\n"), ("memory.high", "max\n"), ("memory.current", "990\n"), ("memory.stat", stat)];
        group(&root, "a/b", &files);
        assert_eq!(of_groups("0::/a/b\n", &root), [(860, "memory.max of a control group")]);
        // Without cache, nothing is.
        group(&root, "a/b", &[("memory.stat", "anon 990\nfile 0\n")]);
        assert_eq!(of_groups("0::/a/b\n", &root), [(10, "memory.max of a control group")]);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn the_tightest_limit_of_all_groups_above_counts() {
        let root = scratch("tightest");
        group(&root, "a", &[("memory.max", "max"), ("memory.high", "500"), ("memory.current", "100")]);
        group(&root, "a/b", &[("memory.max", "9000"), ("memory.high", "max"), ("memory.current", "50")]);
        assert_eq!(of_groups("0::/a/b\n", &root).into_iter().min(), Some((400, "memory.high of a control group")));
        // Version 1 has its memory controller in a hierarchy of its own.
        let files = [("memory.limit_in_bytes", "300"), ("memory.usage_in_bytes", "200")];
        group(&root, "memory/c", &files);
        group(&root, "memory/c", &[("memory.stat", "inactive_file 1\ntotal_inactive_file 60\ntotal_active_file 20\n")]);
        let found = of_groups("4:cpu,memory:/c\n0::/a\n", &root);
        assert_eq!(found.into_iter().min(), Some((180, "memory.limit_in_bytes of a control group")));
        fs::remove_dir_all(root).unwrap();
    }
}
