//! What of a socket needs the kernel.

use super::*;
use crate::limits::MAX_AT_ONCE;
use crate::limits::{MAX_DESCRIPTORS, MAX_MESSAGE};
#[cfg(not(miri))]
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

fn pair() -> (PacketSocket, PacketSocket) {
    let (a, b) = PacketSocket::pair().unwrap();
    (PacketSocket::new(a).unwrap(), PacketSocket::new(b).unwrap())
}

fn letter(bytes: usize, descriptors: usize) -> Letter {
    let fd = Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
    Letter { bytes: vec![7; bytes], descriptors: vec![fd.into(); descriptors] }
}

#[test]
fn the_largest_message_arrives_whole() {
    let (a, b) = pair();
    a.send(&letter(MAX_MESSAGE, MAX_DESCRIPTORS)).unwrap();
    let Arrival::Message(bytes, descriptors) = b.receive::<MAX_MESSAGE>().unwrap() else { panic!("no message") };
    assert_eq!((bytes.len(), descriptors.len()), (MAX_MESSAGE, MAX_DESCRIPTORS));
    assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::Nothing));
}

#[test]
fn a_longer_message_is_noticed_and_one_with_descriptors_stays() {
    let (a, b) = pair();
    a.send(&letter(MAX_MESSAGE + 1, 0)).unwrap();
    assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::TooLong));
    a.send(&letter(1, 0)).unwrap();
    assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::Message(..)));
    a.send(&letter(1, 253)).unwrap();
    a.send(&letter(1, 0)).unwrap();
    for _ in 0..3 {
        assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::TooLong));
        assert!(matches!(b.receive_bytes::<MAX_MESSAGE>().unwrap(), Arrival::TooLong));
    }
    a.send(&letter(MAX_MESSAGE + 1, 1)).unwrap();
    assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::TooLong));
}

#[test]
fn descriptors_that_came_with_a_lost_message_are_closed() {
    let (a, b) = pair();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let writer = Arc::new(writer);
    a.send(&Letter { bytes: vec![7], descriptors: vec![writer.clone().into(); 253] }).unwrap();
    drop(writer);
    assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::TooLong));
    drop(b);
    assert_eq!(nix::unistd::read(&reader, &mut [0]), Ok(0), "the writing end is still open somewhere");
}

/// Whether this thread closes a socket.
fn closes_here(socket: PacketSocket) -> bool {
    #[derive(Debug)]
    struct Witness(std::sync::mpsc::SyncSender<std::thread::ThreadId>);
    impl Drop for Witness {
        fn drop(&mut self) {
            let _ = self.0.send(std::thread::current().id());
        }
    }
    let (say, said) = std::sync::mpsc::sync_channel(1);
    drop(socket.with(Witness(say)));
    said.recv().unwrap() == std::thread::current().id()
}

#[test]
fn a_socket_in_which_descriptors_wait_is_closed_by_another_thread_and_no_other_is() {
    let cases: [(&[(usize, usize)], bool); 8] = [
        (&[], true),
        (&[(1, 0); 3], true),
        (&[(MAX_MESSAGE + 1, 0), (1, 0)], true),
        // Of no bytes, as at the end.
        (&[(0, 0), (0, 0), (1, 0)], true),
        (&[(1, 1)], false),
        (&[(0, 1)], false),
        (&[(0, 0), (1, 0), (MAX_MESSAGE + 1, 0), (0, 0), (1, 64)], false),
        (&[(1, 0); MAX_AT_ONCE], false),
    ];
    for (letters, is_here) in cases {
        for hangs_up in [false, true] {
            let (a, b) = pair();
            letters.iter().for_each(|&(bytes, descriptors)| a.send(&letter(bytes, descriptors)).unwrap());
            let a = if hangs_up { None } else { Some(a) };
            assert_eq!(closes_here(b), is_here, "{letters:?}, {hangs_up}");
            assert!(a.is_none_or(|a| a.hung_up()));
        }
    }
}

#[test]
fn a_socket_that_was_reset_is_closed_as_any_other() {
    for descriptors in [0, 1] {
        let (a, b) = pair();
        b.send(&letter(1, 0)).unwrap();
        a.send(&letter(1, descriptors)).unwrap();
        drop(a);
        assert_eq!(closes_here(b), descriptors == 0);
    }
}

