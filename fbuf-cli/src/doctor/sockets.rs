//! Unix sockets: messages that carry descriptors, and the word of the kernel on which process is calling.

use std::{
    fs::{File, Metadata},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileExt, MetadataExt},
    },
};

use fbuf_core::{
    limits::{MAX_DESCRIPTORS, MAX_MESSAGE},
    process::{foreign::Foreign, sys},
    socket::{
        Arrival, PacketSocket,
        wire::{Descriptor, Letter},
    },
};
use nix::{
    sys::socket::{getsockopt, sockopt::SndBuf},
    unistd::{getegid, geteuid, getpid},
};

use super::{
    finding::{Consequence, Finding, Section, Setback, bytes, first, works},
    memfd::{setting, small},
};

/// The group.
pub fn section() -> Section {
    let findings = vec![
        Finding::tried(
            "descriptor passing",
            passing(),
            Consequence {
                follows: "No process can be given another's buffers.",
                remedy: "Allow socketpair, sendmsg and recvmsg with SCM_RIGHTS in the sandbox or security module; \
                         raise `ulimit -n` if descriptors ran out; else, a kernel with CONFIG_UNIX.",
            },
        )
        .required(),
        Finding::tried(
            "SO_PEERCRED",
            credentials(),
            Consequence {
                follows: "The broker cannot know which user makes a request, so it grants none.",
                remedy: "Allow getsockopt in the sandbox, and raise `ulimit -n` if descriptors ran out; every Linux has it.",
            },
        )
        .required(),
        Finding::tried(
            "longest message",
            longest(),
            Consequence {
                follows: "Some introductions will fail: those of senders with many segments.",
                remedy: "`sysctl net.core.wmem_max=212992`, or `ulimit -n` where descriptors did not fit.",
            },
        ),
        Finding::tried(
            "SO_PASSRIGHTS",
            refusing(),
            Consequence {
                follows: "A client that sends descriptors to the broker costs it a thread, for as long as it takes to close \
                          them.",
                remedy: "Linux 6.16 or newer.",
            },
        ),
        Finding::fact("send buffer", send_buffer()),
    ];
    Section { title: "Sockets (SOCK_SEQPACKET)", findings }
}

fn pair() -> Result<(PacketSocket, PacketSocket), Setback> {
    let (one, other) = works("a pair", PacketSocket::pair())?;
    Ok((works("one end", PacketSocket::new(one))?, works("the other end", PacketSocket::new(other))?))
}

/// Sends a letter through a new pair of sockets, and says what came out.
fn round(bytes: Vec<u8>, descriptors: Vec<Descriptor>) -> Result<(Vec<u8>, Vec<Foreign>), Setback> {
    let (here, there) = pair()?;
    works("a message", here.send(&Letter { bytes, descriptors }))?;
    match works("recvmsg", there.receive::<MAX_MESSAGE>())? {
        Arrival::Message(bytes, descriptors) => Ok((bytes, descriptors)),
        Arrival::NoDescriptors => {
            Err(Setback::WorksNot("there was no room for the descriptors (RLIMIT_NOFILE)".into()))
        }
        other => Err(Setback::WorksNot(format!("a message was sent, and this arrived: {other:?}"))),
    }
}

fn passing() -> Result<String, Setback> {
    let sent = small()?;
    first("writing", sent.write_all_at(b"fbuf", 0))?;
    let identity = |found: io::Result<Metadata>| first("fstat", found.map(|file| (file.dev(), file.ino())));
    let expected = identity(sent.metadata())?;
    let (bytes, mut descriptors) = round(b"here it is".to_vec(), vec![OwnedFd::from(sent).into()])?;
    let (Some(received), true) = (descriptors.pop().map(|memory| File::from(memory.into_fd())), descriptors.is_empty())
    else {
        return Err(Setback::WorksNot("the message arrived without exactly its one descriptor".into()));
    };
    let mut content = [0; 4];
    works("reading what was passed", received.read_exact_at(&mut content, 0))?;
    if bytes != b"here it is" || identity(received.metadata())? != expected || &content != b"fbuf" {
        return Err(Setback::WorksNot("what arrived is not what was sent".into()));
    }
    Ok("a memfd went through in the same message as its bytes (SCM_RIGHTS)".into())
}

fn credentials() -> Result<String, Setback> {
    let (here, _there) = pair()?;
    let found = works("getsockopt", here.peer())?;
    let (pid, uid, gid) = (getpid().as_raw(), geteuid().as_raw(), getegid().as_raw());
    if (found.pid, found.uid, found.gid) != (pid, uid, gid) {
        return Err(Setback::WorksNot(format!("it says {found:?} of process {pid}, user {uid}, group {gid}")));
    }
    Ok(format!("names this process: user {uid}, group {gid}"))
}

fn longest() -> Result<String, Setback> {
    let shared = Descriptor::from(OwnedFd::from(small()?));
    let (bytes, descriptors) = round(vec![b'x'; MAX_MESSAGE], vec![shared; MAX_DESCRIPTORS])?;
    if (bytes.len(), descriptors.len()) != (MAX_MESSAGE, MAX_DESCRIPTORS) {
        let seen = format!("{} bytes and {} descriptors arrived", bytes.len(), descriptors.len());
        return Err(Setback::WorksNot(seen));
    }
    Ok(format!("{MAX_MESSAGE} bytes with {MAX_DESCRIPTORS} descriptors, the most that fbuf ever sends, went through"))
}

fn refusing() -> Result<String, Setback> {
    let (here, there) = pair()?;
    works("setsockopt", sys::refuse_descriptors(there.as_fd()))?;
    match here.send(&Letter { bytes: vec![0], descriptors: vec![OwnedFd::from(small()?).into()] }) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Ok("the kernel refuses descriptors that are sent to the broker".into())
        }
        other => Err(Setback::WorksNot(format!("it is set, and to send a descriptor gave {other:?}"))),
    }
}

fn send_buffer() -> String {
    let own = pair().ok().and_then(|(here, _there)| getsockopt(&here, SndBuf).ok());
    let own = own.and_then(|size| u64::try_from(size).ok()).map_or("unknown".into(), bytes);
    let kernel = |name| match setting(&format!("/proc/sys/net/core/{name}")).and_then(|text| text.parse().ok()) {
        Some(number) => format!("net.core.{name} is {}", bytes(number)),
        None => format!("net.core.{name} cannot be read here"),
    };
    format!("{own} for each socket, which bounds a message; {}, {}", kernel("wmem_default"), kernel("wmem_max"))
}
