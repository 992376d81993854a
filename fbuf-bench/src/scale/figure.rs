//! One figure as a line of JSON, and many as tables: what was measured down the side, beside what along the top.

use std::fmt::Write as _;

use serde::Serialize;

use crate::{
    Result,
    outcome::Spread,
    table::{nanoseconds, rate_of},
};

/// What a table is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Subject {
    Attach,
    Room,
    FanOut,
    FanIn,
    Idle,
    Neighbour,
    HostileLinks,
}

impl Subject {
    fn title(self) -> &'static str {
        match self {
            Self::Attach => "time to attach, beside clients with a channel and a link each",
            Self::Room => "what each takes, on average",
            Self::FanOut => "one sender, receivers on one processor, 64 B",
            Self::FanIn => "senders on one processor, one receiver, 64 B",
            Self::Idle => "a stream on one link, beside idle channels",
            Self::Neighbour => "time to attach, beside a process that does what it can to the broker",
            Self::HostileLinks => "receiving, beside a process that does what it can to the receiver over many links",
        }
    }
}

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Unit {
    Ns,
    Bytes,
    Number,
    PerSecond,
    Ratio,
}

/// One figure, of several runs.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figure {
    workload: &'static str,
    pub(super) subject: Subject,
    pub(super) what: String,
    /// Beside what, or with how many.
    beside: String,
    /// How many there are of what varies.
    pub(super) count: u32,
    pub(super) unit: Unit,
    #[serde(flatten)]
    pub(super) value: Spread,
    /// Of how many values the median is.
    values: usize,
}

impl Figure {
    /// Of at least one value.
    pub(super) fn new(
        subject: Subject,
        what: impl Into<String>,
        (beside, count): (impl Into<String>, u32),
        unit: Unit,
        values: &[f64],
    ) -> Result<Self> {
        let (what, beside) = (what.into(), beside.into());
        let value = Spread::of(values.iter().copied()).ok_or("nothing was measured: ask for at least one run")?;
        Ok(Self { workload: "scale", subject, what, beside, count, unit, value, values: values.len() })
    }

    fn cell(&self) -> String {
        let Spread { median, least, most } = self.value;
        let tell = |value| match self.unit {
            Unit::Ns => nanoseconds(value),
            Unit::Bytes => format!("{:.1} KiB", value / 1024.0),
            Unit::Number => format!("{value:.1}"),
            Unit::PerSecond => rate_of(value),
            Unit::Ratio => format!("{value:.3}"),
        };
        if self.values == 1 {
            return tell(median);
        }
        format!("{} ({}–{})", tell(median), tell(least), tell(most))
    }
}

/// So many of them, in words.
pub(super) fn several(count: u32, one: &str) -> String {
    if count == 1 { format!("{count} {one}") } else { format!("{count} {one}s") }
}

/// A table for each subject, in the order in which the figures come.
pub(super) fn tables(figures: &[Figure]) -> String {
    let mut text = String::new();
    for subject in in_order(figures.iter().map(|figure| figure.subject)) {
        let of: Vec<_> = figures.iter().filter(|figure| figure.subject == subject).collect();
        let columns = in_order(of.iter().map(|figure| &figure.beside));
        // Writing to a string does not fail.
        let _ = write!(text, "\n{}\n  {:<34}", subject.title(), "");
        for column in &columns {
            let _ = write!(text, " {column:>26}");
        }
        text.push('\n');
        for what in in_order(of.iter().map(|figure| &figure.what)) {
            let _ = write!(text, "  {what:<34}");
            for column in &columns {
                let found = of.iter().find(|figure| (&figure.what, &figure.beside) == (what, column));
                let _ = write!(text, " {:>26}", found.map_or_else(String::new, |figure| figure.cell()));
            }
            text.push('\n');
        }
    }
    text
}

/// Each once.
fn in_order<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut each = Vec::new();
    for one in all {
        if !each.contains(&one) {
            each.push(one);
        }
    }
    each
}