#[test]
fn what_the_kernel_refuses_never_comes() {
    let (a, own) = pair();
    let accept = |socket: &PacketSocket| PacketSocket::accepted(socket.as_fd().try_clone_to_owned().unwrap());
    let b = accept(&own);
    let refused = a.send(&letter(1, 1));
    if !sys::refuses_descriptors(b.as_fd()) {
        return println!("not tested: this kernel does not refuse descriptors");
    }
    assert_eq!(sys::os_error(&refused.unwrap_err()), Some(Errno::EPERM));
    a.send(&letter(1, 0)).unwrap();
    assert!(matches!(b.receive_bytes::<MAX_MESSAGE>().unwrap(), Arrival::Message(..)));
    assert!(!b.0.is_vetted, "what came before it was told to refuse them may carry some");
    assert!(accept(&b).0.is_vetted);
}

#[test]
fn what_was_sent_before_a_hang_up_arrives_before_it() {
    let (a, b) = pair();
    a.send(&letter(3, 1)).unwrap();
    drop(a);
    assert!(b.hung_up());
    assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::Message(..)));
    assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::HangUp));
    assert!(means_gone(&b.send(&letter(1, 0)).unwrap_err()));
}

/// A process that dies with something unread in its own socket resets that of the other side.
#[test]
fn what_was_sent_before_a_reset_arrives_before_it() {
    let (a, b) = PacketSocket::pair().unwrap();
    let b = PacketSocket::new(b).unwrap();
    send(a.as_raw_fd(), &[7; 3], MsgFlags::empty()).unwrap();
    b.send(&letter(4, 0)).unwrap();
    drop(a);
    assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::Message(..)));
    assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::HangUp));
}

#[test]
fn a_message_that_was_looked_at_before_a_reset_is_taken_off_after_it() {
    let (a, b) = PacketSocket::pair().unwrap();
    let b = PacketSocket::new(b).unwrap();
    send(a.as_raw_fd(), &[7; 3], MsgFlags::empty()).unwrap();
    b.send(&letter(4, 0)).unwrap();
    let mut buffer = [0; 8];
    assert_eq!(sys::peek(b.as_fd(), &mut buffer, 1).unwrap().length, 3);
    // Closed as by the death of a process, with something unread.
    drop(a);
    b.take_off().unwrap();
    assert!(matches!(b.receive::<MAX_MESSAGE>().unwrap(), Arrival::HangUp));
}

/// A pair with the smallest send buffers that the kernel makes, as under net.core.wmem_max=4608.
fn narrow_pair() -> (PacketSocket, PacketSocket) {
    let (a, b) = pair();
    for socket in [&a, &b] {
        setsockopt(socket, sockopt::SndBuf, &0).unwrap();
    }
    (a, b)
}

#[test]
fn small_send_buffers_are_widened() {
    let (socket, _other) = narrow_pair();
    assert!(socket.narrow().is_some_and(|size| size < MAX_MESSAGE));
    widen(&socket.0.descriptor);
    assert_eq!(socket.narrow(), None);
    socket.send(&letter(MAX_MESSAGE, MAX_DESCRIPTORS)).unwrap();
}

#[test]
fn a_message_that_a_send_buffer_cannot_take_is_told_which_limit_it_is() {
    let (a, _b) = narrow_pair();
    let error = a.send(&letter(MAX_MESSAGE, 0)).unwrap_err().to_string();
    assert!(error.contains("16384 bytes") && error.contains("net.core.wmem_max"), "{error}");
}

#[test]
fn so_many_messages_with_a_descriptor_fit_as_are_reckoned() {
    let (a, _b) = pair();
    let sent = (0..).take_while(|_| a.send(&letter(16, 1)).is_ok()).count();
    assert!(sent >= SEND_BUFFER / crate::limits::MESSAGE_COST, "only {sent}");
    assert!(a.unread() >= SEND_BUFFER);
}

#[test]
fn a_full_socket_says_so() {
    let (a, _b) = pair();
    let error = loop {
        if let Err(error) = a.send(&letter(MAX_MESSAGE, 0)) {
            break error;
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
}

/// Has the kernel refuse a system call to this thread (seccomp(2)).
#[expect(unsafe_code, reason = "prctl(2)")]
pub(crate) fn refuse_here(call: libc::c_long) {
    let step = |code: u32, no: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: no, k };
    let mut steps = [
        // The number of the call, the first word of `struct seccomp_data`.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, call as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    nix::sys::prctl::set_no_new_privs().unwrap();
    // SAFETY: the kernel reads the filter, which lives here.
    let installed = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    Errno::result(installed).unwrap();
}

/// A filter may permit recvmsg(2), by which it is looked what waits, and not recvfrom(2), by which it is taken off.
#[test]
fn a_socket_from_which_nothing_can_be_taken_off_is_closed_all_the_same() {
    const USER: u32 = 4_200_000_012;
    let process = Credentials { pid: 1, uid: USER, gid: USER };
    let peer = Peer { endpoint: 1, process, same_user: false, trusted: false, link: crate::peer::LinkId::default() };
    let (one, other) = PacketSocket::pair().unwrap();
    let (own, other) = (PacketSocket::new(one).unwrap().of_link_with(&peer), PacketSocket::new(other).unwrap());
    own.send(&letter(1, 1)).unwrap();
    assert!(under_way::is_noted(USER));
    other.send(&letter(1, 1)).unwrap();
    let (say, said) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        refuse_here(libc::SYS_recvfrom);
        // As the thread that closes it.
        drop(own.0.into_inner());
        let _ = say.send(());
    });
    said.recv_timeout(Duration::from_secs(10)).expect("it is never closed");
    assert!(!under_way::is_noted(USER), "what was sent over it is noted for ever");
    assert!(other.has_hung_up());
}

