//! On which processors the two sides run, and what they spend there.

use std::{io, ops::Add, time::Duration};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::{
        resource::{UsageWho, getrusage},
        time::TimeVal,
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

/// The processors this process may use; two of them, if there are, one for each side.
#[must_use]
pub fn two() -> [Option<usize>; 2] {
    let Ok(allowed) = sched_getaffinity(Pid::from_raw(0)) else { return [None; 2] };
    let mut processors = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu) == Ok(true));
    match (processors.next(), processors.next()) {
        (Some(one), Some(other)) => [Some(one), Some(other)],
        _ => [None; 2],
    }
}

/// Keeps this thread, and those it starts, on one processor. Without it figures are noisier, and no
/// less true.
pub fn pin(processor: Option<usize>) {
    let mut one = CpuSet::new();
    if let Some(cpu) = processor
        && one.set(cpu).is_ok()
    {
        let _ = sched_setaffinity(Pid::from_raw(0), &one);
    }
}

/// What a process has spent.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct CpuTime {
    /// Processor time, of the program and of the kernel on its behalf.
    pub cpu: Duration,
    /// How often the processor was given to somebody else, or given up.
    pub switches: i64,
}

impl CpuTime {
    /// So far.
    ///
    /// # Errors
    /// What getrusage(2) says.
    pub fn so_far() -> io::Result<Self> {
        let usage = getrusage(UsageWho::RUSAGE_SELF)?;
        let time = |time: TimeVal| {
            Duration::from_secs(time.tv_sec().unsigned_abs()) + Duration::from_micros(time.tv_usec().unsigned_abs())
        };
        Ok(Self {
            cpu: time(usage.user_time()) + time(usage.system_time()),
            switches: usage.voluntary_context_switches() + usage.involuntary_context_switches(),
        })
    }

    /// Since a moment before.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self { cpu: self.cpu.saturating_sub(before.cpu), switches: self.switches - before.switches }
    }
}

impl Add for CpuTime {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { cpu: self.cpu + other.cpu, switches: self.switches + other.switches }
    }
}
