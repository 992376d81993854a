//! Brokers that die one after the other while an attacker claims, at each new one, to be what others were.

use super::*;
use crate::{
    attacker::{RECEIVER, SENDER, over_and_over},
    caller::{Caller, Effect, look_for},
    claims::{CLAIMED, Claims},
};

/// How many brokers die.
const DEATHS: usize = 5;

/// Is the attacker, until it is killed: at each broker it claims all that it has learned at the ones before.
pub fn be() -> ! {
    let mut claims = Claims::default();
    over_and_over(|| {
        let caller = look_for("a broker", || Ok(Caller::try_to_join().ok().flatten()))?;
        claims.replay(&caller, [RECEIVER, SENDER])?;
        Effect::hang_up(&caller.socket)
    })
}

#[test]
fn an_attacker_is_nobody_else_at_the_next_broker() {
    roles!(play);
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let own = geteuid().as_raw();
    let other = if is_root() { OTHER } else { own };
    let (policy, socket) = (folder.path().join("policy.toml"), folder.path().join("broker"));
    fs::write(&policy, policy_for(own, other)).unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let start = || BrokerProcess::start_with(&socket, |command| _ = command.arg("--policy").arg(&policy)).forget_log();
    let mut broker = start();
    let client = Client::connect_to(&broker.address).unwrap();
    let mut honest = Honest::begin(&client);
    let numbers = [honest.sender.endpoint(), honest.receiver.endpoint()];
    let attacker = Attacker::start("reborn", other, &broker);
    honest.attacker = attacker.process.pid();
    let known = || {
        let all = client.status().unwrap_or_default();
        let own = all.into_iter().filter(|one| one.process.pid as u32 == std::process::id() && one.channel == "c");
        own.map(|one| one.endpoint).collect::<Vec<_>>()
    };
    for death in 1..=DEATHS {
        let (begin, mut claimed) = (Instant::now(), 0);
        // It has claimed what it can, and goes on.
        while claimed == 0 {
            honest.exchange();
            claimed += attacker.count("reborn", &[CLAIMED]);
            assert!(begin.elapsed() < SOON, "it claims nothing from broker {death}");
        }
        broker.process.kill();
        drop(broker);
        broker = start();
        until("both ends are known again", || {
            honest.exchange();
            let mut known = known();
            known.sort_unstable_by_key(|number| numbers.iter().position(|own| own == number));
            client.is_connected() && known == numbers
        });
        // Each message comes once, and from the one that sent it.
        (0..10).for_each(|_| honest.exchange());
    }
    attacker.kill();
}
