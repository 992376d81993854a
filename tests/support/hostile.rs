//! A client that speaks to the broker in order, and to its peer as it likes.

use std::time::Duration;

use fbuf_client::Address;
use fbuf_core::{
    control::{ClientTransport, ControlClient, Earlier, Greeting, Open, Role, VERSION, Verdict},
    link::LinkMessage,
    socket::{Arrival, PacketSocket},
    sys, wire,
};
use tarpc::context;

/// Longer than an answer takes.
const SOON: Duration = Duration::from_secs(60);

/// A client that does as it likes, introduced to the only other endpoint of the channel.
pub struct Hostile {
    _runtime: tokio::runtime::Runtime,
    _control: ControlClient,
    pub link: PacketSocket,
}

#[allow(dead_code, reason = "each test binary uses a part of it")]
impl Hostile {
    pub fn join(broker: &Address, channel: &str, role: Role) -> Self {
        Self::resume(broker, channel, role, None)
    }

    /// The same, with what it claims to be known of it from before a restart.
    pub fn resume(broker: &Address, channel: &str, role: Role, earlier: Option<Earlier>) -> Self {
        let socket = PacketSocket::connect(&broker.to_kernel().unwrap(), SOON).unwrap();
        socket.send_bytes(&Greeting { version: VERSION, verdict: Verdict::Welcome }.to_bytes()).unwrap();
        while !matches!(socket.receive::<64>().unwrap(), Arrival::Message(..)) {
            std::thread::yield_now();
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let channel = channel.to_owned();
        let (control, link) = runtime.block_on(async {
            let transport = ClientTransport::new(sys::watch(socket).unwrap());
            let control = ControlClient::new(tarpc::client::Config::default(), transport).spawn();
            let open = Open { channel, role, users: None, earlier };
            control.open(context::current(), 1, open).await.unwrap().unwrap();
            let mut introductions = control.news(context::current(), 0).await.unwrap().introductions;
            assert_eq!(introductions.len(), 1);
            let socket = introductions.remove(0).socket.into_owned().unwrap();
            (control, PacketSocket::new(socket).unwrap())
        });
        Self { _runtime: runtime, _control: control, link }
    }

    pub fn say(&self, message: &LinkMessage) {
        self.link.send(&wire::encode(message).unwrap()).unwrap();
    }
}
