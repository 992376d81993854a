//! A file system that does not answer when its file is closed, and an attacker that passes that file.
#![allow(unsafe_code, reason = "mount(2)")]

use fbuf_core::ring::entry::LaneFormat;
use std::{
    fs,
    io::{self, Read, Write, stdin},
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    thread,
};

use fbuf_client::Address;
use fbuf_core::socket::{
    link_message::{LinkMessage, NewSegment, Welcome},
    wire::{self, Descriptor},
};
use nix::libc;

use crate::{attacker::SENDER, hostile::Hostile, support::until};

/// So many links end for what comes over them, before nothing more is taken: one that is waited for, eight that wait,
/// and perhaps one more that comes before the first has been waited for long.
pub const ATTACKS: usize = 10;

/// Is a file system with one file, which answers all but what is asked when that is closed.
pub fn mount(folder: &Path) -> ! {
    let device = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let c_string = |text: &str| std::ffi::CString::new(text).unwrap();
    let (kind, place) = (c_string("fuse"), c_string(folder.to_str().unwrap()));
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let options = c_string(&options);
    // SAFETY: all of these are strings that live here.
    let result = unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, options.as_ptr().cast()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    println!("it is mounted");
    thread::spawn(move || serve(device));
    stdin().read_line(&mut String::new()).unwrap();
    // It is there for as long as its file is open.
    // SAFETY: the string lives here.
    assert_eq!(unsafe { libc::umount2(place.as_ptr(), libc::MNT_DETACH) }, 0);
    println!("it is unmounted");
    loop {
        thread::park();
    }
}

/// Passes the file of such a file system.
pub fn attack(folder: &Path) -> ! {
    let file = fs::File::options().read(true).write(true).open(folder.join("file")).unwrap();
    println!("it is open");
    let (file, broker) = (Descriptor::from(OwnedFd::from(file)), Address::default_for_user());
    let attack = |count: usize| {
        for _ in 0..count {
            let hostile = Hostile::join(&broker, "c", SENDER);
            // As its lane, and as many segments.
            let memory = || NewSegment { memory: file.clone(), slots: 4 };
            let segments = (0..16).map(|_| memory()).collect();
            let lane = file.clone();
            let welcome = Welcome { lane, format: LaneFormat::PLAIN, first_sequence: 0, segments, slots: Vec::new() };
            // It may not be accepted.
            let _ = hostile.link.send(&wire::encode(&LinkMessage::Welcome(welcome)).unwrap());
            until("its peer hangs up", || hostile.link.hung_up());
            println!("it has attacked");
        }
    };
    attack(ATTACKS);
    println!("it pauses");
    stdin().read_line(&mut String::new()).unwrap();
    attack(ATTACKS);
    println!("it is done");
    loop {
        thread::park();
    }
}

/// Answers the kernel, in the words of linux/fuse.h.
fn serve(mut device: fs::File) {
    let mut request = vec![0; 1 << 17];
    while device.read(&mut request).is_ok() {
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let (operation, unique, node) = (word(4), &request[8..16], word(16));
        let attributes = |node: u32| {
            let mut words = [0u32; 22];
            words[0] = node;
            (words[15], words[16]) = (if node == 1 { 0o40_755 } else { 0o100_666 }, 1);
            words
        };
        let answer: Option<Result<Vec<u32>, i32>> = match operation {
            // LOOKUP: the node, its generation, and for how long that holds, which is not at all.
            1 => Some(Ok([vec![2, 0, 0, 0, 0, 0, 0, 0, 0, 0], attributes(2).to_vec()].concat())),
            // GETATTR
            3 => Some(Ok([vec![0; 4], attributes(node).to_vec()].concat())),
            // OPEN
            14 => Some(Ok(vec![0; 4])),
            // INIT: the version of the protocol, and nothing beyond it.
            26 => {
                let mut words = vec![0; 16];
                (words[0], words[1], words[5]) = (7, 31, 4096);
                Some(Ok(words))
            }
            // FORGET has no answer, STATFS and FLUSH get none.
            2 | 17 | 25 => None,
            // RELEASE, OPENDIR, RELEASEDIR, ACCESS
            18 | 27 | 29 | 34 => Some(Ok(Vec::new())),
            _ => Some(Err(libc::ENOSYS)),
        };
        let Some(answer) = answer else { continue };
        let (error, words) = answer.map_or_else(|error| (-error, Vec::new()), |words| (0, words));
        let length = 16 + 4 * words.len() as u32;
        let words: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let reply = [&length.to_ne_bytes()[..], &error.to_ne_bytes(), unique, &words].concat();
        device.write_all(&reply).unwrap();
    }
}
