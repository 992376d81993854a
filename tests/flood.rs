//! Who connects again and again takes up no more of a broker than the quota allows, be it for a moment, and holds
//! up nobody.

mod support;

use fbuf_broker::{Broker, Listener, Policy, Quota};
use fbuf_client::Address;
use fbuf_core::socket::PacketSocket;
use support::Holdings;

/// How many connections a user may have, and how many wait.
const QUOTA: u64 = 3;
const MANY: usize = 16;

#[test]
fn who_connects_again_and_again_holds_nobody_up_and_takes_no_more_than_the_quota() {
    let address = Address::new(format!("@fbuf-test-flood-{}", std::process::id()));
    let listener = Listener::bind(&address).unwrap();
    let quota = Quota { connections: QUOTA, ..Quota::default() };
    let broker = Broker::new(Policy::only(nix::unistd::geteuid().as_raw()).with_quota(quota));
    let name = address.to_kernel().unwrap();
    let waiting: Vec<_> = (0..MANY).map(|_| PacketSocket::connect_at_once(&name).unwrap()).collect();
    let sent_away = || waiting.iter().filter(|socket| socket.hung_up()).count();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let before = Holdings::here().descriptors;
        let until = async {
            tokio::task::yield_now().await;
            assert!(sent_away() < MANY / 2, "nobody had a turn before all had been accepted");
            while sent_away() < MANY / 2 {
                // Besides those that the quota allows there is the socket that listens.
                let held = Holdings::here().descriptors - before;
                assert!(held <= QUOTA as usize + 1, "{held} descriptors are held");
                tokio::task::yield_now().await;
            }
        };
        broker.serve(&listener, until).await.unwrap();
    });
}
