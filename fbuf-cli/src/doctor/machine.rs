//! The machine: its kernel, the processors this process may use, and how much of its caches to fill.

use std::thread;

use nix::{
    sched::{CpuSet, sched_getaffinity},
    sys::utsname::uname,
    unistd::Pid,
};

use fbuf_client::tuning::{Cache, Users, caches, default_slots, in_flight, largest};

use super::finding::{Finding, Section, bytes};

/// The oldest kernel on which fbuf is tried, as README says too. What it needs came with 5.5; whatever else is missing
/// from an older one is found out by trying it.
pub const OLDEST_KERNEL: &str = "5.15";

/// The group.
pub fn section() -> Section {
    let processors = processors();
    let caches = caches();
    let findings = vec![
        Finding::fact("kernel", kernel()),
        Finding::fact("processors", describe_processors(&processors)),
        Finding::fact("caches", describe_caches(&caches)),
        Finding::fact("bytes to keep in flight", advice(&caches)),
    ];
    Section { title: "Machine", findings }
}

fn kernel() -> String {
    match uname() {
        Ok(name) => format!(
            "{} {}, {}; fbuf is made for {OLDEST_KERNEL} and later",
            name.sysname().display(),
            name.release().display(),
            name.machine().display()
        ),
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

fn describe_caches(caches: &[Cache]) -> String {
    if caches.is_empty() {
        return "unknown: /sys does not describe them".into();
    }
    let describe = |cache: &Cache| format!("L{} {} ({})", cache.level, bytes(cache.bytes), cache.users);
    caches.iter().map(describe).collect::<Vec<_>>().join(", ")
}

/// Advice on slots times their size: what a sender does that is not told.
fn advice(caches: &[Cache]) -> String {
    let (flight, slots) = (bytes(in_flight(caches)), default_slots(64 << 10, caches));
    let why = match (largest(caches, Users::Few), largest(caches, Users::One)) {
        (Some(near), _) => format!("a quarter of the {} that a few cores share", bytes(near)),
        (None, Some(own)) => format!("half of one core's own {}", bytes(own)),
        (None, None) => "which is typical; the caches are not known".into(),
    };
    format!(
        "{flight} (slots times slot size), {why}: {slots} slots of 64 KiB. Give as many more as receivers keep; \
         `fbuf bench depth` measures it"
    )
}

#[cfg(test)]
mod tests {
    use super::{super::finding::TOGETHER, *};

    #[test]
    fn advice_is_what_senders_do() {
        let caches = [Cache { level: 2, bytes: 2 << 20, users: Users::One }];
        let text = advice(&caches).replace(TOGETHER, " ");
        assert!(
            text.starts_with("1 MiB (slots times slot size), half of one core's own 2 MiB: 16 slots of 64 KiB"),
            "{text}"
        );
        let near = [Cache { level: 3, bytes: 32 << 20, users: Users::Few }];
        let text = advice(&near).replace(TOGETHER, " ");
        assert!(text.starts_with("8 MiB (slots times slot size), a quarter of the 32 MiB that a few cores"), "{text}");
        assert!(advice(&[]).contains("not known"));
    }

    #[test]
    fn processors_are_written_as_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 3, 8]), "0-3,8");
        assert_eq!(ranges(&[5]), "5");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn readme_names_the_same_kernel() {
        let readme = include_str!("../../../README.md");
        assert!(readme.contains(&format!("Linux {OLDEST_KERNEL} or later")), "README names another kernel");
        assert!(kernel().contains(OLDEST_KERNEL));
    }

    #[test]
    fn this_machine_has_a_processor_for_this_process() {
        assert!(!processors().is_empty());
    }
}
