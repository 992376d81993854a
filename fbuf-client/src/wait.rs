//! How an endpoint passes the time until there is something to do.

use std::time::{Duration, Instant};

use fbuf_core::peer::Peer;
use nix::{
    sched::{CpuSet, sched_getaffinity},
    unistd::{Pid, SysconfVar, sysconf},
};

/// What an endpoint does while it has nothing to do.
///
/// ```
/// use fbuf_client::Wait;
/// # let broker = fbuf_broker::Embedded::start()?;
/// # let client = fbuf_client::Client::connect_to(broker.address())?;
/// let receiver = client.receiver("orders").wait(Wait::Spin).open()?; // on a processor of its own
/// let sender = client.sender("orders").wait(Wait::Block).open()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Wait {
    /// Looks again and again, and never sleeps: the lowest latency, at the price of a processor.
    Spin,
    /// Looks for twice as long as it takes to wake a sleeper, then sleeps. How long that is, it learns
    /// each time that a peer wakes it. Looking for as long as sleep would cost is never much worse than
    /// the better of the two (Karlin and others, "Empirical studies of competitive spinning", SOSP
    /// 1991); twice that, so that a process is still awake when an answer comes from a peer that
    /// had to be woken: else two that talk to each other would both sleep each time. It sleeps at once
    /// where all its peers are confined to the one processor that it is confined to itself.
    #[default]
    Adaptive,
    /// Sleeps at once: the least processor time.
    Block,
}

/// What it costs to be woken, of late: [`Wait::Adaptive`] looks for twice as long before it sleeps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SpinBudget(Duration);

impl SpinBudget {
    /// Until it is known: about what it takes on a virtual machine.
    const FIRST: Duration = Duration::from_micros(30);
    /// Whatever was measured, it is taken to be no less and no more than this. A peer may lie about when
    /// it rang.
    const LEAST: Duration = Duration::from_micros(5);
    const MOST: Duration = Duration::from_micros(100);

    pub(crate) fn new() -> Self {
        Self(Self::FIRST)
    }

    fn looks_for(self) -> Duration {
        2 * self.0
    }

    /// Learns from one wake-up. Times that cannot be one are left out: the peer may have rung for an
    /// earlier sleep.
    pub(crate) fn learn(&mut self, waking: Option<Duration>) {
        if let Some(waking) = waking.filter(|&waking| waking < 10 * Self::MOST) {
            self.0 = ((7 * self.0 + waking) / 8).clamp(Self::LEAST, Self::MOST);
        }
    }
}

/// How often an endpoint that waits without sleeping looks at sockets, where deaths and newcomers show.
pub(crate) const LOOK_TIME: Duration = Duration::from_millis(1);
/// How often an endpoint does that is busy.
pub(crate) const BUSY_LOOK_TIME: Duration = Duration::from_millis(100);
/// For how long a call reads what peers have sent, or frees what they have left behind, before it goes on with the rest
/// the next time. It ends what it has begun: that is one letter, so many messages on one socket, or one segment.
const ATTENTION: Duration = Duration::from_micros(500);

/// The time that a call has for its peers.
pub(crate) struct Attention(Instant);

impl Attention {
    pub(crate) fn begin() -> Self {
        Self(Instant::now())
    }

    /// Whether there is time for one thing more.
    pub(crate) fn lasts(&self) -> bool {
        self.0.elapsed() < ATTENTION
    }
}

/// How many looks come first, without a pause between them and without a look at the clock: some
/// microseconds, in which a peer that is awake answers.
const EAGER: u32 = 1024;
/// How many looks, with pauses, pass between two looks at the clock.
const ROUND: u32 = 64;

/// One period of waiting.
#[derive(Debug)]
pub(crate) struct Waiting {
    how: Wait,
    spin_budget: SpinBudget,
    deadline: Option<Instant>,
    /// Over how many links one look goes.
    links: u32,
    rounds: u32,
    since: Option<Instant>,
    looked: Option<Instant>,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Look at memory again.
    Again,
    /// Look at sockets, without waiting.
    Look,
    /// Sleep.
    Sleep,
    /// The time is over.
    Expired,
}

impl Waiting {
    pub(crate) fn new(how: Wait, spin_budget: SpinBudget, deadline: Option<Instant>) -> Self {
        Self { how, spin_budget, deadline, links: 1, rounds: 0, since: None, looked: None }
    }

