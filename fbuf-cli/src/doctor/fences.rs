//! membarrier(2), by which the side that goes to sleep fences for both, so that sending does not.

use fbuf_core::process::sys::{Membarrier, membarrier};

use super::finding::{Consequence, Finding, Section, Setback, works};

/// The group.
pub fn section() -> Section {
    let finding = Finding::tried(
        "membarrier, expedited",
        expedited(),
        Consequence {
            follows: "Each message costs a fence, on both sides: about twice the time for 64 bytes.",
            remedy: "Allow membarrier in the seccomp filter; else, kernel 4.16 or later.",
        },
    );
    Section { title: "Fences", findings: vec![finding] }
}

fn expedited() -> Result<String, Setback> {
    works("registering for GLOBAL_EXPEDITED", membarrier(Membarrier::Register))?;
    works("GLOBAL_EXPEDITED", membarrier(Membarrier::Everywhere))?;
    let forgone = std::env::var_os("FBUF_FENCE").is_some_and(|value| value == "full");
    let but = if forgone { "; FBUF_FENCE=full in the environment forgoes it" } else { "" };
    Ok(format!("registered and executed: sending needs no fence{but}"))
}
