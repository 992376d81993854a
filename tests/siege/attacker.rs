//! What an attacker does to a broker, and that it sees what comes of it.

use std::{
    cell::Cell,
    collections::VecDeque,
    fs::File,
    io::{self, Write, stdout},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use fbuf_core::{
    limits::{
        GREETING_TIME, MAX_ANSWERS, MAX_ENDS_OF_USER, MAX_LEASED, MAX_MESSAGE, MAX_REQUESTS, MAX_WAITING, OTHERS_SLOTS,
    },
    memory::Map,
    protection::{Mechanism, Protection},
    socket::{PacketSocket, wire::Letter},
};
use fbuf_protocol::{
    Accepted, ControlRequest, ControlResponse, Greeting, Limits, MAX_INTRODUCTIONS, MAX_PAGE, Mismatch, Refusal,
    Report, Resource, Role, Slots, VERSION, Verdict, Wire,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt},
};

use crate::{
    attack::{Attack, REQUESTS_PER_SECOND, quota},
    caller::{Caller, Effect, Seen, connect, open, receive, wait_for},
    claims::Claims,
    linked,
    support::{Random, SOON},
};

/// What it says of each effect, the first time once it is at it, and when there was none.
pub const BEGUN: &str = "the attack has begun";
pub const AGAIN: &str = "the attack goes on";
pub const FAILED: &str = "the attack failed: ";

pub const RECEIVER: Role = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };
pub const SENDER: Role = Role::sender(64, 4, Mechanism::Copy, Slots::Segments);

/// How many descriptors the kernel takes with a message (SCM_MAX_FD).
const MOST_DESCRIPTORS: usize = 253;
/// How many receivers it opens on one channel: fewer than its share.
const PEERS: usize = MAX_ENDS_OF_USER - 1;
/// How long a broker that reads on takes at most to make room in a full socket.
const ROOM: Duration = Duration::from_secs(1);

/// How often it has tried, and that it has tried once more.
static ATTEMPTS: Mutex<u64> = Mutex::new(0);
static GONE_ON: Condvar = Condvar::new();

