//! The threads that this library starts, in whatever program: none takes a signal that is meant for the program,
//! none starves behind the thread that started it, and none ends because code of the program panics on it.
//!
//! A new thread inherits signal mask, scheduling policy, priority and processors. Started by a thread that spins under
//! SCHED_FIFO on one processor, it would never run.

use std::{
    io, mem,
    panic::{AssertUnwindSafe, catch_unwind},
    thread::{Builder, JoinHandle},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::signal::{SigSet, SigmaskHow, pthread_sigmask},
    unistd::Pid,
};

use crate::process::sys::{self, in_call};

/// The stack of a thread: what Rust gives each, if RUST_MIN_STACK does not say otherwise, which is meant for others.
const STACK_BYTES: usize = 2 << 20;
/// What it maps beside that: guard pages, and a stack for the handlers of signals, without which Rust ends the process.
#[cfg(not(miri))]
const BESIDE_STACK_BYTES: usize = 128 << 10;

/// Starts a thread that blocks all signals from its first instruction on, and that leaves real-time scheduling.
///
/// If its creator runs under a real-time policy, the thread runs under SCHED_OTHER on the processors that its creator
/// is not confined to. If there are no others, and the creator is confined to one, the thread stays there, one step
/// above its creator in priority: its work is short, and must not wait for a creator that spins.
///
/// # Errors
/// What pthread_create(3) says, or mmap(2) of its stacks: a thread that gets only one of them would end the process.
pub fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    #[cfg(not(miri))]
    sys::try_map(STACK_BYTES + BESIDE_STACK_BYTES).map_err(in_call("mmap, for the stack of a thread"))?;
    let mut before = SigSet::empty();
    // Blocked here, so that there is no moment in which the thread could take a signal.
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
    let thread = Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn(move || {
        leave_real_time();
        run();
    });
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    thread.map_err(in_call("pthread_create"))
}

/// Runs code of the program, such as a predicate or a destructor, so that the thread goes on if it panics: what it returned,
/// or none. The panic was reported by the program's hook.
pub fn contain<T>(run: impl FnOnce() -> T) -> Option<T> {
    let payload = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(returned) => return Some(returned),
        Err(payload) => payload,
    };
    // The payload is the program's as well, and may panic when it is dropped. That panic's is leaked, so that there is an end.
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        mem::forget(payload);
    }
    None
}

/// See [`spawn`]. What the kernel does not permit is left as it is.
fn leave_real_time() {
    let Some(priority) = sys::real_time_priority() else { return };
    let here = Pid::from_raw(0);
    let Ok(shared) = sched_getaffinity(here) else { return };
    let is_shared = |processor| shared.is_set(processor) == Ok(true);
    let mut others = CpuSet::new();
    for processor in (0..CpuSet::count()).filter(|&processor| !is_shared(processor)) {
        // It is below the count.
        let _ = others.set(processor);
    }
    // The kernel leaves out those that there are not, or that the cpuset lacks, and refuses an empty set.
    let moved = sched_setaffinity(here, &others).is_ok();
    let confined = (0..CpuSet::count()).filter(|&processor| is_shared(processor)).count() == 1;
    if moved || !confined || sys::set_real_time_priority(priority + 1).is_err() {
        // SCHED_OTHER is open to all.
        let _ = sys::leave_real_time();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_blocks_all_signals_and_its_creator_goes_on_as_before() {
        let mask = || {
            let mut mask = SigSet::empty();
            pthread_sigmask(SigmaskHow::SIG_BLOCK, None, Some(&mut mask)).unwrap();
            mask
        };
        let before = mask();
        let thread = spawn("fbuf-test", move || {
            // All but SIGKILL, SIGSTOP, and those that the C library keeps for itself.
            let blocked = mask().iter().count();
            assert!(blocked > before.iter().count() && blocked >= 29, "{blocked} signals are blocked");
            assert_eq!(std::thread::current().name(), Some("fbuf-test"));
        });
        thread.unwrap().join().unwrap();
        assert_eq!(mask(), before);
    }

    /// Of a thread that gets a stack, and no second one for signals, Rust ends the process.
    #[test]
    #[cfg(not(miri))]
    fn without_addresses_for_its_stacks_a_thread_is_refused() {
        use nix::sys::resource::{Resource, setrlimit};
        if !crate::tests::is_alone("process::threads::tests::without_addresses_for_its_stacks_a_thread_is_refused") {
            return;
        }
        let used = || {
            let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
            pages.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096
        };
        // So that a stack is kept for the next thread, and those for signals are what lacks.
        spawn("fbuf-test", || ()).unwrap().join().unwrap();
        let (start, mut counts) = (used(), [0, 0]);
        for step in 0..700 {
            setrlimit(Resource::RLIMIT_AS, start + step * 4096, u64::MAX).unwrap();
            let thread = spawn("fbuf-test", || ());
            counts[usize::from(thread.is_ok())] += 1;
            if let Ok(thread) = thread {
                thread.join().unwrap();
            }
        }
        setrlimit(Resource::RLIMIT_AS, u64::MAX, u64::MAX).unwrap();
        assert!(counts.iter().all(|&count| count > 50), "refused and granted: {counts:?}");
    }

    #[test]
    fn a_panic_is_contained_and_so_are_those_of_what_it_carries() {
        struct Payload;
        impl Drop for Payload {
            fn drop(&mut self) {
                std::panic::panic_any(Self);
            }
        }
        assert_eq!(contain(|| 1), Some(1));
        assert_eq!(contain(|| panic!("a panic")), None::<()>);
        assert_eq!(contain(|| std::panic::panic_any(Payload)), None::<()>);
    }

    #[test]
    fn a_thread_has_its_stack_whatever_the_environment_says() {
        const LITTLE: &str = "262144";
        if std::env::var("RUST_MIN_STACK").is_ok_and(|bytes| bytes == LITTLE) {
            let deep = || {
                let room = [0u8; STACK_BYTES / 2];
                std::hint::black_box(&room);
            };
            let thread = spawn("fbuf-test", deep);
            return thread.unwrap().join().unwrap();
        }
        let name = "process::threads::tests::a_thread_has_its_stack_whatever_the_environment_says";
        let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
        let output = alone.args([name, "--exact"]).env("RUST_MIN_STACK", LITTLE).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
    }
}
