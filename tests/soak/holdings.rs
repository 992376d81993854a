//! What a process holds, as the kernel counts it.

use std::{fmt, fs};

/// Descriptors, threads and mappings of shared memory, which are compared exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holdings {
    pub descriptors: usize,
    pub threads: usize,
    pub mappings: usize,
}

/// Memory that is resident, in KiB.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Of its own.
    pub private: u64,
    /// Mapped, and shared with others.
    pub shared: u64,
}

impl Holdings {
    pub fn of(process: u32) -> Self {
        let count = |what| fs::read_dir(format!("/proc/{process}/{what}")).unwrap().count();
        let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
        let mappings = maps.lines().filter(|line| line.contains("/memfd:")).count();
        Self { descriptors: count("fd"), threads: count("task"), mappings }
    }
}

impl Memory {
    pub fn of(process: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            value.trim().trim_end_matches(" kB").parse().unwrap()
        };
        Self { private: field("RssAnon:"), shared: field("RssShmem:") }
    }
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} descriptors, {} threads, {} mappings", self.descriptors, self.threads, self.mappings)
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} + {} KiB", self.private, self.shared)
    }
}
