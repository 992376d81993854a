//! Filters by which the kernel refuses system calls (seccomp(2)).

use std::io;

use nix::libc;

use super::not_tested;

/// Has a filter refuse a system call to all threads of this process from now on, with this error.
#[allow(unsafe_code, reason = "prctl(2) and seccomp(2)")]
pub fn refuse(call: libc::c_long, error: i32) -> io::Result<()> {
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code: u16, no: u8, k: u32| libc::sock_filter { code, jt: 0, jf: no, k };
    let mut steps = [
        // The number of the call, the first word of `struct seccomp_data`.
        step((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0),
        step((libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, 1, call as u32),
        step(RETURN, 0, libc::SECCOMP_RET_ERRNO | error as u32),
        step(RETURN, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the kernel reads the filter, which lives here.
    let installed = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_TSYNC,
                &raw const filter,
            ) == 0
    };
    if installed { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether this kernel has filters. If not, the test is noted as [`not_tested`].
pub fn can_refuse() -> bool {
    let can = std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("Seccomp:"));
    if !can {
        not_tested("this kernel has no seccomp, by which system calls are refused");
    }
    can
}