    /// Of nothing that could be looked at.
    pub(crate) fn asleep(deadline: Option<Instant>) -> Self {
        Self::new(Wait::Block, SpinBudget::new(), deadline)
    }

    /// For this and for that: it looks as long as one of the two would.
    pub(crate) fn and(self, other: Self) -> Self {
        let how = match (self.how, other.how) {
            (Wait::Spin, _) | (_, Wait::Spin) => Wait::Spin,
            (Wait::Adaptive, _) | (_, Wait::Adaptive) => Wait::Adaptive,
            (Wait::Block, Wait::Block) => Wait::Block,
        };
        let spin_budget = SpinBudget(self.spin_budget.0.max(other.spin_budget.0));
        Self { how, spin_budget, links: self.links.saturating_add(other.links), ..self }
    }

    /// Each look goes over so many links, so that there are fewer looks between two at the clock.
    pub(crate) fn among(mut self, links: usize) -> Self {
        self.links = u32::try_from(links).unwrap_or(u32::MAX).max(1);
        self
    }

    /// Until when.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether it looks before it sleeps.
    pub(crate) fn looks(&self) -> bool {
        self.how != Wait::Block
    }

    /// Whether this look is one of those that are worth more effort: the first, each after a sleep or a look at sockets,
    /// and some between.
    pub(crate) fn is_thorough(&self) -> bool {
        self.how == Wait::Block || self.rounds.is_multiple_of(self.round())
    }

    fn round(&self) -> u32 {
        (ROUND / self.links).max(1)
    }

    #[inline]
    pub(crate) fn next(&mut self) -> Next {
        // It stays behind the eager looks when it has been there.
        self.rounds = self.rounds.checked_add(1).unwrap_or(EAGER);
        if self.how != Wait::Block {
            if self.rounds < EAGER / self.links {
                return Next::Again;
            }
            if !self.rounds.is_multiple_of(self.round()) {
                std::hint::spin_loop();
                return Next::Again;
            }
        }
        self.at_the_clock(Instant::now())
    }

    /// As [`Self::next`], behind a look that has taken long: the clock is looked at each time.
    pub(crate) fn at_the_clock(&mut self, now: Instant) -> Next {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            return Next::Expired;
        }
        let since = *self.since.get_or_insert(now);
        let lasted = now.duration_since(since);
        match self.how {
            Wait::Block => Next::Sleep,
            Wait::Adaptive if lasted >= self.spin_budget.looks_for() => Next::Sleep,
            Wait::Adaptive => Next::Again,
            Wait::Spin => {
                let looked = self.looked.get_or_insert(since);
                if now.duration_since(*looked) < LOOK_TIME {
                    return Next::Again;
                }
                *looked = now;
                Next::Look
            }
        }
    }
}

/// How often an endpoint that is busy looks at sockets: by time, although it does not look at the
/// clock for each message. Messages come in rounds, and rounds between two looks at the clock follow
/// their rate.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Messages between two looks at the clock.
    stride: u32,
    /// Those of them that are left after this round.
    rest: u32,
    round: u32,
    looked: Instant,
}

impl Pace {
    /// The most messages of a round. With twice as many, which is two instructions less for each message,
    /// 64-byte streaming is half as fast between two cores that share a cache.
    const ROUND: u32 = 64;
    /// The most messages between two looks at the clock.
    const LONGEST: u32 = 4096;
    /// The most messages that all senders together may have before the first has its turn again: with many, rounds
    /// are shorter.
    const CIRCLE: u32 = 4096;

    pub(crate) fn new() -> Self {
        Self { stride: 1, rest: 0, round: 1, looked: Instant::now() }
    }

    /// Begins a round: whether the last look at the sockets is so long ago, as far as it is time to look
    /// at the clock.
    pub(crate) fn is_due(&mut self, every: Duration) -> bool {
        let due = self.rest == 0 && self.has_passed(every);
        self.round = self.rest.clamp(1, Self::ROUND);
        self.rest = self.rest.saturating_sub(Self::ROUND);
        due
    }

