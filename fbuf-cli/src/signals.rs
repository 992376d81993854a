//! Signals that end a process, where their default action is not enough: before `fbuf top` dies it gives the terminal
//! back, and the first process of a PID namespace (a container's command) has no default action.

use std::{process, thread};

use nix::{
    sys::signal::{SigSet, Signal, raise},
    unistd::{Pid, getpid},
};

use crate::{Failure, standard};

/// Those that a terminal, a service manager or a container's engine sends.
const ENDING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// Whether this is the first process of its PID namespace, for which the kernel drops a signal without a handler.
pub(crate) fn is_first_process() -> bool {
    getpid() == Pid::from_raw(1)
}

/// From now on, this is done before a signal ends the process. Call it before there are other threads: they inherit
/// that these signals are blocked.
pub(crate) fn before_the_end(act: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    // One that is ignored (nohup(1)) stays so.
    let awaited: SigSet = ENDING.into_iter().filter(|&signal| !standard::ignores(signal)).collect();
    awaited.thread_block()?;
    thread::Builder::new().name("fbuf-signals".into()).spawn(move || {
        // Fails for no set of signals that exist.
        let Ok(signal) = awaited.wait() else { return };
        act();
        end_by(signal)
    })?;
    Ok(())
}

/// Ends the process as this signal does.
fn end_by(signal: Signal) -> ! {
    let _ = SigSet::from(signal).thread_unblock();
    let _ = raise(signal);
    // The first process of a PID namespace is still there; a shell reports the death of another one like this.
    process::exit(128 + signal as i32)
}