/// Is the attacker, until it is killed.
pub fn attack(attack: Attack) -> ! {
    let mut random = Random(7);
    let turns = Cell::new(0);
    let turn = || turns.replace(turns.get() + 1);
    match attack {
        Attack::Garbage => over_and_over(|| garbage(&mut random, turn())),
        Attack::HalfMessages => over_and_over(|| {
            let caller = Caller::join()?;
            caller.is_answered()?;
            let whole = caller.request(open(1, "c", RECEIVER));
            caller.send(&whole[..random.below(whole.len() as u64) as usize])?;
            Effect::hang_up(&caller.socket)
        }),
        Attack::HugeMessages => over_and_over(|| huge(random.below(100_000) as usize)),
        Attack::Descriptors => over_and_over(|| {
            let caller = Caller::join()?;
            caller.is_answered()?;
            send_many(&caller.socket, caller.trifle())
        }),
        Attack::WrongDescriptors => over_and_over(|| {
            let caller = Caller::join()?;
            let mut kinds = wrong_descriptors();
            let one = kinds.swap_remove(turn() % kinds.len()).into();
            Effect::not_taken(&caller.socket, &Letter { bytes: caller.trifle(), descriptors: vec![one] })
        }),
        Attack::OtherVersions => over_and_over(|| {
            let socket = connect()?;
            let version = VERSION.wrapping_add(1 + random.below(60_000) as u16);
            let greeting = Greeting { version, verdict: Verdict::Welcome };
            socket.send_bytes(&greeting.to_bytes()).map_err(|error| error.to_string())?;
            let (answer, _) = receive(&socket)?.ok_or("no answer")?;
            Effect::sent_away(&answer, Verdict::OtherVersion)?;
            Effect::hang_up(&socket)
        }),
        Attack::Silence => {
            let mut silent = VecDeque::new();
            over_and_over(|| {
                while silent.len() < 16 {
                    silent.push_back((Instant::now(), connect()?));
                }
                let (since, socket) = silent.pop_front().ok_or("no connection")?;
                Effect::hang_up(&socket)?;
                let time = since.elapsed();
                Effect::if_so(time >= GREETING_TIME, || format!("sent away after {time:?}"))
            })
        }
        Attack::NeverReads => over_and_over(never_read),
        Attack::AsksAtOnce => over_and_over(ask_at_once),
        Attack::NeverFetches => over_and_over(never_fetch),
        Attack::LeavesSlots => over_and_over(leave_slots),
        Attack::Connections => {
            let mut silent = Vec::new();
            over_and_over(|| connect_more(&mut silent))
        }
        Attack::Churn => over_and_over(churn),
        Attack::Hoards(Resource::Links) => over_and_over(hoard_links),
        Attack::Hoards(resource) => over_and_over(|| hoard(resource)),
        Attack::Crowds => over_and_over(crowd),
        Attack::Demands => over_and_over(demand),
        Attack::GarbageOverLink => over_and_over(|| linked::garbage(&mut random, turn())),
        Attack::DescriptorsOverLink => over_and_over(|| linked::descriptors(turn())),
        Attack::WrongDescriptorsOverLink => over_and_over(|| linked::wrong_descriptors(turn())),
        Attack::Lingers => over_and_over(|| linked::linger(turn())),
        Attack::BellsToSender | Attack::BellsToReceiver => match linked::Ringing::begin(attack) {
            Ok(mut ringing) => over_and_over(|| ringing.go_on()),
            Err(error) => fail(&error),
        },
        Attack::FillsLink => over_and_over(linked::fill),
        Attack::NeverAcknowledges => over_and_over(linked::never_acknowledge),
        Attack::LyingLane => over_and_over(|| linked::lie_in_lane(&mut random, turn())),
        Attack::EndlessGaps => over_and_over(|| linked::gaps_without_end(turn())),
        Attack::LyingBoard => over_and_over(|| linked::lie_on_board(&mut random)),
        Attack::Closes => over_and_over(|| linked::close(turn())),
        Attack::AnnouncesGrowth => over_and_over(|| linked::growing::announce(turn())),
        Attack::LyingBoardSize => over_and_over(|| linked::growing::lie_about_board(turn())),
        Attack::ComesBack => over_and_over(linked::restless::come_back),
        Attack::Relinks => over_and_over(linked::restless::relink),
        Attack::Intrudes => over_and_over(|| linked::restless::intrude(turn())),
        Attack::Claims => {
            let mut claims = Claims::default();
            over_and_over(|| claims.go_on())
        }
    }
}

/// Tries again and again, and says each time what came of it.
pub fn over_and_over(mut attempt: impl FnMut() -> Seen) -> ! {
    thread::spawn(|| {
        let mut known = 0;
        loop {
            let attempts = ATTEMPTS.lock().unwrap();
            let (attempts, waited) = GONE_ON.wait_timeout_while(attempts, SOON, |now| *now == known).unwrap();
            if waited.timed_out() {
                fail("it is held up, and nobody ends that");
            }
            known = *attempts;
        }
    });
    let mut word = BEGUN;
    loop {
        let seen = attempt();
        *ATTEMPTS.lock().unwrap() += 1;
        GONE_ON.notify_one();
        match seen {
            Ok(_seen) => println!("{word}"),
            Err(error) => fail(&error),
        }
        word = AGAIN;
    }
}

fn fail(error: &str) -> ! {
    println!("{FAILED}{error}");
    // Nobody may listen any more.
    let _ = stdout().flush();
    std::process::exit(1)
}

/// Bytes with which no message begins.
pub fn random_bytes(random: &mut Random) -> Vec<u8> {
    let count = random.below(300) as usize;
    let mut bytes = vec![0xff];
    bytes.extend(random.bytes(count));
    bytes
}

