//! What takes long to close, with the library and without it.

use std::time::Duration;

use fbuf_core::{
    limits::MAX_MESSAGE,
    process::foreign::Foreign,
    socket::{Arrival, PacketSocket, wire},
};

use crate::{
    FOR_EVER, LINGER, letter,
    lingering::lingering,
    support::{closers, until},
    time,
};

fn pair() -> (PacketSocket, PacketSocket) {
    let (one, other) = PacketSocket::pair().unwrap();
    (PacketSocket::new(one).unwrap(), PacketSocket::new(other).unwrap())
}

/// That what is tested takes long where nothing is done about it: a socket that is closed, and one in which it waits.
pub fn bare() {
    for taken in [true, false] {
        let (from, to) = PacketSocket::pair().unwrap();
        let from = PacketSocket::new(from).unwrap();
        from.send(&letter(vec![lingering(LINGER)])).unwrap();
        let held: Box<dyn Send> = if taken {
            let to = PacketSocket::new(to).unwrap();
            let Arrival::Message(_, mut descriptors) = to.receive::<64>().unwrap() else { panic!("no message") };
            Box::new(descriptors.remove(0).into_fd())
        } else {
            Box::new(to)
        };
        println!("it took {} ms", time(|| drop(held)).as_millis());
    }
}

/// What the sockets of the library do, also those to which a kernel refuses no descriptors.
pub fn sockets() {
    let took = |what: &str, time: Duration| println!("{what}: it took {} ms", time.as_millis());
    let (from, to) = pair();
    (0..3).for_each(|_| from.send(&letter(vec![lingering(LINGER)])).unwrap());
    took("to look", time(|| assert!(matches!(to.receive_bytes::<MAX_MESSAGE>().unwrap(), Arrival::TooLong))));
    took("to take", time(|| assert!(matches!(to.receive::<MAX_MESSAGE>().unwrap(), Arrival::Message(..)))));
    took("to drop what waits", time(|| drop(to)));
    assert!(from.hung_up(), "the other side does not see that it is dropped");
    // In a socket in a socket.
    let (inner, nested) = PacketSocket::pair().unwrap();
    PacketSocket::new(inner).unwrap().send(&letter(vec![lingering(LINGER)])).unwrap();
    let (from, to) = pair();
    from.send(&letter(vec![nested.into()])).unwrap();
    took("to drop what waits in what waits", time(|| drop((from, to))));
    let unnamed = || vec![Foreign::from(lingering(LINGER).into_owned().unwrap())];
    took("to decode", time(|| drop(wire::decode::<u8>(&[7], unnamed()))));
    // However many there are, one thread waits for them.
    for _ in 0..60 {
        let socket = lingering(FOR_EVER);
        drop(Foreign::from(socket.into_owned().unwrap()));
        until("a thread is at it", || closers(std::process::id()) > 0);
    }
    println!("{} threads wait", closers(std::process::id()));
}
