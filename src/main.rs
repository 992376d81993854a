//! The fbuf command.
fn main() {}