    fn has_passed(&mut self, every: Duration) -> bool {
        let elapsed = self.looked.elapsed();
        if elapsed >= every {
            self.stride = (self.stride / 2).max(1);
        } else if elapsed < every / 8 {
            self.stride = (self.stride * 2).min(Self::LONGEST);
        }
        self.rest = self.stride;
        elapsed >= every
    }

    /// How many messages the round has that was begun.
    pub(crate) fn round(&self) -> u32 {
        self.round
    }

    /// As [`Self::round`], of one of so many senders.
    pub(crate) fn round_among(&self, senders: usize) -> u32 {
        let share = Self::CIRCLE / u32::try_from(senders).unwrap_or(u32::MAX).max(1);
        self.round.min(share.max(1))
    }

    /// Notes a look at the sockets.
    pub(crate) fn looked(&mut self) {
        self.looked = Instant::now();
    }
}

/// Whether a side that has caught up with the other lets it get ahead.
///
/// The two are fastest when they work on different cache lines. A receiver that takes each message as it
/// comes takes the line that the sender is about to write, and a sender that takes each slot as it comes
/// back writes what the receiver has only just read. So in a stream, a side that has to wait waits for many messages. It
/// does so only after several messages came one right behind the other, as long as there is progress,
/// and the less often the more often it was in vain: a message that comes alone, or is an answer, is
/// never kept waiting, and neither is a sender whose receivers keep what they got.
#[derive(Debug, Default)]
pub(crate) struct Batching {
    /// How many messages there had been when it last caught up.
    messages: u64,
    /// How many more times to leave it.
    leave: u32,
    /// How many times to leave it when it is in vain.
    spin_budget: u32,
}

/// What a side sees that waits for many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Enough.
    Enough,
    /// More than before.
    More,
    /// Nothing new.
    Nothing,
}

impl Batching {
    /// How many messages a receiver waits for.
    pub(crate) const MESSAGES: u64 = 64;
    /// How long it waits.
    pub(crate) const RECEIVER_TIME: Duration = Duration::from_micros(4);
    /// How long a sender waits for one more slot; it has sent all it has, so there is much to be read.
    pub(crate) const SENDER_TIME: Duration = Duration::from_micros(200);
    /// How many messages in a row are a stream.
    const STREAM: u64 = 4;
    /// The most times to leave it.
    const MOST: u32 = 64;

    /// Has caught up, after so many messages since the beginning: whether to wait for many.
    pub(crate) fn is_worthwhile(&mut self, messages: u64) -> bool {
        let streams = messages - std::mem::replace(&mut self.messages, messages) >= Self::STREAM;
        if streams && self.leave > 0 {
            self.leave -= 1;
            return false;
        }
        streams
    }

    /// Waits for enough, for at most so long without progress.
    pub(crate) fn wait(&mut self, time: Duration, mut look: impl FnMut() -> Progress) {
        let mut since = Instant::now();
        // The look at the clock is pause enough between two looks at memory.
        while since.elapsed() < time {
            match look() {
                Progress::Enough => {
                    self.spin_budget = 0;
                    return;
                }
                Progress::More => since = Instant::now(),
                Progress::Nothing => {}
            }
        }
        self.spin_budget = (self.spin_budget * 2).clamp(1, Self::MOST);
        self.leave = self.spin_budget;
    }
}

/// For how long to sleep where a wake-up is sure to come.
pub(crate) const FOR_EVER: Duration = Duration::MAX;
/// For how long to sleep where a wake-up may be lost.
pub(crate) const UNSURE: Duration = Duration::from_millis(10);
/// How many peers that could not be greeted or answered at once are tried at a time.
pub(crate) const LATE_AT_ONCE: usize = 4;
/// For how long a sender that was not told how many slots to have waits before it makes more of them.
pub(crate) const LATE: Duration = Duration::from_millis(20);

/// Until when to sleep that shall not be longer than `time`, nor beyond the deadline.
pub(crate) fn within(time: Duration, deadline: Option<Instant>) -> Option<Instant> {
    if time == FOR_EVER {
        return deadline;
    }
    let soon = self::deadline(time);
    [soon, deadline].into_iter().flatten().min()
}

/// Which peers can only run when this side does not: both are confined to the same processor, or there
/// is but one. Looking for what such a peer will do only keeps it from doing it.
#[derive(Debug, Default)]
pub(crate) struct SameCpuPeers(Vec<Peer>);

