//! What is measured, in which order, and where the results go.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
    time::Duration,
};

use clap::ValueEnum;
use fbuf_broker::Embedded;
use fbuf_core::process::processors;
use serde_json::json;

use crate::{
    Result,
    machine::Machine,
    options::{Common, Settings},
    outcome::{Once, Outcome, Spread},
    peers::Peer,
    protection,
    report::Report,
    table,
    terms::{Means, Mode, Terms, Wait, Work, name},
    work::{self, once},
};

const LATENCY_SIZES: [usize; 5] = [64, 4 << 10, 64 << 10, 1 << 20, 16 << 20];
const STREAM_SIZES: [usize; 4] = [64, 4 << 10, 64 << 10, 1 << 20];

/// A broker, two processors, how to measure, and where the results go.
pub(crate) struct Suite<'a> {
    out: &'a mut dyn Write,
    broker: Embedded,
    processors: [Option<usize>; 2],
    time: Duration,
    common: Common,
    /// With how many slots the bare ring streams best, by size and mode.
    best: BTreeMap<(usize, Mode), u32>,
    outcomes: Vec<Outcome>,
    once: Vec<Once>,
}

impl<'a> Suite<'a> {
    pub(crate) fn new(common: Common, out: &'a mut dyn Write) -> Result<Self> {
        // Its thread may run anywhere: it starts before this one is pinned.
        let broker = Embedded::start()?;
        let processors = processors::two();
        processors::pin(processors[0]);
        let (time, best) = (common.time()?, BTreeMap::new());
        Ok(Self { out, broker, processors, time, common, best, outcomes: Vec::new(), once: Vec::new() })
    }

    fn terms(&self, peer: Peer, work: Work, size: usize) -> Terms {
        Terms {
            peer,
            work,
            size,
            mode: Mode::Untouched,
            wait: Wait::Spin,
            slots: None,
            means: Means::Volatile,
            others: 1,
            time: self.time,
            processors: self.processors,
            broker: self.broker.address().to_string(),
        }
    }

    pub(crate) fn latency(&mut self, settings: &Settings) -> Result<()> {
        self.measure(settings, Work::Echo { every: Duration::ZERO }, &LATENCY_SIZES)
    }

    pub(crate) fn stream(&mut self, settings: &Settings) -> Result<()> {
        self.measure(settings, Work::Stream, &STREAM_SIZES)
    }

    fn measure(&mut self, settings: &Settings, work: Work, sizes: &[usize]) -> Result<()> {
        let sizes = settings.sizes(sizes)?;
        let peers = if settings.peer.is_empty() { Peer::value_variants() } else { &settings.peer };
        let modes = if settings.mode.is_empty() { &[Mode::Untouched] } else { &settings.mode[..] };
        for (&wait, &mode, &size) in product(&settings.wait, modes, &sizes) {
            let able = |&peer: &&Peer| peer.waits().contains(&wait) && peer.carries(size);
            if let [peer] = settings.peer[..]
                && !able(&&peer)
            {
                let (peer, size, wait) = (name(peer), table::bytes(size), name(wait));
                return Err(
                    format!("{peer} was asked for with {size} and waiting by {wait}: it does not do that").into()
                );
            }
            let mut all = Vec::new();
            for &peer in peers.iter().filter(able) {
                let mut terms = Terms { mode, wait, ..self.terms(peer, work, size) };
                if peer.takes_slots() {
                    terms.slots = settings.slots.first().copied();
                }
                if peer == Peer::Limit && work == Work::Stream && terms.slots.is_none() {
                    terms.slots = Some(self.best_depth(&terms)?);
                }
                all.push(terms);
            }
            self.in_turn(&all)?;
        }
        Ok(())
    }

    /// With how many slots the bare ring streams best.
    fn best_depth(&mut self, terms: &Terms) -> Result<u32> {
        let key = (terms.size, terms.mode);
        if let Some(&slots) = self.best.get(&key) {
            return Ok(slots);
        }
        let mut best = (0.0, 0);
        for slots in depths(terms.size) {
            let terms = Terms { slots: Some(slots), time: terms.time / 3, ..terms.clone() };
            let runs = (0..3).map(|run| Ok(Outcome::new(&terms, run, &work::run(&terms)?).headline()));
            let median = Spread::of(runs.collect::<Result<Vec<_>>>()?).map_or(0.0, |spread| spread.median);
            if median > best.0 {
                best = (median, slots);
            }
        }
        self.best.insert(key, best.1);
        Ok(best.1)
    }

