//! Who connects again and again takes up no more of a broker than the quota allows, be it for a moment, and holds
//! up nobody.

mod support;

use fbuf_broker::{Broker, Listener, Policy, Quota};
use fbuf_client::{Address, Resource};
use fbuf_core::socket::PacketSocket;
use support::Holdings;

/// How many connections a user may have, and how many are sent away here.
const QUOTA: u64 = 3;
const MANY: usize = 100;

#[test]
fn who_connects_again_and_again_holds_nobody_up_and_takes_no_more_than_the_quota() {
    let address = Address::new(format!("@fbuf-test-flood-{}", std::process::id()));
    let listener = Listener::bind(&address).unwrap();
    let quota = Quota::default().with(Resource::Connections, QUOTA);
    let broker = Broker::new(Policy::only(nix::unistd::geteuid().as_raw()).with_quota(quota));
    let name = address.to_kernel().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let before = Holdings::here().descriptors;
        let mut connections: Vec<PacketSocket> = Vec::new();
        let until = async {
            let (mut sent_away, mut most) = (0, 0);
            while sent_away < MANY {
                // There is a queue at any time.
                while let Ok(connection) = PacketSocket::connect_at_once(&name) {
                    connections.push(connection);
                }
                // Besides those that the quota allows there is the socket that listens.
                let held = Holdings::here().descriptors - before - connections.len();
                assert!(held <= QUOTA as usize + 1, "{held} descriptors are held");
                tokio::task::yield_now().await;
                let count = connections.iter().filter(|connection| connection.hung_up()).count();
                most = most.max(count);
                connections.retain(|connection| !connection.hung_up());
                sent_away += count;
            }
            // One between two turns; or two, as the two happen to come one before the other or behind.
            assert!(most <= 2, "nobody had a turn before {most} had been accepted");
        };
        broker.serve(&listener, until).await.unwrap();
    });
}
