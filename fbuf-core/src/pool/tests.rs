//! A pool without links.

use super::*;
use crate::loan::Fbuf;

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
    let fbuf = other.send_simply(fbuf).unwrap_err();
    assert!(matches!(one.send(fbuf), Err(Unsent::NoReceiver(_))));
}

#[test]
fn fbufs_outlive_their_pool_and_take_its_memory_with_them() {
    let mut pool = pool(2, 2);
    let shelf = Arc::downgrade(&pool.shelf);
    let (mut one, two) = (next(&mut pool).unwrap(), next(&mut pool).unwrap());
    drop(pool);
    one.resize(100).unwrap();
    one.fill(7);
    assert!(one.iter().all(|&byte| byte == 7));
    std::thread::spawn(move || drop(one)).join().unwrap();
    assert!(shelf.upgrade().is_some(), "the memory went while a fbuf was out");
    drop(two);
    assert!(shelf.upgrade().is_none(), "the memory stayed");
}

#[test]
fn a_dropped_fbuf_wakes_who_waits_for_it() {
    let mut pool = pool(1, 1);
    let fbuf = next(&mut pool).unwrap();
    assert!(pool.await_fbufs());
    drop(fbuf);
    assert_eq!(pool.shelf.wake.read(), Ok(1));
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
    assert_eq!(fbuf.read_from(&mut &[9u8; 200][..]).unwrap(), 95);
    assert_eq!(fbuf.read_from(&mut &[9u8; 200][..]).unwrap(), 0);
    assert_eq!(fbuf.write(b"x").unwrap(), 0);
    assert_eq!(fbuf.remaining_mut(), 0);
    assert!(fbuf.resize(101).is_err());
    fbuf.resize(3).unwrap();
    assert_eq!(&fbuf[..], b"\x01\x02a");
}
