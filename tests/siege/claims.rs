//! What an attacker claims to have been before: numbers, secrets and links that are others', or nobody's.

use std::collections::BTreeSet;

use fbuf_core::{limits::MAX_LINKS, peer::LinkId, socket::wire};
use fbuf_protocol::{ControlRequest, Open, Opened, PreviousRegistration, Refusal, Report, Role, Secret};

use crate::{
    attacker::{RECEIVER, SENDER},
    caller::{Caller, Effect, Seen},
};

/// What it says when it has claimed all that it can from a broker.
pub const CLAIMED: &str = "it has claimed";

/// Of how many numbers of its own, and of others, it makes use.
const MOST: usize = 8;

/// Secrets that look like a number.
fn secret_like(number: u64) -> [Secret; 3] {
    let of = |first: [u8; 8], last: [u8; 8]| wire::decode(&[first, last].concat(), Vec::new()).expect("16 bytes");
    let (big, little) = (number.to_be_bytes(), number.to_le_bytes());
    [of(big, big), of(little, little), of([0; 8], big)]
}

fn resumed(role: Role, secret: Secret, links: Vec<LinkId>) -> Open {
    Open { channel: "c".into(), role, label: None, users: None, earlier: Some(PreviousRegistration { secret, links }) }
}

/// What it has learned of honest ends, by being linked with them.
#[derive(Debug, Default)]
pub struct Claims {
    numbers: BTreeSet<u64>,
    links: Vec<LinkId>,
    /// Secrets that it was given, and the numbers that follow from them.
    own: Vec<(Secret, u64)>,
}

impl Claims {
    /// At another broker: is what it was, is nobody else, and learns more.
    pub fn replay(&mut self, caller: &Caller, roles: [Role; 2]) -> Result<(), String> {
        for (endpoint, &(secret, number)) in (100..).zip(&self.own) {
            let opened = self.open(caller, endpoint, resumed(roles[0], secret, self.links.clone()))?;
            Effect::if_so(opened.endpoint == number, || format!("its own number was {number}: {opened:?}"))?;
        }
        let claimed = self.numbers.iter().flat_map(|&number| secret_like(number).map(|secret| (number, secret)));
        for (endpoint, (number, secret)) in (200..).zip(claimed) {
            for (kind, role) in (0..).zip(roles) {
                // One secret can be that of one end at a time.
                let open = resumed(role, secret, self.links.clone());
                match (kind, caller.open_as(1000 * kind + endpoint, open)?) {
                    (0, Ok(opened)) if opened.endpoint != number => {}
                    (1, Err(Refusal::Elsewhere)) => {}
                    other => return Err(format!("{number} was claimed: {other:?}")),
                }
            }
        }
        for (endpoint, role) in (1..).zip(roles) {
            let opened =
                self.open(caller, endpoint, Open { earlier: None, ..resumed(role, secret_like(0)[0], vec![]) })?;
            self.own.push((opened.secret, opened.endpoint));
            self.meet(caller)?;
        }
        // The newest of all that it knows.
        self.own.drain(..self.own.len().saturating_sub(MOST));
        while self.numbers.len() > MOST {
            self.numbers.pop_first();
        }
        println!("{CLAIMED}");
        Ok(())
    }

    /// Is linked with honest ends, and claims to be them, and what else can be claimed.
    pub fn go_on(&mut self) -> Seen {
        let caller = Caller::join()?;
        for (endpoint, role) in [(1, RECEIVER), (2, SENDER)] {
            self.open(&caller, endpoint, Open { earlier: None, ..resumed(role, secret_like(0)[0], vec![]) })?;
            self.meet(&caller)?;
        }
        let Some(&number) = self.numbers.last() else { return Err("it is linked with nobody".into()) };
        for (endpoint, secret) in (10..).zip(secret_like(number)) {
            let opened = self.open(&caller, endpoint, resumed(SENDER, secret, self.links.clone()))?;
            let is_own = opened.endpoint == secret.number() && !self.numbers.contains(&opened.endpoint);
            Effect::if_so(is_own, || format!("it has the number {} of another", opened.endpoint))?;
        }
        // Links that no other end has are of no use: it is introduced as any newcomer. Those that it has had keep it from
        // being introduced to the same ends, and to no others.
        self.open(&caller, 20, resumed(SENDER, secret_like(2)[0], vec![LinkId::default(); MOST]))?;
        self.meet(&caller)?;
        let many = resumed(SENDER, secret_like(1)[0], vec![LinkId::default(); MAX_LINKS + 1]);
        let refused = caller.open_as(30, many)?;
        Effect::if_so(matches!(refused, Err(Refusal::ChannelFull)), || format!("{refused:?}"))?;
        self.claim_twice(&caller)
    }

    /// One secret, which is its own, over two connections: the second has it when the first has closed.
    fn claim_twice(&self, caller: &Caller) -> Seen {
        let first = self.open(caller, 40, Open { earlier: None, ..resumed(RECEIVER, secret_like(0)[0], vec![]) })?;
        let other = Caller::join()?;
        let again = || other.open_as(40, resumed(RECEIVER, first.secret, self.links.clone()));
        let refused = again()?;
        Effect::if_so(matches!(refused, Err(Refusal::Elsewhere)), || format!("one number twice: {refused:?}"))?;
        caller.ask(ControlRequest::Close { endpoint: 40, last: Report::default() })?;
        let opened = again()?.map_err(|refusal| refusal.to_string())?;
        Effect::if_so(opened.endpoint == first.endpoint, || format!("{opened:?}, which was {first:?}"))
    }

    fn open(&self, caller: &Caller, endpoint: u64, open: Open) -> Result<Opened, String> {
        caller.open_as(endpoint, open)?.map_err(|refusal| refusal.to_string())
    }

    /// Fetches introductions to honest ends, of which there is one at least.
    fn meet(&mut self, caller: &Caller) -> Result<(), String> {
        for introduction in caller.meet()? {
            self.numbers.insert(introduction.peer.endpoint);
            self.links.push(introduction.peer.link);
        }
        self.links.truncate(MAX_LINKS);
        Ok(())
    }
}
