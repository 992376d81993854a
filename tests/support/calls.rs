//! Counts system calls.

use std::{collections::HashSet, process::Command};

use nix::{
    sys::{
        ptrace::{self, Options},
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::Process;

/// Runs a command to its end, in order, and counts the system calls of its process, of those that it starts, and of all their threads,
/// from exec to exit. Other children of this process would be waited for as well: there must be none.
pub fn system_calls(of: &Command) -> u64 {
    // The shell stops itself, so that no call is missed before it is traced.
    let mut command = Command::new("sh");
    command.args(["-c", "kill -STOP $$; exec \"$@\"", "sh"]).arg(of.get_program()).args(of.get_args());
    command.envs(of.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let process = Process::start(command.stdout(std::process::Stdio::null()));
    let first = Pid::from_raw(process.pid() as i32);
    assert_eq!(waitpid(first, Some(WaitPidFlag::WUNTRACED)), Ok(WaitStatus::Stopped(first, Signal::SIGSTOP)));
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC;
    ptrace::seize(first, options).expect("permission to trace a child");
    kill(first, Signal::SIGCONT).unwrap();
    let (mut calls, mut inside) = (0, HashSet::new());
    loop {
        let status = waitpid(None, Some(WaitPidFlag::__WALL)).expect("traced processes");
        let Some(stopped) = status.pid() else { continue };
        let mut pass_on = None;
        match status {
            WaitStatus::Exited(pid, code) if pid == first => {
                assert_eq!(code, 0, "it failed: {of:?}");
                return calls;
            }
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => continue,
            // Each call stops twice, before and after.
            WaitStatus::PtraceSyscall(pid) if !inside.remove(&pid) => {
                inside.insert(pid);
                calls += 1;
            }
            WaitStatus::Stopped(_, signal) if !matches!(signal, Signal::SIGTRAP | Signal::SIGSTOP) => {
                pass_on = Some(signal);
            }
            _ => {}
        }
        // A process that was killed meanwhile cannot be continued, and is reported as such.
        let _ = ptrace::syscall(stopped, pass_on);
    }
}
