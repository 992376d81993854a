//! No child that was forked waits for a lock of its parent.
#![allow(unsafe_code)]

use std::{
    fs::File,
    hint::black_box,
    os::fd::OwnedFd,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::{ForkResult, alarm, fork},
};

use crate::{
    process::{
        deferred,
        fork::{self, Withheld},
    },
    receive::{
        link,
        reading::{claim, lease_thread},
    },
    send::guard,
    socket::{relay, shares, under_way, waiters},
};

/// Forks again and again, while another thread takes and lets go of a lock: no child waits for it.
fn no_child_waits<Lock>(lock: impl Fn() -> Lock + Sync) -> bool {
    // What registers the handlers.
    let _withheld = Withheld::from(OwnedFd::from(File::open("/dev/null").unwrap()));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                black_box(lock());
            }
        });
        let all_ended = (0..100).all(|_| {
            // SAFETY: the child takes the one lock that this is about, and ends.
            match unsafe { fork() }.unwrap() {
                ForkResult::Child => {
                    alarm::set(2);
                    drop(lock());
                    // SAFETY: it takes a number, and runs nothing of this process.
                    unsafe { libc::_exit(0) }
                }
                ForkResult::Parent { child } => waitpid(child, None) == Ok(WaitStatus::Exited(child, 0)),
            }
        });
        over.store(true, Ordering::Relaxed);
        all_ended
    })
}

#[test]
fn no_child_waits_for_a_thread_of_its_parent() {
    // In a process of its own: for a moment a child has the memory of other tests, which then cannot be sealed.
    if !super::is_alone("tests::at_fork::no_child_waits_for_a_thread_of_its_parent") {
        return;
    }
    assert!(no_child_waits(|| lease_thread::CURRENT.lock()));
    assert!(no_child_waits(|| guard::WATCH.lock()));
    assert!(no_child_waits(link::lock));
    assert!(no_child_waits(|| claim::CLAIMED.lock()));
    assert!(no_child_waits(|| shares::TAKEN.lock()));
    assert!(no_child_waits(|| under_way::UNDER_WAY.lock()));
    assert!(no_child_waits(|| relay::LINES.lock()));
    assert!(no_child_waits(|| waiters::USERS.lock()));
    assert!(no_child_waits(|| deferred::LINES.lock()));
    assert!(no_child_waits(fork::withheld));
    // The control: a lock that the handlers do not know.
    static OTHER: Mutex<()> = Mutex::new(());
    assert!(!no_child_waits(|| OTHER.lock()));
}