fn garbage(random: &mut Random, turn: usize) -> Seen {
    if turn.is_multiple_of(2) {
        let socket = connect()?;
        socket.send_bytes(&random_bytes(random)).map_err(|error| error.to_string())?;
        return Effect::hang_up(&socket);
    }
    let caller = Caller::join()?;
    caller.is_answered()?;
    caller.send(&random_bytes(random))?;
    Effect::hang_up(&caller.socket)
}

/// The longest message that may be is answered; one that is longer by a byte, and more, is not.
fn huge(more: usize) -> Seen {
    let caller = Caller::join()?;
    let with_name = |length: usize| caller.request(open(1, &"c".repeat(length), RECEIVER));
    let longest = MAX_MESSAGE - 100 + MAX_MESSAGE - with_name(MAX_MESSAGE - 100).len();
    let message = with_name(longest);
    let answer = caller.exchange(&message)?;
    let refused = matches!(answer, Some(ControlResponse::Open(Err(Wire(Refusal::Channel(_))))));
    Effect::if_so(refused && message.len() == MAX_MESSAGE, || format!("{} bytes: {answer:?}", message.len()))?;
    caller.send(&with_name(longest + 1))?;
    Effect::hang_up(&caller.socket)?;
    let caller = Caller::join()?;
    caller.send(&vec![0; MAX_MESSAGE + 1 + more])?;
    Effect::hang_up(&caller.socket)
}

/// Sends as many descriptors as the kernel takes: the other side hangs up, and keeps none.
pub fn send_many(socket: &PacketSocket, bytes: Vec<u8>) -> Seen {
    let (reader, writer) = nix::unistd::pipe().map_err(|error| error.to_string())?;
    let writer = Arc::new(writer);
    let descriptors = vec![writer.into(); MOST_DESCRIPTORS];
    Effect::not_taken(socket, &Letter { bytes, descriptors })?;
    Effect::closed_everywhere(&reader)
}

/// One of each kind.
pub fn wrong_descriptors() -> Vec<OwnedFd> {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let (one, other) = PacketSocket::pair().unwrap();
    let event = nix::sys::eventfd::EventFd::new().unwrap();
    let event = event.as_fd().try_clone_to_owned().unwrap();
    let memory = memfd::MemfdOptions::new();
    let unsealable = memory.create("fbuf-test").unwrap().into_file();
    let unsealed = memory.allow_sealing(true).create("fbuf-test").unwrap().into_file();
    unsealed.set_len(4096).unwrap();
    let (_map, other_size) = Map::create("fbuf-test", 1 << 20).unwrap();
    let files = ["/", "/dev/zero", "/proc/self/exe"].map(|path| OwnedFd::from(File::open(path).unwrap()));
    let mut kinds = vec![reader, writer, one, other, event, unsealable.into(), unsealed.into(), other_size];
    kinds.extend(files);
    kinds
}

/// Asks until there is no room, which there would be soon if the broker read on.
fn never_read() -> Seen {
    let caller = Caller::join()?;
    // No packet takes up less than this in a socket, and there are two ways.
    let buffered = 2 * getsockopt(&caller.socket, sockopt::SndBuf).map_err(|error| error.to_string())? / 256;
    let most = buffered + MAX_ANSWERS + MAX_REQUESTS;
    let mut asked = 0;
    loop {
        match caller.socket.send_bytes(&caller.trifle()) {
            Ok(()) => asked += 1,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !wait_for(&caller.socket, PollFlags::POLLOUT, ROOM)? {
                    break;
                }
            }
            Err(error) => return Err(error.to_string()),
        }
        Effect::if_so(asked <= most, || format!("{asked} requests were read, and no answer"))?;
    }
    Effect::if_so(!caller.socket.hung_up(), || "the broker has hung up".into())
}

/// As many questions as may be open are; with one more, nothing else is answered.
fn ask_at_once() -> Seen {
    let caller = Caller::join()?;
    let news = || caller.send(&caller.request(ControlRequest::News { receipt: 0 }));
    for _ in 1..MAX_REQUESTS {
        news()?;
    }
    caller.is_answered()?;
    news()?;
    caller.send(&caller.trifle())?;
    let answer = caller.answer()?;
    Effect::if_so(matches!(answer, Some((_, Err(_)))), || format!("one more was answered with {answer:?}"))
}