impl SameCpuPeers {
    /// A link was opened by the thread that will wait for it.
    pub(crate) fn add(&mut self, peer: Peer) {
        if shares_processor(peer.process.pid) {
            self.0.push(peer);
        }
    }

    /// A link was closed.
    pub(crate) fn remove(&mut self, peer: Peer) {
        self.0.retain(|&other| other != peer);
    }

    /// What to do instead of what was asked for, while so many links are open.
    pub(crate) fn wait(&self, asked: Wait, links: usize) -> Wait {
        if asked == Wait::Adaptive && links > 0 && self.0.len() == links { Wait::Block } else { asked }
    }
}

fn shares_processor(peer: i32) -> bool {
    if matches!(sysconf(SysconfVar::_NPROCESSORS_ONLN), Ok(Some(1))) {
        return true;
    }
    // A peer in a PID namespace that cannot be seen from here is 0, which would be this thread.
    let only = |pid| {
        let allowed = sched_getaffinity(Pid::from_raw(pid)).ok()?;
        let mut allowed = (0..CpuSet::count()).filter(|&processor| allowed.is_set(processor) == Ok(true));
        allowed.next().filter(|_| allowed.next().is_none())
    };
    peer != 0 && only(0).is_some_and(|own| only(peer) == Some(own))
}

