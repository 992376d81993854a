//! How a sender waits: for a slot, for receivers, for what it has lent.

use std::time::{Duration, Instant};

#[cfg(feature = "tokio")]
use fbuf_core::send::fbuf::Fbuf;
use fbuf_core::{
    points,
    send::{
        link::{Expected, Outbound},
        pool::Looks,
    },
};

use super::{AllocateError, Sender, WaitError};
use crate::{
    guard::{self, Endpoint, Unmet},
    sockets::Sockets,
    wait::{FOR_EVER, LATE, UNSURE, Waiting, deadline},
};

/// What a sender waits for outside of this library ([`Sender::prepare_wait`]), and how it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum WaitFor {
    /// A free slot: [`Sender::try_allocate`].
    Slot,
    /// So many receivers that are linked: [`Sender::receivers`].
    Receivers(usize),
    /// That every receiver has handed back everything it was given: [`Sender::has_all_back`].
    Returns,
}

/// What a sender does when it has had no slot for long.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlotDeadlines {
    /// When to grow, or to try it again.
    grow_at: Option<Instant>,
    /// When to disconnect those that hold it up.
    disconnect_at: Option<Instant>,
}

impl Sender {
    pub(super) fn wait_for_slot(&mut self, deadline: Option<Instant>) -> Result<(), AllocateError> {
        self.counters.waits += 1;
        self.await_event(WaitFor::Slot);
        let waiting = self.waiting(deadline);
        if waiting.looks() && self.batching.is_worthwhile(self.pool.next_sequence()) {
            self.gather_slots();
        }
        self.slot_deadlines = Some(self.slot_deadlines());
        match guard::wait(self, waiting, |sender, thorough| sender.attempt(thorough).into()) {
            Ok(result) => result,
            Err(Unmet::Interrupted) => Err(AllocateError::Interrupted),
            Err(Unmet::Expired) => {
                if self.grows_late && self.may_grow() {
                    self.grow();
                    if self.collect() {
                        return Ok(());
                    }
                }
                let has_any = !self.pool.is_receivers() || self.receivers() > 0;
                let full = AllocateError::TimedOut { slots: if has_any { self.pool.slots() as usize } else { 0 } };
                Err(self.lack_of_slot().or(self.pool.lacks_room().map(AllocateError::from)).unwrap_or(full))
            }
        }
    }

    /// Looks for a slot: it is known then, or why there is none.
    fn attempt(&mut self, thorough: bool) -> Option<Result<(), AllocateError>> {
        if thorough {
            self.pool.notice_leaving();
            self.fetch_rights();
        }
        let is_back = thorough && self.pool.search() || self.pool.is_back(0);
        if is_back && self.collect() {
            return Some(Ok(()));
        }
        if thorough && self.lose_patience() && self.pool.search() && self.collect() {
            return Some(Ok(()));
        }
        let lack = self.lack_of_slot();
        // What would wake it is there, and cannot be read.
        lack.or_else(|| thorough.then(|| self.lack_of_descriptor()).flatten()).map(Err)
    }

    fn slot_deadlines(&self) -> SlotDeadlines {
        SlotDeadlines {
            grow_at: self.grows_late.then(|| Instant::now() + LATE),
            disconnect_at: self.disconnect_after.and_then(deadline),
        }
    }

    /// Whether the pool can have more slots, or is about to.
    pub(super) fn may_grow(&self) -> bool {
        self.pool.can_grow() || self.pool.is_growing()
    }

