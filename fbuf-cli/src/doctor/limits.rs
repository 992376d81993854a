//! Limits that a user runs into: descriptors, locked memory, and memory.

use std::path::Path;

use fbuf_core::memory;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use super::{
    finding::{Consequence, Finding, Section, Setback, bytes, first},
    memfd::setting,
};

/// With fewer descriptors than this, a program with a few dozen links meets the limit.
const FEW_DESCRIPTORS: u64 = 1024;

/// The group.
pub fn section() -> Section {
    let findings = vec![
        Finding::tried(
            "open descriptors",
            descriptors(),
            Consequence {
                follows: "A link takes a handful of descriptors, so a program gets few links.",
                remedy: "Raise it with `ulimit -n`, or LimitNOFILE= in a systemd unit.",
            },
        ),
        Finding::fact("locked memory", locked()),
        Finding::fact("memory to be had", to_be_had()),
        Finding::fact("memory.max", control_groups()),
        Finding::fact("vm.overcommit_memory", overcommit()),
    ];
    Section { title: "Limits", findings }
}

fn amount(value: u64, unit: impl Fn(u64) -> String) -> String {
    if value == RLIM_INFINITY { "unlimited".into() } else { unit(value) }
}

fn descriptors() -> Result<String, Setback> {
    let (soft, hard) = first("getrlimit", getrlimit(Resource::RLIMIT_NOFILE))?;
    let count = |value| amount(value, |number| number.to_string());
    let seen = format!("{} (RLIMIT_NOFILE), can be raised to {}", count(soft), count(hard));
    if soft < FEW_DESCRIPTORS { Err(Setback::WorksNot(seen)) } else { Ok(seen) }
}

fn locked() -> String {
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, hard)) => format!(
            "{} (RLIMIT_MEMLOCK), can be raised to {}; matters only to programs that lock their memory",
            amount(soft, bytes),
            amount(hard, bytes)
        ),
        Err(error) => format!("unknown (getrlimit: {error})"),
    }
}

fn to_be_had() -> String {
    match memory::available() {
        Some((number, bound)) => format!("{} ({bound}); pools are refused beyond it", bytes(number)),
        None => "unknown: /proc is not mounted, so a pool that is too large is noticed late".into(),
    }
}

fn control_groups() -> String {
    let Some(text) = setting("/proc/self/cgroup") else { return "unknown: /proc/self/cgroup cannot be read".into() };
    let Some(path) = text.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return "this process is in no control group of version 2".into();
    };
    let root = Path::new("/sys/fs/cgroup");
    let limit = |group: &Path| setting(root.join(group).join("memory.max").to_str()?)?.parse::<u64>().ok();
    let tightest = Path::new(path).ancestors().filter_map(limit).min();
    match tightest {
        Some(number) => format!("{}, the tightest of its control groups", bytes(number)),
        None if text.lines().any(|line| line.contains(":memory:")) => {
            "none of version 2; those of version 1 are counted in the memory to be had".into()
        }
        None => "none: no control group of version 2 limits the memory".into(),
    }
}

fn overcommit() -> String {
    match setting("/proc/sys/vm/overcommit_memory").as_deref() {
        Some("0") => "0: the kernel estimates".into(),
        Some("1") => "1: every mapping is granted".into(),
        Some("2") => "2: all memory is counted, shared memory too; `CommitLimit` in /proc/meminfo bounds it".into(),
        other => other.unwrap_or("cannot be read").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limit_is_not_a_number() {
        assert_eq!(amount(RLIM_INFINITY, bytes), "unlimited");
        assert_eq!(amount(8 << 20, bytes), bytes(8 << 20));
    }
}
