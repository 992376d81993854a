//! How a sender comes by a free slot when it knows of none: it looks, grows, waits, sleeps.

use std::time::Instant;

use fbuf_core::{
    points,
    send::{link::Outbound, pool::Lack},
    wait::Fencing,
};

use super::{AllocateError, Sender};
use crate::wait::{self, Batching, LATE, Next, Progress, UNSURE, Waiting, within};

impl Sender {
    /// Looks for a slot that is free although it is not its turn, or is new.
    pub(super) fn find_slot(&mut self, may_grow: bool) -> bool {
        self.pool.notice_leaving();
        self.fetch_rights();
        if !self.pool.search() && may_grow {
            self.grow();
        }
        self.collect()
    }

    /// Looks whether the slots are free whose turn it is.
    pub(super) fn collect(&mut self) -> bool {
        self.pool.collect(self.pace.round())
    }

    /// Adds a segment, or goes on adding the last one: its slots are used once every receiver knows
    /// of it. That it cannot be is no error: there are slots, and they come back.
    fn grow(&mut self) {
        if !self.pool.is_growing() {
            if !self.pool.can_grow() {
                return;
            }
            if self.pool.grow().is_err() {
                self.counters.growth_refused += 1;
                return;
            }
        }
        let mut known = true;
        for index in (0..self.pool.links().len()).rev() {
            match self.pool.announce_to(index) {
                Ok(announced) => known &= announced,
                Err(end) => self.end(index, end),
            }
        }
        if known {
            self.pool.use_segment();
            self.counters.growths += 1;
        } else {
            self.counters.growth_refused += 1;
        }
    }

    pub(super) fn wait_for_slot(&mut self, deadline: Option<Instant>) -> Result<(), AllocateError> {
        self.counters.waits += 1;
        let mut waiting =
            Waiting::new(self.same_cpu.wait(self.wait, self.pool.links().len()), self.spin_budget, deadline);
        waiting = waiting.among(self.pool.links().len());
        if waiting.looks() && self.batching.is_worthwhile(self.pool.next_sequence()) {
            self.gather_slots();
        }
        // None also for a time beyond what clocks count.
        let mut spin_budget = self.disconnect_after.and_then(|time| Some((time, wait::deadline(time)?)));
        loop {
            if let Some((time, end)) = spin_budget
                && waiting.is_thorough()
                && Instant::now() >= end
            {
                spin_budget = wait::deadline(time).map(|end| (time, end));
                self.drop_slowest(time);
            }
            if waiting.is_thorough() {
                self.pool.notice_leaving();
                self.fetch_rights();
            }
            let look = waiting.is_thorough() && self.pool.search() || self.pool.is_back(0);
            if look && self.collect() {
                return Ok(());
            }
            if waiting.is_thorough() && self.sockets.interrupts().take() {
                return Err(AllocateError::Interrupted);
            }
            let next = waiting.next();
            let grows = self.grows_late && (self.pool.can_grow() || self.pool.is_growing());
            if grows && (next == Next::Expired || waiting.has_lasted(LATE)) {
                self.grow();
                if self.collect() {
                    return Ok(());
                }
            }
            if let Some(error) = self.lack_of_slot() {
                return Err(error);
            }
            match next {
                Next::Again => {}
                Next::Look => self.poll_events(),
                Next::Sleep => {
                    // What would wake it is there, and cannot be read.
                    if let Some(error) = self.lack_of_descriptor() {
                        return Err(error);
                    }
                    let passes = self.pool.is_blocked() || self.pool.lacks_room().is_some();
                    let wake = if grows || passes { within(LATE, deadline) } else { deadline };
                    let wake = [wake, spin_budget.map(|(_, end)| end)].into_iter().flatten().min();
                    // A slot that is put back by a thread of this process wakes it as well.
                    self.sleep(wake, |sender| sender.pool.search_all() || !sender.pool.await_fbufs());
                }
                Next::Expired => {
                    let full = AllocateError::TimedOut(self.pool.slots() as usize);
                    return Err(self.pool.lacks_room().map_or(full, AllocateError::from));
                }
            }
        }
    }

    /// Why there is no slot although not all are in use.
    pub(super) fn lack(&self) -> Option<AllocateError> {
        let room = || self.pool.lacks_room().map(AllocateError::from);
        self.lack_of_slot().or_else(|| self.lack_of_descriptor()).or_else(room)
    }

    /// What there is not enough of for a slot that is free.
    fn lack_of_slot(&self) -> Option<AllocateError> {
        let capacity = self.pool.capacity() as usize;
        Some(match self.pool.lack()? {
            Lack::Memory => AllocateError::NoMemory(capacity),
            Lack::Descriptors => AllocateError::NoDescriptor(capacity),
            Lack::Permission => AllocateError::NotPermitted(capacity),
            Lack::Proc => AllocateError::NoProc(capacity),
        })
    }

    /// Whether a receiver gives a slot for which this process has no descriptor.
    fn lack_of_descriptor(&self) -> Option<AllocateError> {
        let lacks = self.pool.links().iter().any(Outbound::lacks_descriptor);
        lacks.then(|| AllocateError::NoDescriptor(self.pool.capacity() as usize))
    }

    /// Waits until half of the slots are back, as long as they keep coming.
    fn gather_slots(&mut self) {
        let half = self.pool.slots() / 2;
        let (step, mut next) = ((half / 16).max(1), 0);
        self.batching.wait(Batching::SENDER_TIME, || {
            if self.pool.is_back(half) {
                Progress::Enough
            } else if self.pool.is_back(next) {
                next = (next + step).min(half);
                Progress::More
            } else {
                Progress::Nothing
            }
        });
    }

    /// Reads from the socket what a receiver hands back whose slots these are.
    pub(super) fn fetch_rights(&mut self) {
        if self.pool.is_receivers() {
            (0..self.pool.links().len()).rev().for_each(|index| self.attend_to(index));
        }
    }

    /// Sleeps until something happens, unless what is waited for has happened already.
    pub(super) fn sleep(&mut self, deadline: Option<Instant>, happened: impl Fn(&mut Self) -> bool) {
        for link in self.pool.links() {
            link.raise();
        }
        points::reach("park: raised");
        let sure = Fencing::of_this_process().before_sleeping();
        self.pool.notice_leaving();
        if !happened(self) {
            self.counters.sleeps += 1;
            points::reach("park: about to sleep");
            self.await_sockets(if sure { deadline } else { within(UNSURE, deadline) });
            // Whoever rang last has most likely woken it.
            self.spin_budget.learn(self.pool.links().iter().filter_map(Outbound::last_ring).min());
        }
        points::reach("park: awake");
        for link in self.pool.links() {
            link.lower();
        }
        self.poll_events();
    }
}
