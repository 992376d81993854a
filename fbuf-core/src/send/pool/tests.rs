//! A pool without links.

use std::os::fd::OwnedFd;

use nix::{errno::Errno, sys::eventfd::EventFd};

use super::*;
use crate::{
    memory::{Leasable, Pages, leasable::OPENING},
    send::fbuf::Fbuf,
};

fn next(pool: &mut Pool) -> Option<Fbuf> {
    pool.allocate().or_else(|| pool.collect(64).then(|| pool.allocate())?)
}

fn pool(slots: u32, limit: u64) -> Pool {
    let wake = Arc::new(EventFd::new().unwrap());
    Pool::new(Geometry::new(100, limit).unwrap(), slots, wake).unwrap()
}

#[test]
fn a_slot_is_in_one_place() {
    let mut pool = pool(3, 3);
    let all: Vec<_> = std::iter::from_fn(|| next(&mut pool)).collect();
    assert_eq!(all.len(), 3);
    assert_eq!(pool.places(), Places { free: 0, held: 3, lent: 0 });
    let mut starts: Vec<_> = all.iter().map(|fbuf| fbuf.as_ptr() as usize).collect();
    starts.sort_unstable();
    assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= 100), "slots overlap");
    drop(all);
    assert_eq!(pool.places(), Places { free: 3, held: 0, lent: 0 });
    assert!(pool.search());
    assert_eq!(pool.places(), Places { free: 3, held: 0, lent: 0 });
    assert_eq!(std::iter::from_fn(|| next(&mut pool)).count(), 3);
}

#[test]
fn growth_doubles_up_to_the_limit() {
    let mut pool = pool(2, 7);
    pool.grow().unwrap();
    assert!(pool.is_growing());
    assert_eq!(pool.places(), Places { free: 2, held: 0, lent: 0 }, "slots are free before receivers know of them");
    pool.use_segment();
    pool.grow().unwrap();
    pool.use_segment();
    assert!(!pool.can_grow() && !pool.is_growing());
    assert_eq!(pool.announce(0).map(|segment| segment.slots).collect::<Vec<_>>(), [2, 2, 3]);
    assert_eq!(std::iter::from_fn(|| next(&mut pool)).count(), 7);
}

#[test]
fn a_fbuf_of_another_pool_is_handed_back() {
    let (mut one, mut other) = (pool(1, 1), pool(1, 1));
    let fbuf = next(&mut one).unwrap();
    let Err(Unsent::OtherPool(fbuf)) = other.send(fbuf) else { panic!("it was sent") };
    let fbuf = other.send_fast(fbuf).unwrap_err();
    assert!(matches!(one.send(fbuf), Err(Unsent::NoReceiver(_))));
}

#[test]
fn fbufs_outlive_their_pool_and_take_its_memory_with_them() {
    let mut pool = pool(2, 2);
    let unsent = Arc::downgrade(&pool.unsent);
    let (mut one, two) = (next(&mut pool).unwrap(), next(&mut pool).unwrap());
    drop(pool);
    one.set_len(100).unwrap();
    one.fill(7);
    assert!(one.iter().all(|&byte| byte == 7));
    std::thread::spawn(move || drop(one)).join().unwrap();
    assert!(unsent.upgrade().is_some(), "the memory went while an fbuf was out");
    drop(two);
    assert!(unsent.upgrade().is_none(), "the memory stayed");
}

#[test]
fn a_dropped_fbuf_wakes_who_waits_for_it() {
    let mut pool = pool(1, 1);
    let fbuf = next(&mut pool).unwrap();
    assert!(pool.await_fbufs());
    drop(fbuf);
    assert_eq!(pool.unsent.wake.read(), Ok(1));
    assert!(!pool.await_fbufs(), "there is one already");
}

#[test]
fn filling_is_bounded_by_the_slot() {
    use bytes::BufMut;
    use std::io::Write;
    let mut pool = pool(1, 1);
    let mut fbuf = next(&mut pool).unwrap();
    assert!(fbuf.is_empty());
    fbuf.put_u16(0x0102);
    fbuf.write_all(b"abc").unwrap();
    assert_eq!(&fbuf[..], b"\x01\x02abc");
    assert_eq!(fbuf.read_once_from(&mut &[9u8; 200][..]).unwrap(), 95);
    assert_eq!(fbuf.read_once_from(&mut &[9u8; 200][..]).unwrap(), 0);
    assert_eq!(fbuf.write(b"x").unwrap(), 0);
    assert_eq!(fbuf.remaining_mut(), 0);
    assert!(fbuf.set_len(101).is_err());
    fbuf.set_len(3).unwrap();
    assert_eq!(&fbuf[..], b"\x01\x02a");
}

#[test]
fn a_pool_that_is_to_begin_with_no_slot_begins_with_one() {
    let (geometry, wake) = (Geometry::new(64, 1).unwrap(), Arc::new(EventFd::new().unwrap()));
    let of_one_shots = || Pool::of_one_shots(geometry, 0, wake.clone());
    // Of these each is a memfd, of which Miri knows nothing.
    let one_shots = (!cfg!(miri)).then(of_one_shots);
    for pool in one_shots.into_iter().chain([Pool::new(geometry, 0, wake.clone())]) {
        let mut pool = pool.unwrap();
        assert!(pool.is_back(0) && pool.collect(1));
        assert_eq!((pool.slots(), pool.allocate().map(|fbuf| fbuf.capacity())), (1, Some(64)));
    }
}

/// Two fbufs over the same bytes would be two `&mut [u8]` of them.
#[test]
#[cfg_attr(miri, ignore = "memory that is leased is a memfd, of which Miri knows nothing")]
fn one_piece_of_memory_is_not_two_slots() {
    let geometry = Geometry::new(64, 2).unwrap();
    let owner = nix::unistd::geteuid().as_raw();
    let memory = || OwnedFd::from(Leasable::create("fbuf-test", 64, false, owner).unwrap());
    let pool = |memory| Pool::of_memory(geometry.into(), memory, Pages::Base, Arc::new(EventFd::new().unwrap()));
    // The control: two pieces are.
    let (mut two, _) = pool(vec![memory(), memory()]).unwrap();
    assert_eq!(std::iter::from_fn(|| next(&mut two)).count(), 2);
    let one = memory();
    let again = one.try_clone().unwrap();
    let error = pool(vec![one, again]).unwrap_err().to_string();
    assert!(error.contains("other slots"), "{error}");
}

#[test]
fn what_a_slot_lacks_is_told_by_the_call_that_was_refused() {
    let slot = Shortage::ONE_SHOT;
    let behind = |call, errno: Errno| Lack::behind(&MemoryError::Refused { call, asked: 1, error: errno.into() }, slot);
    assert_eq!(behind(OPENING, Errno::EACCES), Lack::Permission);
    assert_eq!(behind(OPENING, Errno::ENOENT), Lack::Proc);
    assert_eq!(behind("memfd_create", Errno::EMFILE), Lack::Descriptors);
    assert!(matches!(behind("fallocate", Errno::ENOSPC), Lack::Memory(_)));
    // A filter of system calls: neither of slots that are leased, nor of memory.
    for (call, errno) in [("memfd_create", Errno::EPERM), ("fallocate", Errno::EPERM), (OPENING, Errno::ENOSYS)] {
        assert_eq!(behind(call, errno), Lack::Refused { call, errno });
    }
}
