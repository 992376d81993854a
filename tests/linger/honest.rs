//! One that is attacked, and says how long its calls took.

use std::{io::stdin, sync::mpsc, thread, time::Duration};

use fbuf_client::{Client, DisconnectReason, GetError, Receiver, Sender};
use fbuf_core::process::deferred;

use crate::{
    OTHER,
    support::{SOON, closers},
    time,
};

/// One that sends and receives, and says which call took longest when it is told to end.
pub fn honest() {
    let client = Client::connect().unwrap();
    let mut sender = client.sender("c").slot_size(64).slots(4).grow_to(64).open().unwrap();
    let mut receiver = client.receiver("c").keep_waiting().open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    println!("it is linked");
    let (tell, told) = mpsc::channel();
    let (mut longest, mut offences, mut takes) = (Duration::ZERO, 0u64, true);
    thread::spawn(move || {
        stdin().read_line(&mut String::new()).unwrap();
        tell.send(()).unwrap();
    });
    let mut number = 0u64;
    // A message every so often, until it is told.
    while told.recv_timeout(Duration::from_micros(200)).is_err() {
        longest = longest.max(time(|| offences += send(&mut sender, number)));
        longest = longest.max(time(|| offences += receive(&mut receiver, number)));
        number += 1;
        if takes && deferred::is_overrun(OTHER) {
            takes = false;
            println!("it takes no more");
        }
    }
    println!("offences: {offences}");
    println!("longest call: {} ms", longest.as_millis());
    let drops = [time(|| drop(receiver)), time(|| drop(sender)), time(|| drop(client))];
    println!("longest drop: {} ms", drops.iter().max().unwrap().as_millis());
    println!("{} threads wait", closers(std::process::id()));
    println!("it is over");
}

fn send(sender: &mut Sender, number: u64) -> u64 {
    let mut fbuf = sender.allocate_timeout(SOON).unwrap();
    fbuf.set_len(8).unwrap();
    fbuf.copy_from_slice(&number.to_ne_bytes());
    sender.write(fbuf).unwrap();
    let reasons = std::iter::from_fn(|| sender.next_departure()).map(|departure| departure.reason);
    reasons.filter(|reason| matches!(reason, DisconnectReason::Violation { .. })).count() as u64
}

/// Until that message comes: how many violations are told of before.
fn receive(receiver: &mut Receiver, number: u64) -> u64 {
    let mut offences = 0;
    loop {
        match receiver.get_timeout(SOON) {
            Ok(message) => {
                assert_eq!(message[..], number.to_ne_bytes());
                return offences;
            }
            Err(GetError::PeerViolation { .. }) => offences += 1,
            Err(GetError::Disconnected { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}
