//! What a process holds, as the kernel counts it.

use std::{collections::BTreeMap, fs, ops::Sub};

use crate::Result;

/// Of one process, or of several together.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Holdings {
    /// Bytes of memory of its own that are resident.
    pub(super) memory: u64,
    /// Bytes of memory that can be shared and is mapped, each counted once. All of it is reserved.
    pub(super) shared: u64,
    pub(super) descriptors: u64,
    pub(super) threads: u64,
}

impl Holdings {
    pub(super) fn of(process: u32) -> Result<Self> {
        let of = |what: &str| format!("/proc/{process}/{what}");
        let status = fs::read_to_string(of("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no RssAnon in /proc")?;
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
        let count = |what| -> Result<u64> { Ok(fs::read_dir(of(what))?.count() as u64) };
        let mut shared = BTreeMap::new();
        for line in fs::read_to_string(of("maps"))?.lines().filter(|line| line.contains("/memfd:")) {
            let (range, inode) = (line.split(' ').next(), line.split_ascii_whitespace().nth(4));
            let bounds = range.and_then(|range| range.split_once('-')).ok_or("/proc/…/maps is not understood")?;
            let size = u64::from_str_radix(bounds.1, 16)? - u64::from_str_radix(bounds.0, 16)?;
            shared.insert(inode.map(str::to_owned), size);
        }
        Ok(Self {
            memory: kilobytes << 10,
            shared: shared.values().sum(),
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }

    /// Each of them, by name, and whether it counts bytes.
    pub(super) fn each(self) -> [(&'static str, u64, bool); 4] {
        let Self { memory, shared, descriptors, threads } = self;
        [
            ("memory", memory, true),
            ("shared memory", shared, true),
            ("descriptors", descriptors, false),
            ("threads", threads, false),
        ]
    }

    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            memory: self.memory + other.memory,
            shared: self.shared + other.shared,
            descriptors: self.descriptors + other.descriptors,
            threads: self.threads + other.threads,
        }
    }
}

/// What came on top.
impl Sub for Holdings {
    type Output = Self;
    fn sub(self, before: Self) -> Self {
        Self {
            memory: self.memory.saturating_sub(before.memory),
            shared: self.shared.saturating_sub(before.shared),
            descriptors: self.descriptors.saturating_sub(before.descriptors),
            threads: self.threads.saturating_sub(before.threads),
        }
    }
}
