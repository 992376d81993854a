//! What fbuf costs, measured: between two processes, each on a processor of its own, beside what
//! else two processes could use, run by run in turn.
//!
//! `peers` are the ways between two processes; `work` is what is sent over them;
//! `pair` keeps the two processes; `outcome`, `table` and `report` say what came of it. `scale` measures what it
//! costs when there are many.

mod machine;
mod options;
mod outcome;
mod pair;
mod payload;
mod peers;
mod protection;
mod report;
mod scale;
mod suite;
mod table;
mod terms;
mod work;

use std::io::Write;

pub use options::Arguments;

/// Why there is no figure, in words.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
type Result<T> = std::result::Result<T, Error>;

/// Does what was asked for, and writes the results to `output`, each as soon as it is there.
///
/// # Errors
/// Words: a peer that could not be set up, or lost a message; a second process that died; an output that could not be written.
pub fn run(arguments: &Arguments, output: &mut dyn Write) -> Result<()> {
    options::run(arguments, output)
}