    pub(crate) fn wakeup(&mut self, rates: &[f64], waits: &[Wait]) -> Result<()> {
        for &rate in rates {
            let every = Duration::try_from_secs_f64(rate.recip()).map_err(|error| format!("--rate {rate}: {error}"))?;
            let work = Work::Echo { every };
            let time = self.time.max(every * 2);
            let of = |peer, wait| Terms { wait, time, ..self.terms(peer, work, crate::payload::NUMBER) };
            let mut all: Vec<_> = waits.iter().map(|&wait| of(Peer::Fbuf, wait)).collect();
            let others = [Peer::Futex, Peer::Eventfd, Peer::TokioFbuf, Peer::TokioEventfd];
            all.extend(others.map(|peer| of(peer, Wait::Block)));
            self.in_turn(&all)?;
        }
        Ok(())
    }

    pub(crate) fn depth(&mut self, settings: &Settings) -> Result<()> {
        let modes = if settings.mode.is_empty() { &[Mode::Touched] } else { &settings.mode[..] };
        let peers = if settings.peer.is_empty() { &[Peer::Fbuf, Peer::Limit] } else { &settings.peer[..] };
        for (&wait, &mode, &size) in product(&settings.wait, modes, &settings.sizes(&STREAM_SIZES)?) {
            let slots: Vec<_> = if settings.slots.is_empty() { depths(size).collect() } else { settings.slots.clone() };
            let mut all = Vec::new();
            for (slots, peer) in slots.iter().flat_map(|&slots| peers.iter().map(move |&peer| (slots, peer))) {
                all.push(Terms { mode, wait, slots: Some(slots), ..self.terms(peer, Work::Stream, size) });
            }
            let first = self.outcomes.len();
            self.in_turn(&all)?;
            for outcome in &mut self.outcomes[first..] {
                outcome.workload = "depth";
            }
        }
        Ok(())
    }

    pub(crate) fn fan(&mut self, counts: &[u32]) -> Result<()> {
        let of = |suite: &Self, work, others| Terms {
            // Those that share a processor must not look for what only another of them can bring.
            wait: Wait::Block,
            others,
            slots: Some(1024),
            ..suite.terms(Peer::Fbuf, work, 4 << 10)
        };
        for work in [Work::Stream, Work::FanIn] {
            let all: Vec<_> = counts.iter().map(|&count| of(self, work, count)).collect();
            self.in_turn(&all)?;
        }
        Ok(())
    }

    pub(crate) fn once(&mut self) -> Result<()> {
        let broker = self.broker.address().to_string();
        // One run takes about a millisecond.
        let runs = (0..self.common.runs * 20).map(|_| once::run(&broker)).collect::<Result<Vec<_>>>()?;
        if !self.common.json {
            writeln!(self.out, "\nonce, with {} slots of {}", once::SLOTS, table::bytes(once::SLOT))?;
        }
        for (index, step) in once::STEPS.into_iter().enumerate() {
            let Some(nanoseconds) = Spread::of(runs.iter().map(|run| run[index].as_nanos() as f64)) else { continue };
            self.once.push(Once { step, nanoseconds });
            if self.common.json {
                let Spread { median, least, most } = nanoseconds;
                let line = json!({ "workload": "once", "step": step, "median_ns": median, "least_ns": least, "most_ns": most });
                writeln!(self.out, "{line}")?;
            } else {
                let Spread { median, least, most } = nanoseconds;
                let [median, least, most] = [median, least, most].map(table::nanoseconds);
                writeln!(self.out, "  {step:<24}{median:>9} ({least}–{most})")?;
            }
        }
        Ok(())
    }

    /// What the levels of protection cost, beside copying; and a report, if a folder for it is given.
    pub(crate) fn protection(&mut self, sizes: &[usize], out: Option<&Path>) -> Result<()> {
        let first = self.outcomes.len();
        let mut missing = Vec::new();
        for &size in sizes {
            let (sorts, others) = protection::sorts(size);
            missing.extend(others);
            for run in 0..self.common.runs {
                for &(peer, means) in &sorts {
                    let work = Work::Echo { every: Duration::ZERO };
                    let slots = peer.takes_slots().then_some(protection::SLOTS);
                    let terms = Terms { mode: Mode::Paged, means, slots, ..self.terms(peer, work, size) };
                    let result = work::run(&terms).map_err(|error| format!("{}: {error}", name(means)))?;
                    self.outcomes.push(Outcome { workload: "protection", ..Outcome::new(&terms, run, &result) });
                }
                // It reads and writes all of it.
                let work = Work::Echo { every: Duration::ZERO };
                let terms = Terms { mode: Mode::Touched, ..self.terms(Peer::Memcpy, work, size) };
                let result = protection::copy(&terms)?;
                self.outcomes.push(Outcome { workload: "protection", ..Outcome::new(&terms, run, &result) });
            }
        }
        let outcomes = &self.outcomes[first..];
        if self.common.json {
            for outcome in outcomes {
                writeln!(self.out, "{}", serde_json::to_string(outcome)?)?;
            }
        } else {
            write!(self.out, "{}", protection::tables(outcomes))?;
            for why in missing {
                writeln!(self.out, "not measured: {why}")?;
            }
        }
        if let Some(out) = out {
            protection::write(outcomes, out)?;
            if !self.common.json {
                writeln!(self.out, "\nwritten to {}", out.join("fbuf-protection.html").display())?;
            }
        }
        Ok(())
    }

