//! Processes that mean harm, each with one kind of attack which it goes on with until it is killed, against a
//! broker and against peers. Each sees what comes of its attack, and says so. Meanwhile honest ones stream, newcomers
//! attach, and what is to be noticed of the attack is reported; and when the attacker is gone, nothing is left of it.

mod attack;
mod attacker;
mod caller;
mod claims;
#[path = "../support/lingering.rs"]
mod lingering;
mod linked;
mod reborn;
#[path = "../support/mod.rs"]
mod support;
mod together;

use std::{
    fmt::{Debug, Display},
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    process::Stdio,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use attack::{Attack, BOARD_SLOTS, MOST_SLOTS, REQUESTS_PER_SECOND, Report, quota};
use fbuf_client::{
    AllocateError, Client, Departure, DisconnectReason, GetError, Mechanism, Peer, Receiver, Sender, Wait,
};
use fbuf_protocol::Resource;
use nix::unistd::geteuid;
use support::{
    BrokerProcess, Holdings, Process, SOON, alone, is_root,
    role::{as_user, command, roles},
    settled, until, until_is,
};

/// Another user, as which attackers run if this one is root.
const OTHER: u32 = 65_533;
/// How many messages honest ones exchange at a time.
const MESSAGES: u64 = 100;
/// The slots of the honest sender.
const HONEST_SLOTS: usize = 16;
/// How often somebody attaches during an attack, at least.
const NEWCOMERS: usize = 5;
/// How long the sender waits that waits for all receivers.
const PATIENCE: Duration = Duration::from_millis(20);

/// What a child does.
fn play(role: &str) {
    match (role, role.parse::<usize>()) {
        (_, Ok(number)) => attacker::attack(Attack::ALL[number]),
        ("reborn", _) => reborn::be(),
        (role, _) => together::be(role),
    }
}

#[test]
fn no_attack_keeps_honest_ones_from_anything() {
    roles!(play);
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let own = geteuid().as_raw();
    // Without root the attacks are those of this user, which says less.
    let other = if is_root() { OTHER } else { own };
    let policy = folder.path().join("policy.toml");
    fs::write(&policy, policy_for(own, other)).unwrap();
    // The other user has to get to the socket.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (broker, metrics) = BrokerProcess::start_with_metrics(&folder.path().join("broker"), |command| {
        command.arg("--policy").arg(&policy);
    });
    let broker = broker.forget_log();
    let client = Client::connect_to(&broker.address).unwrap();
    let mut honest = Honest::begin(&client);
    let holdings = || [std::process::id(), broker.process.pid()].map(Holdings::of);
    honest.exchange();
    let (before, used) = (settled(holdings), metrics.used_by(other));
    assert!(other == own || used.is_empty(), "{used:?}");
    for (number, attack) in Attack::ALL.into_iter().enumerate() {
        if attack.needs_user_of_its_own() && other == own {
            println!("{attack:?}: not tried, since only root can be another user");
            continue;
        }
        let start = Instant::now();
        let effects = honest.besieged_by(attack, Attacker::start(number, other, &broker), &client, &broker);
        until_is(&format!("after {attack:?}"), &before, || {
            honest.look();
            holdings()
        });
        until_is(&format!("user {other} after {attack:?}"), &used, || metrics.used_by(other));
        println!("{attack:?}: held off {effects} times in {:.1?} by {}", start.elapsed(), attack.limit());
    }
}

/// The attackers get as little as they need.
fn policy_for(own: u32, other: u32) -> String {
    let all = "send = [\"*\"]\nreceive = [\"*\"]\n";
    let rule = format!("[[rule]]\nusers = [{own}]\n{all}");
    if own == other {
        return rule;
    }
    let quotas = Resource::ALL.iter().map(|&resource| match resource {
        Resource::Bytes => format!("bytes = \"{}B\"", quota(resource)),
        _ => format!("{} = {}", resource.name(), quota(resource)),
    });
    let quotas = quotas.collect::<Vec<_>>().join(", ");
    let quota = format!("quota = {{ {quotas}, requests_per_second = {REQUESTS_PER_SECOND} }}");
    format!("{rule}[[rule]]\nname = \"others\"\nusers = [{other}]\n{all}{quota}")
}

