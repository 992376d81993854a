//! Seeing what is going on: `fbuf ls` once, `fbuf top` over and over, and a broker's metrics for Prometheus.
//! Endpoints are asked only when somebody looks, and answer from another thread than that which exchanges
//! messages.

mod columns;
mod lines;
pub(crate) mod ls;
pub(crate) mod metrics;
pub(crate) mod top;

use fbuf_client::{Credentials, EndStatus, Oldest, Report};

/// A message that is held for so long,
const LONG: u64 = 10_000;
/// while its sender has sent so many more, may have been forgotten.
const MANY: u64 = 100;

/// Whether a receiver may have forgotten a message that it holds.
fn is_suspect(report: &Report) -> bool {
    report.oldest.is_some_and(|oldest| oldest.milliseconds >= LONG && oldest.behind >= MANY)
}

fn role(end: EndStatus) -> &'static str {
    match end {
        EndStatus::Sender { .. } => "sender",
        EndStatus::Receiver { .. } => "receiver",
    }
}

/// The number of a process; one in another PID namespace has none here.
fn number(process: Credentials) -> String {
    match process.pid {
        0 => "elsewhere".to_owned(),
        pid => pid.to_string(),
    }
}

/// By which means it protects, or what it requires.
fn protection(end: EndStatus) -> String {
    match end {
        EndStatus::Sender { mechanism, .. } => format!("{mechanism:?}").to_lowercase(),
        EndStatus::Receiver { require, .. } => format!("{require:?}").to_lowercase(),
    }
}

/// What changes between two looks, by the second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Rates {
    messages: f64,
    bytes: f64,
    waits: f64,
    sleeps: f64,
    left_out: f64,
}

impl Rates {
    fn between(before: &Report, now: &Report, seconds: f64) -> Self {
        let rate = |of: fn(&Report) -> u64| of(now).saturating_sub(of(before)) as f64 / seconds.max(1e-3);
        Self {
            messages: rate(|report| report.messages),
            bytes: rate(|report| report.bytes),
            waits: rate(|report| report.waits),
            sleeps: rate(|report| report.sleeps),
            left_out: rate(|report| report.left_out),
        }
    }
}

/// A number, short.
fn short(number: f64) -> String {
    // The sum of no numbers is -0.
    let number = number + 0.0;
    let units = [(1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.into_iter().find(|&(unit, _)| number >= unit) {
        Some((unit, name)) => format!("{:.1}{name}", number / unit),
        None if number.fract() == 0.0 => format!("{number:.0}"),
        None => format!("{number:.1}"),
    }
}

/// How long a message has been held, and how many came after it.
fn age(oldest: Option<Oldest>) -> String {
    oldest.map_or(String::new(), |oldest| {
        format!("{:.1} s, {} behind", oldest.milliseconds as f64 / 1000.0, short(oldest.behind as f64))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fbuf_protocol as protocol;

    #[test]
    fn rates_are_by_the_second_and_never_negative() {
        let before = protocol::Report { messages: 10, bytes: 100, waits: 5, ..protocol::Report::default() };
        let now = protocol::Report { messages: 30, bytes: 400, waits: 2, ..before };
        let rates = Rates::between(&before.into(), &now.into(), 2.0);
        assert_eq!((rates.messages, rates.bytes, rates.waits), (10.0, 150.0, 0.0));
    }

    #[test]
    fn a_message_is_suspect_if_it_is_held_while_many_pass() {
        let held = |milliseconds, behind| {
            let oldest = Some(protocol::Oldest { sequence: 1, behind, milliseconds });
            is_suspect(&protocol::Report { oldest, ..protocol::Report::default() }.into())
        };
        assert!(held(LONG, MANY) && !held(LONG - 1, MANY) && !held(LONG, MANY - 1));
        assert!(!is_suspect(&Report::default()));
    }

    #[test]
    fn a_process_of_another_namespace_is_no_process_zero() {
        let of = |pid| number(Credentials::new(pid, 0, 0));
        assert_eq!([of(0), of(7)], ["elsewhere", "7"]);
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(short(-0.0), "0");
        assert_eq!([0.0, 999.0, 1500.0, 2.5e6, 3e9, 0.25].map(short), ["0", "999", "1.5k", "2.5M", "3.0G", "0.2"]);
    }
}
