//! On what it was measured.

use std::fs;

use fbuf_client::tuning::caches;
use nix::sys::utsname::uname;
use serde::Serialize;

use crate::table::bytes;

/// What decides about figures, besides the code.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) processors: usize,
    pub(crate) caches: String,
    pub(crate) kernel: String,
    pub(crate) commit: &'static str,
}

impl Machine {
    pub(crate) fn here() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
        let describe = |cache: &fbuf_client::tuning::Cache| {
            format!("L{} {} ({})", cache.level, bytes(cache.bytes as usize), cache.users)
        };
        Self {
            processor: model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned()),
            processors: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            caches: caches().iter().map(describe).collect::<Vec<_>>().join(", "),
            kernel: uname().map_or_else(
                |_| "unknown".to_owned(),
                |name| format!("{} {}", name.sysname().display(), name.release().display()),
            ),
            commit: env!("FBUF_COMMIT"),
        }
    }
}
