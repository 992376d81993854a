//! The machine: its kernel, the processors this process may use, and how much of its caches to fill.

use std::{fs, path::Path, thread};

use nix::{
    sched::{CpuSet, sched_getaffinity},
    sys::utsname::uname,
    unistd::Pid,
};

use super::{
    finding::{Finding, Section, bytes},
    memfd::setting,
};

/// The group.
pub fn section() -> Section {
    let processors = processors();
    let caches = processors.first().map(|first| caches(*first)).unwrap_or_default();
    let findings = vec![
        Finding::fact("kernel", kernel()),
        Finding::fact("processors", describe_processors(&processors)),
        Finding::fact("caches", describe_caches(&caches)),
        Finding::fact("bytes to keep in flight", in_flight(&caches)),
    ];
    Section { title: "Machine", findings }
}

fn kernel() -> String {
    match uname() {
        Ok(name) => format!("{} {}, {}", name.sysname().display(), name.release().display(), name.machine().display()),
        Err(error) => format!("unknown (uname: {error})"),
    }
}

/// The numbers of the processors that this process may run on.
fn processors() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    (0..CpuSet::count()).filter(|number| set.is_set(*number) == Ok(true)).collect()
}

fn describe_processors(processors: &[usize]) -> String {
    let mut text = match processors {
        [] => return "unknown: the kernel does not say which this process may run on".into(),
        [only] => format!("1 (number {only}): with only one, waiting never spins, and every message wakes a process"),
        several => format!("{} ({})", several.len(), ranges(several)),
    };
    let share = thread::available_parallelism().map_or(processors.len(), usize::from);
    if share < processors.len() {
        text.push_str(&format!(", but a control group grants the time of {share} only"));
    }
    text
}

/// Ascending numbers, as the kernel writes them: `0-3,8`.
fn ranges(numbers: &[usize]) -> String {
    let runs = numbers.chunk_by(|one, next| one + 1 == *next);
    let names =
        runs.map(|run| if run.len() == 1 { run[0].to_string() } else { format!("{}-{}", run[0], run[run.len() - 1]) });
    names.collect::<Vec<_>>().join(",")
}

/// A data cache.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Cache {
    level: u32,
    bytes: u64,
    /// More than one core uses it.
    shared: bool,
}

/// The data caches of a processor, smallest level first.
fn caches(processor: usize) -> Vec<Cache> {
    let folder = format!("/sys/devices/system/cpu/cpu{processor}");
    // The threads of one core share all its caches; only another core makes a cache a shared one.
    let siblings = setting(&format!("{folder}/topology/thread_siblings_list"));
    let Ok(entries) = fs::read_dir(format!("{folder}/cache")) else { return Vec::new() };
    let mut found: Vec<_> = entries.flatten().filter_map(|entry| cache(&entry.path(), siblings.as_deref())).collect();
    found.sort_by_key(|cache| cache.level);
    found
}

fn cache(folder: &Path, siblings: Option<&str>) -> Option<Cache> {
    let read = |name: &str| setting(folder.join(name).to_str()?);
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

fn describe_caches(caches: &[Cache]) -> String {
    if caches.is_empty() {
        return "unknown: /sys does not describe them".into();
    }
    let describe = |cache: &Cache| {
        let whose = if cache.shared { "shared" } else { "one core's" };
        format!("L{} {} ({whose})", cache.level, bytes(cache.bytes))
    };
    caches.iter().map(describe).collect::<Vec<_>>().join(", ")
}

/// Advice on slots times their size. Slots are reused first in, first out, so that a slot has left
/// its writer's private cache when its reader comes; and none should have left the shared one.
fn in_flight(caches: &[Cache]) -> String {
    const TYPICAL: u64 = 4 << 20;
    let largest = |shared| caches.iter().filter(|cache| cache.shared == shared).map(|cache| cache.bytes).max();
    let (private, shared) = match (largest(false), largest(true)) {
        (Some(private), Some(shared)) if shared > private => (private, shared),
        (Some(private), None) => {
            return format!(
                "4 to 8 MiB, which is typical; more than one core's {}. No cache is seen to be shared here, so \
                 messages between cores go through memory",
                bytes(private)
            );
        }
        _ => return "4 to 8 MiB, which is typical; the caches are not known well enough to say more".into(),
    };
    // Both neighbours of the useful range are losses; the typical one lies well inside it mostly.
    let least = (2 * private).max(TYPICAL).min(shared / 2);
    let most = (2 * least).min(shared / 2);
    let range =
        if least < most { format!("{} to {}", bytes(least), bytes(most)) } else { format!("about {}", bytes(least)) };
    format!(
        "{range} (slots times slot size): more than one core's own {}, less than the shared {}",
        bytes(private),
        bytes(shared)
    )
}

#[cfg(test)]
mod tests {
    use super::{super::finding::TOGETHER, *};

    fn pair(private: u64, shared: u64) -> [Cache; 2] {
        [Cache { level: 2, bytes: private, shared: false }, Cache { level: 3, bytes: shared, shared: true }]
    }

    fn advice(caches: &[Cache]) -> String {
        in_flight(caches).replace(TOGETHER, " ")
    }

    #[test]
    fn advice_lies_between_the_private_and_the_shared_cache() {
        assert!(advice(&pair(256 << 10, 32 << 20)).starts_with("4 MiB to 8 MiB"));
        assert!(advice(&pair(2 << 20, 480 << 20)).starts_with("4 MiB to 8 MiB"));
        assert!(advice(&pair(4 << 20, 64 << 20)).starts_with("8 MiB to 16 MiB"));
        assert!(advice(&pair(512 << 10, 4 << 20)).starts_with("about 2 MiB"));
        assert!(advice(&[]).starts_with("4 to 8 MiB"));
        assert!(advice(&pair(2 << 20, 1 << 20)).contains("not known"));
        assert!(advice(&pair(2 << 20, 1 << 20)[..1]).contains("No cache is seen to be shared"));
    }

    #[test]
    fn processors_are_written_as_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 3, 8]), "0-3,8");
        assert_eq!(ranges(&[5]), "5");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn this_machine_has_a_processor_for_this_process() {
        assert!(!processors().is_empty());
    }
}
