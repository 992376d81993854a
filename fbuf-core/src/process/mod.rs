//! This process: its system calls, its threads, what it drops on other threads, and what a forked child has of it.

pub mod deferred;
pub mod foreign;
pub mod fork;
pub mod lease;
pub mod processors;
pub mod sys;
pub mod threads;
