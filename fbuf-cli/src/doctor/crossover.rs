//! From how many bytes on a message is leased for less than it is copied: measured here and now, with the
//! library itself, both ends in this thread.

use std::time::{Duration, Instant};

use fbuf_broker::Embedded;
use fbuf_client::{
    Client, Mechanism, Pages,
    tuning::{LEASE_BASE_FROM, LEASE_FROM},
};
use fbuf_core::memory::{HUGE_PAGE, free_huge_pages, has_transparent_pages};

use super::finding::{Finding, Section, Setback, bytes, first};

/// The sizes that are tried.
const SIZES: [usize; 7] = [256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20];
/// How many messages of each size count; as many go before.
const MESSAGES: usize = 7;
const PAGE: usize = 4096;

/// The group.
pub fn section() -> Section {
    let kinds = [
        ("leases in base pages", Pages::Base, LEASE_BASE_FROM),
        ("in transparent huge pages", Pages::Transparent, LEASE_FROM),
        ("in huge pages set aside", Pages::Huge, LEASE_FROM),
    ];
    let finding = |(name, pages, default)| {
        let seen = crossover(pages, default).unwrap_or_else(|setback| match setback {
            Setback::WorksNot(why) | Setback::Untried(why) => format!("not measured: {why}"),
        });
        Finding::fact(name, seen)
    };
    Section { title: "Where leasing a message costs less than copying it", findings: kinds.map(finding).into() }
}

fn crossover(pages: Pages, default: u64) -> Result<String, Setback> {
    let untried = |why: &str| Err(Setback::Untried(why.to_owned()));
    match pages {
        Pages::Transparent if !has_transparent_pages() => return untried("the kernel makes none up for memfds"),
        Pages::Huge if free_huge_pages() < 2 * SIZES[SIZES.len() - 1] as u64 / HUGE_PAGE => {
            return untried("too few of them are free (vm.nr_hugepages)");
        }
        _ => {}
    }
    let broker = first("a broker", Embedded::start())?;
    let client = first("a client", Client::connect_to(broker.address()))?;
    let sizes = SIZES.into_iter().filter(|&size| pages == Pages::Base || size as u64 >= HUGE_PAGE);
    let mut ratios = Vec::new();
    for size in sizes {
        let cost = |mechanism| first("a message", message(&client, size, mechanism, pages));
        let (copied, leased) = (cost(Mechanism::Copy)?, cost(Mechanism::Lease)?);
        ratios.push((size, leased.as_secs_f64() / copied.as_secs_f64()));
    }
    // From where on it never costs more again.
    let from = ratios.iter().rposition(|&(_, ratio)| ratio >= 1.0).map_or(0, |last| last + 1);
    let what = match (from, ratios.get(from)) {
        (_, None) => "nowhere up to 16 MiB".to_owned(),
        (0, Some(&(size, _))) => format!("at {} and more", bytes(size as u64)),
        (_, Some(&(size, _))) => format!("from {} on", bytes(size as u64)),
    };
    let last = ratios.last().map_or(f64::NAN, |&(_, ratio)| ratio);
    Ok(format!("{what}; at 16 MiB it costs {last:.2} of a copy; the default is {}", bytes(default)))
}

/// The median of what a message of this size takes, a word of each page written and read.
fn message(
    client: &Client,
    size: usize,
    mechanism: Mechanism,
    pages: Pages,
) -> Result<Duration, Box<dyn std::error::Error>> {
    let mut receiver = client.receiver("doctor").open()?;
    let sender = client.sender("doctor").slot_size(size).slots(2).mechanism(mechanism);
    let mut sender = if mechanism == Mechanism::Lease { sender.pages(pages) } else { sender }.open()?;
    sender.wait_for_receivers_timeout(1, Duration::from_secs(10))?;
    let mut times = Vec::new();
    for number in 0..2 * MESSAGES {
        let begin = Instant::now();
        let mut fbuf = sender.allocate_timeout(Duration::from_secs(10))?;
        fbuf.set_len(size)?;
        fbuf.chunks_mut(PAGE).for_each(|page| page[0] = number as u8);
        sender.write(fbuf)?;
        let received = receiver.get_timeout(Duration::from_secs(10))?;
        if received.mechanism() != mechanism {
            return Err(format!("it was {} where it should be {mechanism}", received.mechanism()).into());
        }
        let wrong = received.chunks(PAGE).filter(|page| page[0] != number as u8).count();
        drop(received);
        times.push(begin.elapsed());
        if wrong > 0 {
            return Err(format!("{wrong} pages of it did not arrive as they were written").into());
        }
    }
    let times = &mut times[MESSAGES..];
    times.sort_unstable();
    Ok(times[MESSAGES / 2])
}