/// An attacker, and what it says.
struct Attacker {
    process: Process,
    said: mpsc::Receiver<String>,
}

impl Attacker {
    fn start(role: impl Display, user: u32, broker: &BrokerProcess) -> Self {
        let mut command = command(role);
        command.env("FBUF_BROKER", broker.address.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(as_user(&mut command, user));
        let lines = BufReader::new(process.0.stdout.take().unwrap()).lines();
        let (say, said) = mpsc::channel();
        thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| say.send(line)));
        Self { process, said }
    }

    /// How many effects it has had since the last time.
    fn effects(&self, attack: impl Debug) -> usize {
        self.count(attack, &[attacker::BEGUN, attacker::AGAIN])
    }

    /// How often it has said one of these since the last time.
    fn count(&self, attack: impl Debug, words: &[&str]) -> usize {
        let is_one = |line: &String| {
            if let Some((_, why)) = line.split_once(attacker::FAILED) {
                panic!("{attack:?}: {why}");
            }
            words.iter().any(|word| line.contains(word))
        };
        self.said.try_iter().filter(is_one).count()
    }

    /// Kills it, and waits until all is read that it has said.
    fn kill(mut self) {
        self.process.kill();
        while self.said.recv().is_ok() {}
    }
}

/// Processes that exchange messages as ever.
struct Honest {
    sender: Sender,
    receiver: Receiver,
    /// These want nobody else.
    private: (Sender, Receiver),
    next: u64,
    /// The process of the attack that is going on; what is still reported of an earlier one says nothing of it.
    attacker: u32,
    reports: Vec<Report>,
}

impl Honest {
    fn begin(client: &Client) -> Self {
        let mut sender = client.sender("c").slot_size(64).slots(HONEST_SLOTS).open().unwrap();
        // Nothing is ever left out for it, but it may be.
        let receiver = client.receiver("c").max_backlog(1 + HONEST_SLOTS).keep_waiting().open().unwrap();
        sender.wait_for_receivers_timeout(1, SOON).unwrap();
        let own = geteuid().as_raw();
        let apart = client.sender("private").slot_size(8).slots(2).to_users([own]).open().unwrap();
        let mut private = (apart, client.receiver("private").from_users([own]).keep_waiting().open().unwrap());
        private.0.wait_for_receivers_timeout(1, SOON).unwrap();
        Self { sender, receiver, private, next: 0, attacker: 0, reports: Vec::new() }
    }

    /// Goes on with everything until an attack has had as many effects as it is to have: how many those were.
    fn besieged_by(
        &mut self,
        attack: Attack,
        mut attacker: Attacker,
        client: &Client,
        broker: &BrokerProcess,
    ) -> usize {
        self.reports.clear();
        self.attacker = attacker.process.pid();
        let patient = client.sender("patient").slot_size(64).wait(Wait::Block);
        let patient = match attack {
            // What it sends has to find room in the socket.
            Attack::FillsLink => patient.mechanism(Mechanism::OneShot).slots(8),
            Attack::LyingBoardSize => patient.slots(64).grow_to(BOARD_SLOTS),
            _ => patient.slots(2).grow_to(MOST_SLOTS),
        };
        let mut patient = patient.open().unwrap();
        let (start, mut effects, mut newcomers) = (Instant::now(), 0, 0);
        let is_reported = |report: &Report| attack.reported_as().is_none_or(|is_it| is_it(report));
        while effects <= attack.repeats()
            || newcomers < NEWCOMERS
            || attack.reported_as().is_some() && !self.reports.iter().any(is_reported)
        {
            self.exchange();
            self.press(&mut patient);
            if attack == Attack::ComesBack {
                self.part(&mut patient);
            }
            attach(broker);
            newcomers += usize::from(effects > 0);
            effects += attacker.effects(attack);
            assert!(
                !attacker.process.has_ended(),
                "{attack:?}: the attacker failed: {:?}",
                attacker.said.iter().last()
            );
            let (wanted, reports) = (1 + attack.repeats(), &self.reports);
            assert!(start.elapsed() < SOON, "{attack:?}: {effects} effects of {wanted}, reported was {reports:?}");
        }
        attacker.kill();
        for report in &self.reports {
            let is_other =
                matches!(report, Report::Violation(_)) && !attack.reported_as().is_some_and(|is_it| is_it(report));
            assert!(!is_other, "{attack:?}: {report:?}");
        }
        effects
    }

