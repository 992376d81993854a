//! A client that speaks to the broker in order, and to its peer as it likes.

use std::time::Duration;

use fbuf_client::Address;
use fbuf_core::{
    introduced::Introduction,
    socket::{Arrival, PacketSocket, link_message::LinkMessage, wire},
};
use fbuf_protocol::{ClientTransport, ControlClient, Greeting, Open, PreviousRegistration, Role, VERSION, Verdict};
use tarpc::context;

/// Longer than an answer takes.
const SOON: Duration = Duration::from_secs(60);

/// A connection to the broker.
pub fn greet(broker: &Address) -> PacketSocket {
    let socket = PacketSocket::connect(&broker.to_kernel().unwrap(), SOON).unwrap();
    socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes()).unwrap();
    while !matches!(socket.receive::<64>().unwrap(), Arrival::Message(..)) {
        std::thread::yield_now();
    }
    socket
}

/// A client that opens an endpoint, and reads what it likes.
pub struct Member {
    runtime: tokio::runtime::Runtime,
    control: ControlClient,
}

#[allow(dead_code, reason = "each test binary uses a part of it")]
impl Member {
    pub fn join(broker: &Address, channel: &str, role: Role) -> Self {
        Self::resume(broker, channel, role, None)
    }

    fn resume(broker: &Address, channel: &str, role: Role, earlier: Option<PreviousRegistration>) -> Self {
        let socket = greet(broker);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let channel = channel.to_owned();
        let control = runtime.block_on(async {
            let transport = ClientTransport::new(fbuf_protocol::runtime::watch(socket).unwrap());
            let control = ControlClient::new(tarpc::client::Config::default(), transport).spawn();
            let open = Open { channel, role, label: None, users: None, earlier };
            control.open(context::current(), 1, open).await.unwrap().unwrap();
            control
        });
        Self { runtime, control }
    }

    /// What the broker has for it.
    pub fn news(&self) -> Vec<Introduction> {
        self.runtime.block_on(async { self.control.news(context::current(), 0).await.unwrap().introductions })
    }
}

/// A client that does as it likes, introduced to the only other endpoint of the channel.
pub struct Hostile {
    _member: Member,
    pub link: PacketSocket,
}

#[allow(dead_code, reason = "each test binary uses a part of it")]
impl Hostile {
    pub fn join(broker: &Address, channel: &str, role: Role) -> Self {
        Self::resume(broker, channel, role, None)
    }

    /// The same, with what it claims to be known of it from before a restart.
    pub fn resume(broker: &Address, channel: &str, role: Role, earlier: Option<PreviousRegistration>) -> Self {
        let member = Member::resume(broker, channel, role, earlier);
        let mut introductions = member.news();
        assert_eq!(introductions.len(), 1);
        let link = PacketSocket::new(introductions.remove(0).socket.into_owned().unwrap()).unwrap();
        Self { _member: member, link }
    }

    pub fn say(&self, message: &LinkMessage) {
        self.link.send(&wire::encode(message).unwrap()).unwrap();
    }
}
