//! `fbuf doctor`: tries on this machine, now, everything that fbuf needs of it, and says what works,
//! what does not, and what to do. Kernels are patched, configured and filtered, so what a version
//! number promises is not asked for: each thing is done, to a memfd of two pages or a socket pair,
//! and undone.
//!
//! Gathering (one file for each group of probes) knows nothing of printing (`report.rs`).

mod broker;
mod crossover;
mod fences;
mod finding;
mod leases;
mod limits;
mod machine;
mod memfd;
mod pages;
mod report;
mod seals;
mod sockets;

use finding::Section;

use crate::{Failure, Place, standard::print};

/// Probes, prints, and succeeds when everything works that the basic level needs.
pub(crate) fn run(place: &Place) -> Result<(), Failure> {
    let sections = gather(place);
    print(report::text(&sections))?;
    if report::missing(&sections).is_empty() { Ok(()) } else { Err(Failure::Shown) }
}

/// Everything there is to find out. Leaves nothing behind.
fn gather(place: &Place) -> Vec<Section> {
    vec![
        machine::section(),
        memfd::section(),
        seals::section(),
        memfd::reopening(),
        leases::section(),
        pages::section(),
        crossover::section(),
        fences::section(),
        sockets::section(),
        limits::section(),
        broker::section(place),
    ]
}

#[cfg(test)]
mod tests {
    use super::{finding::Outcome, *};
    use std::{
        fs,
        process::Command,
        thread,
        time::{Duration, Instant},
    };

    fn threads() -> usize {
        fs::read_dir("/proc/self/task").unwrap().count()
    }

    /// Those that stay: counted when so many threads are left, since others close some. A thread has its name only a while
    /// after it was started.
    fn open_descriptors(left: usize) -> usize {
        let start = Instant::now();
        while threads() > left {
            assert!(start.elapsed() < Duration::from_secs(10), "something is closed for ever");
            thread::yield_now();
        }
        fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn what_the_basic_level_needs_is_tried_and_works() {
        let sections = gather(&Place::default());
        let required: Vec<_> = sections.iter().flat_map(|section| &section.findings).filter(|f| f.required).collect();
        for name in ["memfd with sealing", "SHRINK", "GROW", "SEAL", "descriptor passing", "SO_PEERCRED"] {
            assert!(required.iter().any(|finding| finding.name == name), "{name} is not required");
        }
        assert_eq!(required.iter().filter(|finding| finding.name.starts_with("FUTURE_WRITE")).count(), 6);
        for finding in required {
            assert!(matches!(finding.outcome, Outcome::Works), "{finding:?}");
        }
        assert!(report::missing(&sections).is_empty());
    }

    #[test]
    fn nothing_is_left_behind() {
        const ALONE: &str = "FBUF_TEST_ALONE";
        if std::env::var_os(ALONE).is_none() {
            // In a process of its own: other tests open descriptors meanwhile.
            let name = "doctor::tests::nothing_is_left_behind";
            let mut alone = Command::new(std::env::current_exe().unwrap());
            let output = alone.args([name, "--exact"]).env(ALONE, "").output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
            return;
        }
        let threads = threads();
        // What tokio keeps for as long as a process lives is there afterwards.
        gather(&Place::default());
        let before = open_descriptors(threads);
        let blocked = nix::sys::signal::SigSet::thread_get_mask().unwrap();
        gather(&Place::default());
        assert_eq!(open_descriptors(threads), before);
        assert!(!fs::read_to_string("/proc/self/maps").unwrap().contains("fbuf-doctor"));
        assert_eq!(nix::sys::signal::SigSet::thread_get_mask().unwrap(), blocked);
    }
}
