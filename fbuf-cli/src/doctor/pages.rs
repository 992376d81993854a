//! Pages: huge ones, and having all of them in the page table before the first message.

use std::{fs, os::fd::AsFd};

use fbuf_core::memory::{Trial, try_page};
use nix::{
    fcntl::{FallocateFlags, fallocate},
    sys::memfd::{MFdFlags, memfd_create},
};

use super::{
    finding::{Consequence, Finding, Section, Setback, bytes, first, works},
    memfd::{NAME, setting, small},
};

const POOLS: &str = "/sys/kernel/mm/hugepages";

const SLOW_START: Consequence = Consequence {
    follows: "The first use of each page is a page fault, about a microsecond; after that nothing differs.",
    remedy: "Kernel 5.14 or later, or nothing.",
};

/// The group.
pub fn section() -> Section {
    let findings = vec![
        Finding::fact("reserved huge pages", reserved()),
        Finding::tried(
            "memfd of huge pages",
            huge(),
            Consequence {
                follows: "Slots lie in small pages; leasing large ones then costs more than copying them.",
                remedy: "`sysctl vm.nr_hugepages=64` reserves 64 of them, if you send megabytes at the leased level.",
            },
        ),
        Finding::tried(
            "transparent huge pages",
            transparent(),
            Consequence {
                follows: "Memfds do not get huge pages by themselves.",
                remedy: "`echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled` permits them on request.",
            },
        ),
        Finding::tried("MADV_POPULATE_READ", populate(Trial::Populated), SLOW_START),
        Finding::tried("MADV_POPULATE_WRITE", populate(Trial::PopulatedWritable), SLOW_START),
    ];
    Section { title: "Pages", findings }
}

fn reserved() -> String {
    let Ok(entries) = fs::read_dir(POOLS) else { return "none: this kernel has no hugetlb pages".into() };
    let mut pools: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()?.checked_mul(1024)?;
            let count = |file| setting(&format!("{POOLS}/{name}/{file}"));
            Some((size, count("free_hugepages")?, count("nr_hugepages")?))
        })
        .collect();
    pools.sort();
    let describe = |(size, free, all): &(u64, String, String)| format!("of {}: {free} of {all} free", bytes(*size));
    if pools.is_empty() { "none".into() } else { pools.iter().map(describe).collect::<Vec<_>>().join("; ") }
}

/// The file costs nothing to make, even where there is no page for it: so a page is asked for too.
fn huge() -> Result<String, Setback> {
    let size = setting("/proc/meminfo").and_then(|text| default_size(&text));
    let size = first("the size of a huge page", size.ok_or("/proc/meminfo does not say it"))?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_HUGETLB;
    let file = works("memfd_create with MFD_HUGETLB", memfd_create(NAME, flags))?;
    let length = first("the size of a huge page", i64::try_from(size))?;
    let taken = fallocate(&file, FallocateFlags::empty(), 0, length);
    works("the file can be made, but it gets no page: fallocate", taken)?;
    Ok(format!("made, with a page of {}", bytes(size)))
}

fn default_size(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn transparent() -> Result<String, Setback> {
    let text = setting("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let Some(text) = text else { return Err(Setback::WorksNot("this kernel has none for shared memory".into())) };
    match chosen(&text) {
        Some(value @ ("never" | "deny")) => Err(Setback::WorksNot(format!("shmem_enabled is `{value}`"))),
        Some("advise") => Ok("shmem_enabled is `advise`: memfds get them where madvise asks for them".into()),
        Some(value) => Ok(format!("shmem_enabled is `{value}`: memfds get them by themselves")),
        None => Err(Setback::Untried(format!("shmem_enabled reads {text:?}"))),
    }
}

/// The word in brackets.
fn chosen(text: &str) -> Option<&str> {
    text.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

fn populate(trial: Trial) -> Result<String, Setback> {
    let file = small()?;
    works("madvise", try_page(file.as_fd(), trial))?;
    Ok("pages are entered ahead of their first use".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_choice_stands_in_brackets() {
        assert_eq!(chosen("always within_size advise [never] deny force"), Some("never"));
        assert_eq!(chosen("never"), None);
    }

    #[test]
    fn the_size_of_a_huge_page_is_read_in_bytes() {
        assert_eq!(default_size("HugePages_Free: 0\nHugepagesize:       2048 kB\n"), Some(2 << 20));
        assert_eq!(default_size("MemTotal: 1 kB\n"), None);
    }
}
