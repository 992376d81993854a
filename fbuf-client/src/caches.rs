//! The caches of this machine, and how many slots suit them.
//!
//! A stream goes round all slots of its sender, and where its bytes are when the other side comes for them
//! depends on how many those are. If they fit into a private cache, they come from there; if not, from the
//! cache that both share. Which is faster depends on the machine, by a factor of two (`fbuf bench depth`):
//! a large cache that all cores of an Intel Xeon share is slower than a private one, and a smaller one that
//! a few cores of an AMD EPYC share gives what it has more readily than another core its own.

use std::{fmt, fs, path::Path, sync::OnceLock};

/// A data cache of one processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    /// 1 is the one that is next to the core.
    pub level: u32,
    /// Its size.
    pub bytes: u64,
    /// Which cores share it.
    pub users: Users,
}

/// Which cores share a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Users {
    /// One core's.
    One,
    /// That of a few cores which lie around it: a core complex of AMD's processors.
    Few,
    /// That of all cores of a processor.
    Many,
}

impl fmt::Display for Users {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::One => "one core's",
            Self::Few => "of a few cores",
            Self::Many => "of all cores",
        })
    }
}

/// The data caches of the first processor, smallest level first; empty where /sys does not tell.
#[must_use]
pub fn caches() -> Vec<Cache> {
    let folder = "/sys/devices/system/cpu/cpu0";
    // The threads of one core share all its caches; only another core makes a cache a shared one.
    let siblings = read(&format!("{folder}/topology/thread_siblings_list"));
    // How many cores there are around a cache, a virtual machine does not tell.
    let complexes = read("/proc/cpuinfo")
        .is_some_and(|text| ["AuthenticAMD", "HygonGenuine"].iter().any(|vendor| text.contains(vendor)));
    let others = if complexes { Users::Few } else { Users::Many };
    let Ok(entries) = fs::read_dir(format!("{folder}/cache")) else { return Vec::new() };
    let mut found: Vec<_> =
        entries.flatten().filter_map(|entry| cache(&entry.path(), siblings.as_deref(), others)).collect();
    found.sort_by_key(|cache| cache.level);
    found
}

fn cache(folder: &Path, siblings: Option<&str>, others: Users) -> Option<Cache> {
    let read = |name: &str| read(folder.join(name).to_str()?);
    if read("type")? == "Instruction" {
        return None;
    }
    let size = read("size")?;
    let bytes = match size.strip_suffix('K') {
        Some(kib) => kib.parse::<u64>().ok()?.checked_mul(1024)?,
        None => size.parse().ok()?,
    };
    let users = if read("shared_cpu_list").as_deref() == siblings { Users::One } else { others };
    Some(Cache { level: read("level")?.parse().ok()?, bytes, users })
}

fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The largest cache with such users.
#[must_use]
pub fn largest(caches: &[Cache], users: Users) -> Option<u64> {
    caches.iter().filter(|cache| cache.users == users).map(|cache| cache.bytes).max()
}

/// How many bytes a sender's slots should have together, at least 512 KiB and at most 8 MiB: a quarter of a
/// cache that few cores share; else half a private one, which has other things to hold.
#[must_use]
pub fn in_flight(caches: &[Cache]) -> u64 {
    let near = largest(caches, Users::Few).map(|bytes| bytes / 4);
    let bytes = near.unwrap_or_else(|| largest(caches, Users::One).unwrap_or(2 << 20) / 2);
    bytes.clamp(512 << 10, 8 << 20)
}

/// How many slots of this many bytes a sender has that is not told: as many as [`in_flight`] holds, but
/// at least 2, and at most 16,384.
#[must_use]
pub fn default_slots(slot_bytes: u64, caches: &[Cache]) -> u64 {
    (in_flight(caches) / slot_bytes.max(64)).clamp(2, 16384)
}

/// To how many slots a sender grows that was not told how many to have, if receivers keep all it has.
pub const ENOUGH_SLOTS: u64 = 8;

/// The same, for this machine.
pub(crate) fn default_slots_here(slot_bytes: u64) -> u64 {
    static HERE: OnceLock<Vec<Cache>> = OnceLock::new();
    if HERE.get().is_none() {
        // Not while others wait for it: a child that is forked meanwhile would wait for ever.
        let _ = HERE.set(caches());
    }
    default_slots(slot_bytes, HERE.get().map_or(&[], |found| found))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn cache(level: u32, bytes: u64, users: Users) -> Cache {
        Cache { level, bytes, users }
    }

    #[test]
    fn slots_fit_into_a_private_cache_where_the_shared_one_is_far() {
        let typical = [cache(1, 48 << 10, Users::One), cache(2, 2 << 20, Users::One), cache(3, 480 << 20, Users::Many)];
        assert_eq!(in_flight(&typical), 1 << 20);
        assert_eq!(default_slots(64 << 10, &typical), 16);
        assert_eq!(default_slots(16 << 20, &typical), 2);
        assert_eq!(default_slots(1, &typical), 16384);
        assert_eq!(in_flight(&[]), 1 << 20);
        assert_eq!(in_flight(&typical[..1]), 512 << 10, "a core without a second level");
        assert_eq!(in_flight(&[cache(3, 64 << 20, Users::One)]), 8 << 20);
    }

    #[test]
    fn slots_do_not_fit_into_a_private_cache_where_the_shared_one_is_near() {
        let complex = [cache(1, 48 << 10, Users::One), cache(2, 1 << 20, Users::One), cache(3, 32 << 20, Users::Few)];
        assert_eq!(in_flight(&complex), 8 << 20);
        assert_eq!(default_slots(1 << 20, &complex), 8);
        assert_eq!(in_flight(&[cache(3, 8 << 20, Users::Few)]), 2 << 20);
    }
}
