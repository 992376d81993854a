//! One run as one line of JSON, and many runs as a median with its spread.

use std::time::Duration;

use serde::Serialize;

use crate::{
    peers::Peer,
    terms::{Means, Mode, Terms, Wait, Work},
    work::{Figures, Run},
};

/// One run.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Outcome {
    pub(crate) peer: Peer,
    pub(crate) workload: &'static str,
    pub(crate) size: usize,
    pub(crate) mode: Mode,
    pub(crate) wait: Wait,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) slots: Option<u32>,
    #[serde(skip_serializing_if = "is_default")]
    pub(crate) means: Means,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rate_per_s: Option<f64>,
    /// How many processes are at the other end.
    #[serde(skip_serializing_if = "is_one")]
    pub(crate) others: u32,
    pub(crate) run: usize,
    pub(crate) messages: u64,
    pub(crate) seconds: f64,
    /// Of both processes.
    pub(crate) cpu_s: f64,
    pub(crate) cpu_s_sender: f64,
    pub(crate) cpu_s_receiver: f64,
    #[serde(flatten)]
    pub(crate) figures: Measured,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_one(count: &u32) -> bool {
    *count == 1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_default(means: &Means) -> bool {
    *means == Means::default()
}

/// What was measured.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(untagged)]
pub(crate) enum Measured {
    Latency { p50_ns: u64, p99_ns: u64, p999_ns: u64, max_ns: u64 },
    Stream { messages_per_s: f64, gb_per_s: f64 },
}

impl Outcome {
    pub(crate) fn new(terms: &Terms, run: usize, result: &Run) -> Self {
        let (sender, receiver) = (result.sender.cpu.as_secs_f64(), result.receiver.cpu.as_secs_f64());
        let (workload, rate_per_s) = match terms.work {
            Work::Stream if terms.others > 1 => ("fan-out", None),
            Work::Stream => ("stream", None),
            Work::FanIn => ("fan-in", None),
            Work::Echo { every: Duration::ZERO } => ("latency", None),
            Work::Echo { every } => ("wakeup", Some(every.as_secs_f64().recip())),
        };
        Self {
            peer: terms.peer,
            workload,
            size: terms.size,
            mode: terms.mode,
            wait: terms.wait,
            slots: terms.slots,
            means: terms.means,
            rate_per_s,
            others: terms.others,
            run,
            messages: result.messages,
            seconds: result.seconds,
            cpu_s: sender + receiver,
            cpu_s_sender: sender,
            cpu_s_receiver: receiver,
            figures: match result.figures {
                Figures::Latency(latency) => Measured::Latency {
                    p50_ns: latency.p50,
                    p99_ns: latency.p99,
                    p999_ns: latency.p999,
                    max_ns: latency.max,
                },
                Figures::Stream(stream) => {
                    Measured::Stream { messages_per_s: stream.messages_per_s, gb_per_s: stream.gb_per_s }
                }
            },
        }
    }

    /// In which line of a table it belongs.
    pub(crate) fn row(&self) -> Row {
        let Self { peer, wait, means, slots, others, rate_per_s: rate, .. } = *self;
        Row { peer, wait, means, slots, others, rate }
    }

    /// The figure by which peers are compared.
    pub(crate) fn headline(&self) -> f64 {
        match self.figures {
            Measured::Latency { p50_ns, .. } => p50_ns as f64,
            Measured::Stream { messages_per_s, .. } => messages_per_s,
        }
    }
}

/// What one of the things costs that are paid once.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Once {
    pub(crate) step: &'static str,
    #[serde(flatten)]
    pub(crate) nanoseconds: Spread,
}

/// What is told apart within one setting.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Row {
    pub(crate) peer: Peer,
    pub(crate) wait: Wait,
    pub(crate) means: Means,
    pub(crate) slots: Option<u32>,
    pub(crate) others: u32,
    pub(crate) rate: Option<f64>,
}

/// A median and the least and the most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    /// Of at least one figure.
    pub(crate) fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut figures: Vec<_> = figures.into_iter().collect();
        figures.sort_by(f64::total_cmp);
        let (&least, &most) = (figures.first()?, figures.last()?);
        let middle = figures.len() / 2;
        let median =
            if figures.len() % 2 == 1 { figures[middle] } else { f64::midpoint(figures[middle - 1], figures[middle]) };
        Some(Self { median, least, most })
    }

    /// All three by a factor.
    pub(crate) fn times(self, factor: f64) -> Self {
        Self { median: self.median * factor, least: self.least * factor, most: self.most * factor }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let spread = |figures: &[f64]| Spread::of(figures.iter().copied());
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(spread(&[4.0, 1.0, 3.0, 2.0]).map(|spread| spread.median), Some(2.5));
    }
}