/// So many wait at the end of a peer: duplicates of it in several epolls.
#[cfg(not(miri))]
fn with_waiters(end: &PacketSocket) -> (Vec<OwnedFd>, Vec<Epoll>, usize) {
    let duplicates: Vec<_> = (0..1000).map_while(|_| end.as_fd().try_clone_to_owned().ok()).collect();
    let (mut epolls, mut count) = (Vec::new(), 0);
    for _ in 0..300 {
        let Ok(epoll) = Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()) else { break };
        let events = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, 0);
        count += duplicates.iter().take_while(|duplicate| epoll.add(duplicate, events).is_ok()).count();
        epolls.push(epoll);
    }
    (duplicates, epolls, count)
}

/// How much of a processor this thread has used.
#[cfg(not(miri))]
fn used() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

#[cfg(not(miri))]
#[test]
fn a_user_is_found_out_if_very_many_wait_at_an_end_of_its_and_its_sockets_hold_up_nobody() {
    use crate::socket::link_message::{LinkEnd, ReadError, receive, ring};
    let link = |uid| {
        let (own, its) = PacketSocket::pair().unwrap();
        let process = Credentials { pid: 1, uid, gid: uid };
        let peer =
            Peer { endpoint: 1, process, same_user: false, trusted: false, link: crate::peer::LinkId::default() };
        (PacketSocket::new(own).unwrap().of_link_with(&peer), PacketSocket::new(its).unwrap())
    };
    // No other test knows these users.
    let (user, other) = (4_200_000_001, 4_200_000_002);
    let ((own, its), (second, second_its)) = (link(user), link(user));
    let waiting = with_waiters(&its);
    if waiting.2 < 100_000 {
        return println!("not tested: only {} can wait (RLIMIT_NOFILE, fs.epoll.max_user_watches)", waiting.2);
    }
    let begin = used();
    while !waiters::is_slow(user) {
        assert!(ring(&own));
        assert!(used() - begin < Duration::from_secs(1), "it is not found out");
    }
    // Each did, before.
    const CALLS: usize = 10;
    let long = (0..CALLS).filter(|_| {
        let begin = used();
        assert!(ring(&own) && ring(&second));
        used() - begin > Duration::from_millis(2)
    });
    let long = long.count();
    assert!(long < CALLS / 2, "{long} calls of {CALLS} took long");
    let patience = std::time::Instant::now();
    for socket in [&second_its, &its] {
        // All is there that was to be.
        while !matches!(socket.receive::<64>(), Ok(Arrival::Message(..))) {
            assert!(patience.elapsed() < Duration::from_secs(60), "a bell is never rung");
            std::thread::yield_now();
        }
        assert!(socket.send_bytes(&[0]).is_ok());
    }
    for socket in [&second, &own] {
        while !matches!(receive(socket, 0), Ok(Some(_))) {
            assert!(patience.elapsed() < Duration::from_secs(60), "a message never comes");
            std::thread::yield_now();
        }
    }
    drop(second_its);
    while !matches!(receive(&second, 0), Err(ReadError::End(LinkEnd::HangUp))) {
        assert!(patience.elapsed() < Duration::from_secs(60), "an end never comes");
        std::thread::yield_now();
    }
    drop((own, second));
    while !its.has_hung_up() {
        assert!(patience.elapsed() < Duration::from_secs(60), "its peer sees no hang-up");
        std::thread::yield_now();
    }
    // The control: a user, all sockets of which are fast.
    let (own, its) = link(other);
    for _ in 0..1000 {
        assert!(ring(&own) && matches!(its.receive::<64>(), Ok(Arrival::Message(..))));
    }
    assert!(!waiters::is_slow(other));
}