/// Each receiver is introduced twice, since its sender is here as well. Those for which there is no room are apart, and
/// what is there for it does not grow.
fn never_fetch() -> Seen {
    let caller = Caller::join()?;
    let opened = caller.open(10_000, "unfetched", SENDER)?;
    Effect::if_so(opened == Some(Ok(())), || "no sender".into())?;
    for endpoint in 0..PEERS as u64 {
        let opened = caller.open(endpoint, "unfetched", RECEIVER)?;
        Effect::if_so(opened == Some(Ok(())), || format!("after {endpoint}: {opened:?}"))?;
    }
    let own = nix::unistd::geteuid().as_raw();
    let apart = caller.unpaired(10_000)?;
    let (most, unread) = (MAX_WAITING / 2, apart.iter().all(|one| one.why == Mismatch::Unread { user: own }));
    // As many as one answer names; which of them are apart may be as it likes.
    let linked = PEERS - apart.len();
    Effect::if_so(unread && linked <= most.max(PEERS - MAX_PAGE), || format!("{linked} are linked, {apart:?}"))
}

/// Opens and closes, one behind the other, as many as the quota has room for at once, and one more.
fn leave_slots() -> Seen {
    let caller = Caller::join()?;
    let role = Role::sender(4096, MAX_LEASED.into(), Mechanism::Lease, Slots::Broker { huge: false });
    let most = quota(Resource::Descriptors) / u64::from(MAX_LEASED);
    for endpoint in 0..=most {
        match caller.open(endpoint, "unread", role)? {
            Some(Ok(())) => drop(caller.ask(ControlRequest::Close { endpoint, last: Report::default() })?),
            Some(Err(refusal)) => return Effect::spent(&refusal, Resource::Descriptors),
            None => return Err(format!("the broker hangs up after {endpoint}")),
        }
    }
    Err(format!("{most} senders had slots made, and one more"))
}

/// Connects once more than it may, and says nothing: one of all connections is sent away, and if that was not for its
/// silence, because there are so many.
fn connect_more(silent: &mut Vec<PacketSocket>) -> Seen {
    let most = quota(Resource::Connections) as usize;
    for _ in 0..=2 * most {
        while silent.len() <= most {
            silent.push(connect()?);
        }
        let mut polled: Vec<_> = silent.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(SOON).map_err(|error| error.to_string())?;
        poll(&mut polled, timeout).map_err(|error| error.to_string())?;
        let answered = polled.iter().position(|one| one.any() == Some(true));
        let socket = silent.swap_remove(answered.ok_or("as many connections as one likes")?);
        if let Some((packet, _)) = receive(&socket)? {
            return Effect::sent_away(&packet, Verdict::QuotaExceeded);
        }
    }
    Err("all connections were sent away for their silence, and none for being one too many".into())
}

/// The first second's worth is answered at once, the rest as fast as it may be asked.
fn churn() -> Seen {
    let caller = Caller::join()?;
    let (start, count) = (Instant::now(), REQUESTS_PER_SECOND as usize * 3 / 2);
    let (mut asked, mut answered) = (0, 0);
    while answered < count {
        let body = match asked % 2 {
            0 => open(1, "churn", RECEIVER),
            _ => ControlRequest::Close { endpoint: 1, last: Report::default() },
        };
        if asked < count && caller.socket.send_bytes(&caller.request(body)).is_ok() {
            asked += 1;
            continue;
        }
        loop {
            // That too many are under way is an answer as well.
            let _either = caller.answer()?.ok_or("the broker hangs up")?;
            answered += 1;
            if answered == asked || !wait_for(&caller.socket, PollFlags::POLLIN, Duration::ZERO)? {
                break;
            }
        }
    }
    let (time, least) = (start.elapsed(), Duration::from_millis(500));
    Effect::if_so(time >= least, || format!("{count} requests were answered in {time:?}"))
}