    /// Everything, and the report.
    pub(crate) fn all(&mut self, out: &Path) -> Result<()> {
        let settings = Settings::default_with(self.common);
        self.latency(&settings)?;
        self.stream(&Settings { mode: vec![Mode::Untouched, Mode::Touched], ..Settings::default_with(self.common) })?;
        self.depth(&settings)?;
        self.wakeup(&[1.0, 100.0, 10_000.0], &[Wait::Adaptive, Wait::Block])?;
        self.fan(&[1, 2, 4, 16])?;
        self.once()?;
        let instructions =
            match instructions(64, &[Peer::Fbuf, Peer::Limit, Peer::SharedMemory], false, self.common.json, self.out) {
                Ok(counts) => counts,
                Err(error) => {
                    // It is no result, and nothing depends on its being read.
                    let _ = writeln!(io::stderr(), "fbuf: instructions were not counted: {error}");
                    Vec::new()
                }
            };
        let report =
            Report { machine: Machine::here(), runs: &self.outcomes, once: &self.once, instructions: &instructions };
        report.write(out)?;
        if !self.common.json {
            writeln!(self.out, "\nwritten to {}", out.join("fbuf-bench.html").display())?;
        }
        Ok(())
    }

    /// Runs all of them in turn, as often as was asked for.
    fn in_turn(&mut self, all: &[Terms]) -> Result<()> {
        let first = self.outcomes.len();
        for run in 0..self.common.runs {
            for terms in all {
                let result =
                    work::run(terms).map_err(|error| format!("{} was not measured: {error}", name(terms.peer)))?;
                let outcome = Outcome::new(terms, run, &result);
                if self.common.json {
                    writeln!(self.out, "{}", serde_json::to_string(&outcome)?)?;
                }
                self.outcomes.push(outcome);
            }
        }
        if !self.common.json {
            table::write(self.out, &self.outcomes[first..])?;
        }
        Ok(())
    }
}

/// All combinations, the last changing fastest.
fn product<'a, A, B, C>(a: &'a [A], b: &'a [B], c: &'a [C]) -> impl Iterator<Item = (&'a A, &'a B, &'a C)> {
    a.iter().flat_map(move |a| b.iter().flat_map(move |b| c.iter().map(move |c| (a, b, c))))
}

/// The numbers of slots that are worth trying with messages of this size: 2 to a million, from 64 KiB to
/// 64 MiB.
fn depths(size: usize) -> impl Iterator<Item = u32> {
    (1..=20).map(|power| 1 << power).filter(move |&slots| {
        let bytes = slots as usize * size;
        bytes <= 64 << 20 && (bytes >= 64 << 10 || slots >= 1024)
    })
}

/// With `tags`, each message of fbuf has a tag.
pub(crate) fn instructions(
    size: usize,
    peers: &[Peer],
    tags: bool,
    json: bool,
    out: &mut dyn Write,
) -> Result<Vec<(Peer, f64)>> {
    if !json {
        writeln!(out, "\ninstructions for a message of {}, untouched, both sides together", table::bytes(size))?;
    }
    let mut counts = Vec::new();
    for &peer in peers {
        let count = work::lockstep::instructions(peer, size, tags)?;
        if json {
            let line = json!({ "peer": peer, "workload": "instructions", "size": size, "instructions": count });
            writeln!(out, "{line}")?;
        } else {
            writeln!(out, "  {:<24}{count:>8.1}", name(peer))?;
        }
        counts.push((peer, count));
    }
    Ok(counts)
}

/// Is what valgrind runs.
pub(crate) fn lockstep(peer: Peer, size: usize, bursts: u64, tags: bool) -> Result<()> {
    let broker = Embedded::start()?;
    let terms = Terms {
        peer,
        work: Work::Stream,
        size,
        mode: Mode::Untouched,
        wait: Wait::Spin,
        slots: peer.takes_slots().then_some(1024),
        means: Means::Volatile,
        others: 1,
        time: Duration::ZERO,
        processors: [None; 2],
        broker: broker.address().to_string(),
    };
    work::run_in_lockstep(&terms, bursts, tags)
}