    /// Honest messages arrive, all, in order, whatever others do on the same channel.
    fn exchange(&mut self) {
        for _ in 0..MESSAGES {
            let mut fbuf = self.sender.allocate_timeout(SOON).unwrap();
            fbuf.set_len(8).unwrap();
            fbuf.copy_from_slice(&self.next.to_ne_bytes());
            self.sender.write(fbuf).unwrap();
            loop {
                match self.receiver.get_timeout(SOON) {
                    Ok(received) if received.sender().process.pid as u32 == std::process::id() => {
                        assert_eq!(received[..], self.next.to_ne_bytes());
                        break;
                    }
                    // What an attacker sends within the rules.
                    Ok(_) => {}
                    Err(error) => self.note(error),
                }
            }
            self.next += 1;
        }
        let (sender, receiver) = &mut self.private;
        let fbuf = sender.allocate_timeout(SOON).unwrap();
        sender.write(fbuf).unwrap();
        drop(receiver.get_timeout(SOON).unwrap());
        assert!(sender.peers().count() == 1 && receiver.peers().count() == 1, "another user is linked");
        self.note_departures();
    }

    /// Parts with all receivers, and has all slots at once.
    fn part(&mut self, patient: &mut Sender) {
        for peer in patient.peers().collect::<Vec<_>>() {
            patient.disconnect(peer);
        }
        assert_eq!(patient.counters().slots.lent, 0, "a receiver that was disconnected has slots");
    }

    /// A sender that waits for all its receivers, but not for ever.
    fn press(&mut self, patient: &mut Sender) {
        patient.poll_events();
        for _ in 0..if patient.receivers() == 0 { 0 } else { MESSAGES } {
            match patient.allocate_timeout(PATIENCE) {
                // If the receiver has gone meanwhile, the fbuf comes back.
                Ok(fbuf) => drop(patient.write(fbuf)),
                Err(AllocateError::TimedOut { slots }) => {
                    assert_eq!(patient.counters().slots.lent, slots);
                    self.reports.push(Report::HoldsAll(slots));
                    break;
                }
                Err(error) => panic!("{error}"),
            }
        }
        while let Some(departure) = patient.next_departure() {
            self.note_departure(departure);
        }
    }

    fn look(&mut self) {
        self.sender.poll_events();
        self.note_departures();
        while let Err(error) = self.receiver.try_get() {
            self.note(error);
        }
    }

    fn note(&mut self, error: GetError) {
        let is_own = |peer: &Peer| peer.process.pid as u32 == std::process::id();
        match error {
            GetError::PeerViolation { peer, violation } if !is_own(&peer) => {
                self.report(peer, Report::Violation(*violation));
            }
            GetError::Disconnected { peer } if !is_own(&peer) => self.report(peer, Report::Died),
            error => panic!("{error}"),
        }
    }

    fn note_departures(&mut self) {
        while let Some(departure) = self.sender.next_departure() {
            self.note_departure(departure);
        }
    }

    fn note_departure(&mut self, Departure { peer, reason, .. }: Departure) {
        let report = match reason {
            DisconnectReason::Violation { violation } => Report::Violation(violation),
            DisconnectReason::Died => Report::Died,
            DisconnectReason::Disconnected | DisconnectReason::Left => return,
            other => panic!("{other:?}"),
        };
        self.report(peer, report);
    }

    fn report(&mut self, peer: Peer, report: Report) {
        if peer.process.pid as u32 == self.attacker {
            self.reports.push(report);
        }
    }
}

/// A newcomer is linked, and exchanges a message.
fn attach(broker: &BrokerProcess) {
    let client = Client::connect_to(&broker.address).unwrap();
    let mut sender = client.sender("newcomers").slot_size(8).slots(2).open().unwrap();
    let mut receiver = client.receiver("newcomers").open().unwrap();
    sender.wait_for_receivers_timeout(1, SOON).unwrap();
    let fbuf = sender.allocate_timeout(SOON).unwrap();
    sender.write(fbuf).unwrap();
    receiver.get_timeout(SOON).unwrap();
}
