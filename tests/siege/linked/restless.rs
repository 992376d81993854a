//! What an attacker does that is disconnected, or not wanted, and comes again and again.

use std::time::{Duration, Instant};

use fbuf_protocol::{Mismatch, Open};

use super::*;
use crate::attack::REQUESTS_PER_SECOND;

/// How often it opens an end, reads which ends that is linked with, and closes it again. Each is a request, and so is the link.
const CYCLES: u32 = 500;
const REQUESTS: u32 = 4;

/// Takes messages and hands none back, until it is disconnected, and is told so. The sender goes on at once with the
/// slots that it had.
pub fn come_back() -> Seen {
    let mut receiving = Receiving::begin("patient", None)?;
    let _first = receiving.wait()?;
    Effect::hang_up(&receiving.link.socket)?;
    Effect::if_so(receiving.lane.is_disconnected(), || "the sender has gone, and did not disconnect it".into())
}

/// Opens and closes ends, in each role by turns, as fast as it can: no faster than a user may make requests, of which each
/// link is one.
pub fn relink() -> Seen {
    let caller = Caller::join()?;
    let (start, mut links) = (Instant::now(), 0);
    for cycle in 0..CYCLES {
        let role = if cycle.is_multiple_of(2) { RECEIVER } else { SENDER };
        match caller.open(cycle.into(), "c", role)? {
            Some(Ok(())) => {}
            other => return Err(format!("to open: {other:?}")),
        }
        links += caller.news()?.introductions.len() as u32;
        caller.ask(ControlRequest::Close { endpoint: cycle.into(), last: Report::default() })?;
    }
    // The first second's worth is answered at once.
    let requests = CYCLES * (REQUESTS - 1) + links;
    let least = Duration::from_secs(1) * (requests - REQUESTS_PER_SECOND) / REQUESTS_PER_SECOND;
    let time = start.elapsed();
    Effect::if_so(links >= CYCLES && time >= least * 9 / 10, || format!("{CYCLES} ends, {links} links in {time:?}"))
}

/// Opens ends where honest ones have named other users as their peers, and ends that name none but itself where honest
/// ones have named nobody: it is linked with nobody, and told why.
pub fn intrude(turn: usize) -> Seen {
    let caller = Caller::join()?;
    let own = nix::unistd::geteuid().as_raw();
    let (role, other) = if turn.is_multiple_of(2) { (RECEIVER, SENDER) } else { (SENDER, RECEIVER) };
    let among = |channel: &str, role, users: Option<Vec<u32>>| Open {
        channel: channel.into(),
        role,
        label: None,
        users,
        earlier: None,
    };
    let opens = [
        ("private", role, None),
        ("private", other, None),
        ("c", role, Some(vec![own])),
        ("newcomers", other, Some(vec![own, u32::MAX])),
    ];
    for (endpoint, (channel, role, users)) in (0..).zip(opens) {
        caller.open_as(endpoint, among(channel, role, users))?.map_err(|refusal| refusal.to_string())?;
    }
    // Its own two ends on the first channel are linked with each other.
    let news = caller.news()?;
    let own_only = news.introductions.iter().all(|one| one.peer.process.pid as u32 == std::process::id());
    Effect::if_so(own_only, || format!("it is linked with {:?}", news.introductions))?;
    for endpoint in 0..3 {
        let why: Vec<_> = caller.unpaired(endpoint)?.into_iter().map(|one| one.why).collect();
        let told = matches!(why[..], [Mismatch::FromUsers { .. } | Mismatch::ToUsers { .. }, ..]);
        Effect::if_so(told, || format!("endpoint {endpoint} is apart for {why:?}"))?;
    }
    // Many that are closed with the connection.
    for endpoint in 10..60 {
        caller.open_as(endpoint, among("private", role, None))?.map_err(|refusal| refusal.to_string())?;
    }
    caller.is_answered()
}