/// Opens endpoints until one is refused.
fn hoard(resource: Resource) -> Seen {
    let caller = Caller::join()?;
    let sender = |slot_bytes, max_slots, slots| Role::sender(slot_bytes, max_slots, Mechanism::Copy, slots);
    let role = match resource {
        Resource::Bytes => sender(1 << 20, 1, Slots::Segments),
        Resource::Slots => sender(64, OTHERS_SLOTS, Slots::Segments),
        Resource::Descriptors => sender(4096, 32, Slots::Broker { huge: false }),
        _ => RECEIVER,
    };
    for opened in 0.. {
        let channel = if resource == Resource::Channels { opened } else { opened / PEERS as u64 };
        let channel = format!("hoard-{channel}");
        match caller.open(opened, &channel, role)? {
            Some(Ok(())) => {}
            Some(Err(refusal)) => return Effect::spent(&refusal, resource),
            None => return Err(format!("the broker hangs up after {opened}")),
        }
    }
    unreachable!("there is a last one")
}

/// The same for links, of a client with a sender and one with receivers, which read which ends they are linked with: those that
/// are too many wait.
fn hoard_links() -> Seen {
    let (one, other) = (Caller::join()?, Caller::join()?);
    let own = nix::unistd::geteuid().as_raw();
    let most = quota(Resource::Links);
    for opened in 0..=most {
        let channel = format!("hoard-{}", opened / PEERS as u64);
        if opened.is_multiple_of(PEERS as u64) {
            Effect::if_so(one.open(opened, &channel, SENDER)? == Some(Ok(())), || "no sender".into())?;
        }
        Effect::if_so(other.open(opened, &channel, RECEIVER)? == Some(Ok(())), || "no receiver".into())?;
        if opened.is_multiple_of(MAX_INTRODUCTIONS as u64) {
            one.news()?;
            other.news()?;
        }
    }
    let apart: Vec<_> = other.unpaired(most)?.into_iter().map(|one| one.why).collect();
    Effect::if_so(apart == [Mismatch::Quota { user: own }], || format!("the last of {most} is apart for {apart:?}"))
}

/// Opens receivers where newcomers attach, until it has its share.
fn crowd() -> Seen {
    let caller = Caller::join()?;
    for opened in 0.. {
        match caller.open(opened, "newcomers", RECEIVER)? {
            Some(Ok(())) => {}
            Some(Err(Refusal::Share { ends, .. })) if ends == MAX_ENDS_OF_USER => break,
            other => return Err(format!("after {opened} receivers: {other:?}")),
        }
    }
    caller.is_answered()
}

/// Opens a sender that takes its slots from a receiver, which there is, and a receiver that accepts next to nothing,
/// where honest ones are and newcomers attach: it sees that those are not paired with it.
fn demand() -> Seen {
    let caller = Caller::join()?;
    let none = Accepted { slot_bytes: 1, max_slots: 1 };
    let modest = Role::Receiver { require: Protection::Sealed, accepts: Limits { own: none, others: none } };
    let from_receiver = Role::sender(1, 1, Mechanism::Lease, Slots::Receiver);
    let ends = [("newcomers", modest), ("newcomers", from_receiver), ("c", modest), ("c", from_receiver)];
    for (endpoint, (channel, role)) in (0..).zip(ends) {
        let opened = caller.open(endpoint, channel, role)?;
        Effect::if_so(opened == Some(Ok(())), || format!("to open: {opened:?}"))?;
    }
    let apart = |endpoint| Ok::<Vec<_>, String>(caller.unpaired(endpoint)?.into_iter().map(|one| one.why).collect());
    let (receiver, sender) = (apart(2)?, apart(3)?);
    let is_apart = matches!(receiver[..], [Mismatch::SlotSize { .. }, ..])
        && matches!(sender[..], [Mismatch::UntrustedPool { .. }, ..]);
    Effect::if_so(is_apart, || format!("not paired: {receiver:?}, {sender:?}"))
}