    /// Does what is to be done when there was no slot for so long: whether it was time.
    pub(super) fn lose_patience(&mut self) -> bool {
        let Some(SlotDeadlines { grow_at, disconnect_at }) = self.slot_deadlines else { return false };
        if grow_at.is_none() && disconnect_at.is_none() {
            return false;
        }
        let is_over = |at: Option<Instant>| at.is_some_and(|at| Instant::now() >= at);
        let (grows, disconnects) = (is_over(grow_at), is_over(disconnect_at));
        if grows || disconnects {
            let SlotDeadlines { grow_at: next_growth, disconnect_at: next_disconnection } = self.slot_deadlines();
            self.slot_deadlines = Some(SlotDeadlines {
                grow_at: if grows { next_growth } else { grow_at },
                disconnect_at: if disconnects { next_disconnection } else { disconnect_at },
            });
        }
        if let Some(time) = self.disconnect_after.filter(|_| disconnects) {
            self.drop_holders(time);
        }
        if grows && self.may_grow() {
            self.grow();
        }
        grows || disconnects
    }

    pub(super) fn wait_until_returned(&mut self, deadline: Option<Instant>) -> Result<(), WaitError> {
        self.generation.check()?;
        self.await_event(WaitFor::Returns);
        let waiting = self.waiting(deadline);
        let is_done = |sender: &mut Self, thorough| sender.is_done(thorough).then_some(()).into();
        guard::wait(self, waiting, is_done).map_err(|unmet| match unmet {
            Unmet::Interrupted => WaitError::Interrupted,
            Unmet::Expired => WaitError::StillLent { slots: self.pool.places().lent },
        })?;
        self.poll_events();
        Ok(())
    }

    /// Whether all that was lent is back.
    fn is_done(&mut self, thorough: bool) -> bool {
        if thorough {
            self.pool.forget_parted(&mut Looks::of_call());
        }
        self.has_all_back()
    }

    pub(super) fn wait_until_linked(&mut self, wanted: usize, deadline: Option<Instant>) -> Result<usize, WaitError> {
        self.generation.check()?;
        self.await_event(WaitFor::Receivers(wanted));
        self.poll_events();
        let waiting = self.waiting(deadline);
        let linked = |sender: &mut Self, _| {
            let linked = Some(sender.receivers()).filter(|&linked| linked >= wanted);
            linked.map(Ok).or_else(|| sender.lack_of_client().map(Err)).into()
        };
        match guard::wait(self, waiting, linked) {
            Ok(linked) => Ok(linked?),
            Err(Unmet::Interrupted) => Err(WaitError::Interrupted),
            Err(Unmet::Expired) => {
                let failure = self.pending_links.failure();
                Err(WaitError::TimedOut { wanted, linked: self.receivers(), failure })
            }
        }
    }

    /// What [`Self::allocate`] returns, if that would not wait.
    #[cfg(feature = "tokio")]
    pub(crate) fn slot(&mut self) -> Result<Option<Fbuf>, AllocateError> {
        match self.try_allocate() {
            Ok(None) if self.pool.is_lossy() => Err(AllocateError::WouldWait { slots: self.pool.slots() as usize }),
            // They pass when receivers read.
            Err(AllocateError::NoRoom { .. } | AllocateError::UnderWay) => Ok(None),
            slot => slot,
        }
    }

    /// What [`Self::wait_for_receivers`] returns, if that would not wait.
    #[cfg(feature = "tokio")]
    pub(crate) fn linked(&mut self, wanted: usize) -> Result<Option<usize>, WaitError> {
        self.generation.check()?;
        self.poll_events();
        let linked = self.receivers();
        match self.lack_of_client() {
            _ if linked >= wanted => Ok(Some(linked)),
            Some(failed) => Err(failed.into()),
            None => Ok(None),
        }
    }

    /// What [`Self::wait_for_returns`] returns, if that would not wait.
    #[cfg(feature = "tokio")]
    pub(crate) fn returned(&mut self) -> Result<Option<()>, WaitError> {
        self.generation.check()?;
        self.poll_events();
        Ok(self.is_done(true).then_some(()))
    }

    /// From now on it waits for this.
    pub(crate) fn await_event(&mut self, what: WaitFor) {
        if self.is_armed {
            // For what it was left armed.
            self.poll_events();
        }
        self.awaits = what;
    }

