//! What a probe found, as data.

use std::{fmt, io};

use fbuf_core::process::sys::os_error;
use nix::errno::Errno;

/// A group of probes under one heading.
#[derive(Debug)]
pub struct Section {
    /// Its heading.
    pub title: &'static str,
    /// What was found, in the order of printing.
    pub findings: Vec<Finding>,
}

/// What one probe found.
#[derive(Debug)]
pub struct Finding {
    /// What was tried or read.
    pub name: &'static str,
    /// Nothing of fbuf works without it.
    pub required: bool,
    /// How it went.
    pub outcome: Outcome,
    /// What was seen.
    pub seen: String,
}

/// How a probe went.
#[derive(Debug)]
pub enum Outcome {
    /// Tried, and it works.
    Works,
    /// Tried, and it does not.
    WorksNot(Consequence),
    /// It could not even be tried.
    Untried,
    /// A value, neither good nor bad.
    Fact,
}

/// What it means that something does not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Consequence {
    /// What follows from it, in a sentence.
    pub follows: &'static str,
    /// What to do about it, in a sentence.
    pub remedy: &'static str,
}

/// Why a probe has nothing good to report.
#[derive(Debug)]
pub enum Setback {
    /// What was tried does not work.
    WorksNot(String),
    /// Something that the probe needs first was not to be had.
    Untried(String),
}

impl Finding {
    /// A value.
    pub fn fact(name: &'static str, seen: impl Into<String>) -> Self {
        Self { name, required: false, outcome: Outcome::Fact, seen: seen.into() }
    }

    /// The result of trying something.
    pub fn tried(name: &'static str, result: Result<String, Setback>, otherwise: Consequence) -> Self {
        let (outcome, seen) = match result {
            Ok(seen) => (Outcome::Works, seen),
            Err(Setback::WorksNot(seen)) => (Outcome::WorksNot(otherwise), seen),
            Err(Setback::Untried(seen)) => (Outcome::Untried, format!("not tried: {seen}")),
        };
        Self { name, required: false, outcome, seen }
    }

    /// The same, as something that nothing of fbuf works without.
    pub fn required(self) -> Self {
        Self { required: true, ..self }
    }

    /// What it means, if it does not work.
    pub fn consequence(&self) -> Option<&Consequence> {
        match &self.outcome {
            Outcome::WorksNot(consequence) => Some(consequence),
            _ => None,
        }
    }

    /// It is required, and it does not work or could not be tried.
    pub fn is_missing(&self) -> bool {
        self.required && !matches!(self.outcome, Outcome::Works)
    }
}

/// Takes the result of what is being tried.
pub fn works<T, E: fmt::Display>(what: &str, result: Result<T, E>) -> Result<T, Setback> {
    result.map_err(|error| Setback::WorksNot(format!("{what}: {error}")))
}

/// Takes the result of what has to be done before something can be tried.
pub fn first<T, E: fmt::Display>(what: &str, result: Result<T, E>) -> Result<T, Setback> {
    result.map_err(|error| Setback::Untried(format!("{what}: {error}")))
}

/// Takes the result of what the kernel has to refuse, for one of these reasons.
pub fn refused<T>(what: &str, result: Result<T, impl Into<io::Error>>, reasons: &[Errno]) -> Result<(), Setback> {
    let Err(error) = result.map_err(Into::into) else {
        return Err(Setback::WorksNot(format!("{what} was not refused")));
    };
    match os_error(&error) {
        Some(found) if reasons.contains(&found) => Ok(()),
        _ => Err(Setback::WorksNot(format!("{what} failed, but for another reason than expected: {error}"))),
    }
}

/// A space at which the report breaks no line; it is printed as a plain one.
pub const TOGETHER: char = '\u{a0}';

/// A number of bytes as a person writes it.
pub fn bytes(number: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let unit = (0..UNITS.len()).rev().find(|unit| number >> (10 * unit) > 0).unwrap_or(0);
    let size = 1u64 << (10 * unit);
    if number.is_multiple_of(size) {
        format!("{}{TOGETHER}{}", number / size, UNITS[unit])
    } else {
        format!("{:.1}{TOGETHER}{}", number as f64 / size as f64, UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_in_the_largest_unit_that_fits() {
        let plain = |number| bytes(number).replace(TOGETHER, " ");
        assert_eq!(plain(0), "0 bytes");
        assert_eq!(plain(1023), "1023 bytes");
        assert_eq!(plain(48 << 10), "48 KiB");
        assert_eq!(plain(3 << 29), "1.5 GiB");
        assert_eq!(plain(5 << 50), "5120 TiB");
    }

    #[test]
    fn only_the_expected_refusal_counts_as_one() {
        let result = |error: Result<(), Errno>| refused("it", error, &[Errno::EPERM]);
        assert!(result(Err(Errno::EPERM)).is_ok());
        assert!(matches!(result(Err(Errno::EIO)), Err(Setback::WorksNot(_))));
        assert!(matches!(result(Ok(())), Err(Setback::WorksNot(_))));
    }

    #[test]
    fn what_is_required_and_untried_is_missing() {
        let otherwise = Consequence { follows: "", remedy: "" };
        let untried = || Finding::tried("it", Err(Setback::Untried("no".into())), otherwise);
        assert!(untried().required().is_missing());
        assert!(!untried().is_missing());
        assert!(!Finding::tried("it", Ok("yes".into()), otherwise).required().is_missing());
    }
}
