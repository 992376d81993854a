//! How much memory there is. `fallocate` on a memfd would happily eat all of it and wake the
//! kernel's out-of-memory killer, so the question is asked before.

use std::{fs, path::Path};

use super::MemoryError;

/// Refuses what the machine, or the control groups this process lives in, cannot give.
pub(super) fn check(asked: u64) -> Result<(), MemoryError> {
    match available() {
        Some((available, bound)) if available < asked => Err(MemoryError::NotEnough { asked, available, bound }),
        _ => Ok(()),
    }
}

/// The error for memory that was there a moment ago.
pub(super) fn none_left(asked: u64) -> MemoryError {
    let (available, bound) = available().unwrap_or((0, "the kernel's word"));
    MemoryError::NotEnough { asked, available: available.min(asked), bound }
}

/// How many bytes can be had, and what sets that limit. None where /proc is not mounted: then the
/// kernel decides.
#[must_use]
pub fn available() -> Option<(u64, &'static str)> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| in_groups(&text));
    [
        machine.map(|bytes| (bytes, "MemAvailable of this machine")),
        groups.map(|bytes| (bytes, "memory.max of a control group")),
    ]
    .into_iter()
    .flatten()
    .min()
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The least that any control group (version 2) above this process still has free.
fn in_groups(cgroup: &str) -> Option<u64> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    Path::new(path).ancestors().filter_map(|group| free_in(&root.join(group))).min()
}

fn free_in(group: &Path) -> Option<u64> {
    let number = |file| fs::read_to_string(group.join(file)).ok()?.trim().parse::<u64>().ok();
    Some(number("memory.max")?.saturating_sub(number("memory.current")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_bytes() {
        assert_eq!(mem_available("MemTotal: 9 kB\nMemAvailable:      12 kB\n"), Some(12 * 1024));
        assert_eq!(mem_available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn this_machine_has_some_memory_but_not_everything() {
        assert!(check(4096).is_ok());
        assert!(matches!(check(u64::MAX), Err(MemoryError::NotEnough { asked: u64::MAX, .. })));
    }
}
