//! Who connects again and again takes up no more of the broker than the quota allows, be it for a moment.

mod support;

use fbuf_broker::{Broker, Listener, Policy, Quota};
use fbuf_client::Address;
use fbuf_core::socket::PacketSocket;
use support::descriptors;

#[test]
fn connections_are_counted_as_soon_as_they_are_accepted() {
    let address = Address::new(format!("@fbuf-test-flood-{}", std::process::id()));
    let listener = Listener::bind(&address).unwrap();
    let quota = Quota { connections: 3, ..Quota::default() };
    let broker = Broker::new(Policy::only(nix::unistd::geteuid().as_raw()).with_quota(quota));
    let name = address.to_kernel().unwrap();
    let waiting: Vec<_> = (0..300).map(|_| PacketSocket::connect_at_once(&name).unwrap()).collect();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let before = descriptors();
        let until = async {
            // Until connections were accepted, of which few can have been attended to.
            tokio::task::yield_now().await;
            let held = descriptors() - before;
            // The socket that listens is one of them.
            assert!(held <= 4, "{held} descriptors are held for a user who may have 3 connections");
        };
        broker.serve(&listener, until).await.unwrap();
    });
    assert!(waiting.iter().filter(|socket| socket.hung_up()).count() > 100, "hardly anybody was sent away");
}
