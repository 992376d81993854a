//! The results of one setting for people: a line for each peer, with medians, spreads and the ratio
//! to fbuf.

use crate::{
    outcome::{Measured, Outcome, Spread},
    peers::Peer,
    terms::name,
};

/// Prints the runs of one setting, of all peers.
pub(crate) fn print(outcomes: &[Outcome]) {
    let Some(first) = outcomes.first() else { return };
    let rate = first.rate_per_s.map_or_else(String::new, |rate| format!(", {rate:.0} messages a second"));
    println!(
        "\n{} of {}, {}, waiting by {}{rate}",
        first.workload,
        bytes(first.size),
        name(first.mode),
        name(first.wait)
    );
    match first.figures {
        Measured::Latency { .. } => println!(
            "  {:<16}{:>10} {:<19}{:>10}{:>10}{:>10}{:>9}{:>10}",
            "peer", "p50", "(spread)", "p99", "p99.9", "max", "CPU", "ratio"
        ),
        Measured::Stream { .. } => println!(
            "  {:<16}{:>10} {:<19}{:>10} {:<19}{:>9}{:>10}",
            "peer", "messages/s", "(spread)", "GB/s", "(spread)", "CPU", "ratio"
        ),
    }
    let mut peers: Vec<Peer> = Vec::new();
    for outcome in outcomes {
        if !peers.contains(&outcome.peer) {
            peers.push(outcome.peer);
        }
    }
    for peer in peers {
        let runs: Vec<_> = outcomes.iter().filter(|outcome| outcome.peer == peer).collect();
        let of = |figure: fn(&Outcome) -> f64| Spread::of(runs.iter().map(|&run| figure(run)));
        let (Some(headline), Some(cpu)) = (of(Outcome::headline), of(|run| run.cpu_s / run.seconds)) else { continue };
        let ratio = ratio(outcomes, peer).map_or_else(String::new, |ratio| format!("{:.2}", ratio.median));
        let cpu = format!("{:.2}", cpu.median);
        let label = match runs.first().and_then(|run| run.slots) {
            Some(slots) => format!("{} ({slots})", name(peer)),
            None => name(peer),
        };
        match first.figures {
            Measured::Latency { .. } => {
                let median = |figure| of(figure).map_or_else(String::new, |spread| nanoseconds(spread.median));
                let spread = format!("({}–{})", nanoseconds(headline.least), nanoseconds(headline.most));
                println!(
                    "  {label:<16}{:>10} {spread:<19}{:>10}{:>10}{:>10}{cpu:>9}{ratio:>10}",
                    nanoseconds(headline.median),
                    median(|run| quantiles(run)[1]),
                    median(|run| quantiles(run)[2]),
                    median(|run| quantiles(run)[3]),
                );
            }
            Measured::Stream { .. } => {
                let gb = headline.times(first.size as f64 / 1e9);
                println!(
                    "  {label:<16}{:>10} {:<19}{:>10.2} {:<19}{cpu:>9}{ratio:>10}",
                    rate_of(headline.median),
                    format!("({}–{})", rate_of(headline.least), rate_of(headline.most)),
                    gb.median,
                    format!("({:.2}–{:.2})", gb.least, gb.most),
                );
            }
        }
    }
}

/// What a peer's figure is of fbuf's, run by run.
pub(crate) fn ratio(outcomes: &[Outcome], peer: Peer) -> Option<Spread> {
    let of = |peer, run| outcomes.iter().find(|outcome| outcome.peer == peer && outcome.run == run);
    Spread::of(
        outcomes
            .iter()
            .filter(|outcome| outcome.peer == peer)
            .filter_map(|outcome| Some(outcome.headline() / of(Peer::Fbuf, outcome.run)?.headline())),
    )
}

fn quantiles(run: &Outcome) -> [f64; 4] {
    match run.figures {
        Measured::Latency { p50_ns, p99_ns, p999_ns, max_ns } => [p50_ns, p99_ns, p999_ns, max_ns].map(|ns| ns as f64),
        Measured::Stream { .. } => [f64::NAN; 4],
    }
}

/// A time, in three digits.
pub(crate) fn nanoseconds(ns: f64) -> String {
    digits(ns, &[(1e9, " s"), (1e6, " ms"), (1e3, " µs"), (1.0, " ns")])
}

/// A number of messages a second, in three digits.
pub(crate) fn rate_of(rate: f64) -> String {
    digits(rate, &[(1e6, " M"), (1e3, " k"), (1.0, "")])
}

fn digits(value: f64, units: &[(f64, &str)]) -> String {
    let Some(&(unit, name)) = units.iter().find(|(unit, _)| value >= *unit).or(units.last()) else {
        return value.to_string();
    };
    let value = value / unit;
    let places = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.places$}{name}")
}

/// A size, in the unit that it was most likely meant in.
pub(crate) fn bytes(size: usize) -> String {
    match size {
        _ if size >= 1 << 20 && size.is_multiple_of(1 << 20) => format!("{} MiB", size >> 20),
        _ if size >= 1 << 10 && size.is_multiple_of(1 << 10) => format!("{} KiB", size >> 10),
        _ => format!("{size} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        assert_eq!(nanoseconds(115.4), "115 ns");
        assert_eq!(nanoseconds(26_040.0), "26.0 µs");
        assert_eq!(nanoseconds(1_234_567.0), "1.23 ms");
        assert_eq!(rate_of(41_200_000.0), "41.2 M");
        assert_eq!(rate_of(7.0), "7.00");
        assert_eq!(bytes(65536), "64 KiB");
        assert_eq!(bytes(100), "100 B");
    }
}
