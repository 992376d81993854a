//! The caches of this machine, and how many slots suit them.
//!
//! A stream goes round all slots of its sender. As long as they fit into a private cache, what one side
//! has written is still in a cache when the other side reads it, and the other way round; beyond that,
//! all goes through the cache that both share, which may be as fast, or half as fast, by what else uses
//! it. Measured with `fbuf bench depth`; with too little in flight, the two wait for each other.

use std::{fs, path::Path, sync::OnceLock};

/// A data cache of one processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    /// 1 is the one that is next to the core.
    pub level: u32,
    /// Its size.
    pub bytes: u64,
    /// Whether more than one core uses it.
    pub shared: bool,
}

/// The data caches of the first processor, smallest level first; empty where /sys does not tell.
#[must_use]
pub fn caches() -> Vec<Cache> {
    let folder = "/sys/devices/system/cpu/cpu0";
    // The threads of one core share all its caches; only another core makes a cache a shared one.
    let siblings = read(&format!("{folder}/topology/thread_siblings_list"));
    let Ok(entries) = fs::read_dir(format!("{folder}/cache")) else { return Vec::new() };
    let mut found: Vec<_> = entries.flatten().filter_map(|entry| cache(&entry.path(), siblings.as_deref())).collect();
    found.sort_by_key(|cache| cache.level);
    found
}

fn cache(folder: &Path, siblings: Option<&str>) -> Option<Cache> {
    let read = |name: &str| read(folder.join(name).to_str()?);
    if read("type")? == "Instruction" {
        return None;
    }
    let size = read("size")?;
    let bytes = match size.strip_suffix('K') {
        Some(kib) => kib.parse::<u64>().ok()?.checked_mul(1024)?,
        None => size.parse().ok()?,
    };
    Some(Cache { level: read("level")?.parse().ok()?, bytes, shared: read("shared_cpu_list").as_deref() != siblings })
}

fn read(path: &str) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The size of the largest cache that a core has for itself.
#[must_use]
pub fn private(caches: &[Cache]) -> Option<u64> {
    caches.iter().filter(|cache| !cache.shared).map(|cache| cache.bytes).max()
}

/// How many bytes a sender's slots should have together: half a private cache, which has other things to
/// hold.
#[must_use]
pub fn in_flight(caches: &[Cache]) -> u64 {
    (private(caches).unwrap_or(2 << 20) / 2).clamp(512 << 10, 8 << 20)
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
    default_slots(slot_bytes, HERE.get_or_init(caches))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_fit_into_a_private_cache() {
        let cache = |level, bytes, shared| Cache { level, bytes, shared };
        let typical = [cache(1, 48 << 10, false), cache(2, 2 << 20, false), cache(3, 480 << 20, true)];
        assert_eq!(in_flight(&typical), 1 << 20);
        assert_eq!(default_slots(64 << 10, &typical), 16);
        assert_eq!(default_slots(16 << 20, &typical), 2);
        assert_eq!(default_slots(1, &typical), 16384);
        assert_eq!(in_flight(&[]), 1 << 20);
        assert_eq!(in_flight(&typical[..1]), 512 << 10, "a core without a second level");
        assert_eq!(in_flight(&[cache(3, 64 << 20, false)]), 8 << 20);
    }
}