    /// After which time to look again although nothing has happened.
    fn retry_after(&self) -> Option<Duration> {
        let (is_blocked, lacks_room) = (self.pool.is_blocked(), || self.pool.lacks_room().is_some());
        let left = |at: Option<Instant>| at.map(|at| at.saturating_duration_since(Instant::now()));
        match (self.awaits, self.slot_deadlines) {
            (WaitFor::Receivers(_), _) => None,
            (WaitFor::Returns, _) => is_blocked.then_some(LATE),
            (WaitFor::Slot, slot_deadlines) => {
                let passes = (is_blocked || lacks_room()).then_some(LATE);
                let growth =
                    slot_deadlines.filter(|_| self.may_grow()).and_then(|slot_deadlines| left(slot_deadlines.grow_at));
                let disconnection = slot_deadlines.and_then(|slot_deadlines| left(slot_deadlines.disconnect_at));
                [passes, growth, disconnection].into_iter().flatten().min()
            }
        }
    }

    /// Whether receivers have to ring for it.
    fn hears_bells(&self) -> bool {
        !matches!(self.awaits, WaitFor::Receivers(_))
    }

    pub(super) fn lower(&mut self) {
        if std::mem::take(&mut self.is_armed) {
            if self.hears_bells() {
                self.pool.links().iter().for_each(Outbound::lower);
            }
            self.sockets.stop_timer();
        }
    }
}

impl Endpoint for Sender {
    fn sockets(&self) -> &Sockets {
        &self.sockets
    }

    fn waiting(&self, deadline: Option<Instant>) -> Waiting {
        if !self.hears_bells() {
            // Nothing in memory says that a receiver has come: to look would be in vain.
            return Waiting::asleep(deadline);
        }
        let links = self.pool.links().len();
        Waiting::new(self.same_cpu.wait(self.wait, links), self.spin_budget, deadline).among(links)
    }

    fn is_behind(&self) -> bool {
        !self.ready.is_empty() || self.is_searching || self.pending_links.has_new_links()
    }

    fn look(&mut self) {
        self.poll_events();
    }

    fn has_news(&mut self, thorough: bool) -> bool {
        if !self.generation.is_current() {
            return true;
        }
        match self.awaits {
            WaitFor::Slot => {
                if self.slot_deadlines.is_none() {
                    if self.collect_or_find(!self.grows_late) {
                        return true;
                    }
                    self.slot_deadlines = Some(self.slot_deadlines());
                }
                self.attempt(thorough).is_some()
            }
            WaitFor::Receivers(count) => self.receivers() >= count,
            WaitFor::Returns => self.is_done(thorough),
        }
    }

    fn raise(&mut self) -> bool {
        self.is_armed = true;
        if self.hears_bells() {
            self.pool.links().iter().for_each(Outbound::raise);
            points::reach("park: raised");
        }
        self.hears_bells()
    }

    fn look_again(&mut self) -> Option<Duration> {
        self.pool.notice_leaving();
        let there = match self.awaits {
            // A slot that is put back by a thread of this process wakes it as well.
            WaitFor::Slot => self.pool.search_all() || !self.pool.await_fbufs(),
            WaitFor::Receivers(count) => self.receivers() >= count,
            WaitFor::Returns => self.is_done(true),
        };
        if there {
            return None;
        }
        if self.hears_bells() {
            self.counters.sleeps += 1;
            points::reach("park: about to sleep");
        }
        let unanswered = self.expected.iter().any(Expected::is_unanswered).then_some(UNSURE);
        Some([unanswered, self.retry_after()].into_iter().flatten().min().unwrap_or(FOR_EVER))
    }

    fn wake(&mut self, slept: bool) {
        if slept && self.hears_bells() {
            // The receiver that rang last has most likely woken it.
            self.spin_budget.learn(self.pool.links().iter().filter_map(Outbound::last_ring).min());
        }
        self.poll_events();
    }
}