/// The moment that is `time` from now; none if that is beyond what clocks count.
pub(crate) fn deadline(time: Duration) -> Option<Instant> {
    Instant::now().checked_add(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_strategy_does_what_it_says() {
        let start = Instant::now();
        let at = |waiting: &mut Waiting, micros| waiting.at_the_clock(start + Duration::from_micros(micros));
        let mut block = Waiting::new(Wait::Block, SpinBudget::new(), None);
        assert_eq!(at(&mut block, 0), Next::Sleep);
        let mut spin = Waiting::new(Wait::Spin, SpinBudget::new(), None);
        assert_eq!(at(&mut spin, 0), Next::Again);
        assert_eq!(at(&mut spin, 999), Next::Again);
        assert_eq!(at(&mut spin, 1000), Next::Look);
        assert_eq!(at(&mut spin, 1001), Next::Again);
        {
            let mut adaptive = Waiting::new(Wait::Adaptive, SpinBudget::new(), None);
            assert_eq!(at(&mut adaptive, 0), Next::Again);
            assert_eq!(at(&mut adaptive, 59), Next::Again);
            assert_eq!(at(&mut adaptive, 60), Next::Sleep);
        }
    }

    #[test]
    fn a_look_after_a_sleep_or_at_sockets_is_thorough() {
        for how in [Wait::Spin, Wait::Adaptive, Wait::Block] {
            let mut waiting = Waiting::new(how, SpinBudget::new(), None).among(3);
            for _ in 0..3 {
                while !matches!(waiting.next(), Next::Sleep | Next::Look) {}
                assert!(waiting.is_thorough(), "{how:?}: what came meanwhile is not looked for");
            }
        }
    }

    #[test]
    fn nobody_looks_for_what_only_another_on_the_same_processor_can_do() {
        use fbuf_core::peer::Credentials;
        let process = Credentials::new(std::process::id() as i32, 0, 0);
        let one = Peer::new(1, process).with_same_user(true).with_trusted(true);
        let other = Peer::new(2, Credentials::new(0, 0, 0)).with_same_user(true).with_trusted(true);
        // Alone on a thread of its own, which is then confined to one processor.
        std::thread::spawn(move || {
            let mut same_cpu = SameCpuPeers::default();
            let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
            let first = (0..CpuSet::count()).find(|&processor| allowed.is_set(processor) == Ok(true)).unwrap();
            let mut only = CpuSet::new();
            only.set(first).unwrap();
            for pid in [0, process.pid] {
                nix::sched::sched_setaffinity(Pid::from_raw(pid), &only).unwrap();
            }
            same_cpu.add(one);
            same_cpu.add(other);
            nix::sched::sched_setaffinity(Pid::from_raw(process.pid), &allowed).unwrap();
            assert_eq!(same_cpu.wait(Wait::Adaptive, 1), Wait::Block);
            assert_eq!(same_cpu.wait(Wait::Spin, 1), Wait::Spin, "it was asked for");
            if !matches!(sysconf(SysconfVar::_NPROCESSORS_ONLN), Ok(Some(1))) {
                assert_eq!(same_cpu.wait(Wait::Adaptive, 2), Wait::Adaptive, "the other one runs elsewhere");
            }
            same_cpu.remove(one);
            assert_eq!(same_cpu.wait(Wait::Adaptive, 1), Wait::Adaptive);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn patience_follows_what_waking_costs() {
        let mut spin_budget = SpinBudget::new();
        let learn = |spin_budget: &mut SpinBudget, micros| {
            for _ in 0..100 {
                spin_budget.learn(micros);
            }
            spin_budget.0
        };
        let micros = Duration::from_micros;
        assert!(learn(&mut spin_budget, Some(micros(20))).abs_diff(micros(20)) < micros(1));
        assert_eq!(learn(&mut spin_budget, None), spin_budget.0);
        assert_eq!(learn(&mut spin_budget, Some(micros(1))), SpinBudget::LEAST);
        assert_eq!(learn(&mut spin_budget, Some(micros(999))), SpinBudget::MOST);
        let before = spin_budget.0;
        assert_eq!(learn(&mut spin_budget, Some(Duration::from_secs(1))), before, "a bell of long ago");
    }

    #[test]
    fn only_streams_are_gathered() {
        let mut batching = Batching::default();
        // A message and its answer, and so on.
        assert!((1..100).all(|taken| !batching.is_worthwhile(taken)));
        // A stream, as long as batches come.
        for taken in 2..100 {
            assert!(batching.is_worthwhile(100 * taken));
            batching.wait(Batching::RECEIVER_TIME, || Progress::Enough);
        }
        // Bursts, after which nothing comes for long.
        let mut waits = 0;
        for taken in 100..1100 {
            if batching.is_worthwhile(100 * taken) {
                waits += 1;
                batching.wait(Batching::RECEIVER_TIME, || Progress::Nothing);
            }
        }
        assert!((7..30).contains(&waits), "{waits} waits in vain for 1000 bursts");
    }

    #[test]
    fn the_clock_is_looked_at_as_often_as_messages_come() {
        let mut pace = Pace::new();
        let (mut looks, mut messages) = (0, 0);
        while messages < 100_000 {
            looks += u32::from(pace.rest == 0);
            assert!(!pace.is_due(Duration::from_secs(3600)));
            assert!((1..=Pace::ROUND).contains(&pace.round()));
            messages += pace.round();
        }
        assert!((10..100).contains(&looks), "{looks} looks at the clock for a fast stream");
        // A slow one: each look finds that it is time.
        for _ in 0..20 {
            while !pace.is_due(Duration::ZERO) {}
        }
        assert_eq!(pace.round(), 1, "a slow stream looks for each message");
    }

    #[test]
    fn the_clock_is_looked_at_as_soon_however_many_links_a_look_goes_over() {
        for links in [1, 2, 64, 1000, 100_000] {
            let mut waiting = Waiting::new(Wait::Spin, SpinBudget::new(), Some(Instant::now())).among(links);
            let looks = (1..).find(|_| waiting.next() == Next::Expired).unwrap();
            assert!(looks * links <= (EAGER as usize).max(links), "{looks} looks over {links} links");
            let next = (1..).find(|_| waiting.next() == Next::Expired).unwrap();
            assert!(next * links <= (ROUND as usize).max(links), "{next} looks over {links} links");
        }
    }

    #[test]
    fn a_sender_has_its_turn_soon_however_many_there_are() {
        let mut pace = Pace::new();
        while pace.round() < Pace::ROUND {
            pace.is_due(Duration::from_secs(3600));
        }
        for senders in [0, 1, 64, 1000, 100_000] {
            let round = pace.round_among(senders);
            assert!((1..=Pace::ROUND).contains(&round));
            assert!(senders as u32 * round <= Pace::CIRCLE.max(senders as u32), "{round} messages of {senders} each");
        }
        assert_eq!(pace.round_among(64), Pace::ROUND);
    }

    #[test]
    fn time_ends_for_each_strategy() {
        for how in [Wait::Spin, Wait::Adaptive, Wait::Block] {
            let now = Instant::now();
            assert_eq!(Waiting::new(how, SpinBudget::new(), Some(now)).at_the_clock(now), Next::Expired);
        }
    }
}
