//! How a sender comes by a free slot when it knows of none: it looks, and grows.

use std::time::Instant;

use fbuf_core::send::{link::Outbound, pool::Lack};

use super::{AllocateError, Sender};
use crate::{
    client::ClientFailed,
    wait::{Batching, LATE, Progress},
};

impl Sender {
    /// Looks for a slot that is free although it is not its turn, or is new.
    pub(super) fn find_slot(&mut self, may_grow: bool) -> bool {
        self.pool.notice_leaving();
        self.fetch_rights();
        // A lossy sender looks but once.
        let found = if self.pool.is_lossy() { self.pool.search_all() } else { self.pool.search() };
        if !found && may_grow {
            self.grow();
        }
        self.collect()
    }

    /// Before a lossy sender sends: looks around when a round of slots is used up, and grows rather than leave a message out.
    pub(super) fn make_room(&mut self) {
        if self.pool.is_dry() {
            self.look_ahead();
        }
        let is_due = self.next_growth.is_none_or(|at| at <= Instant::now());
        if self.may_grow() && is_due && self.pool.is_short() {
            let growths = self.counters.growths;
            self.grow();
            self.next_growth = (self.counters.growths == growths).then(|| Instant::now() + LATE);
        }
    }

    /// Looks whether the slots are free whose turn it is.
    pub(super) fn collect(&mut self) -> bool {
        let found = self.pool.collect(self.pace.round());
        if found {
            self.slot_deadlines = None;
        }
        found
    }

    /// Adds a segment, or goes on adding the last one: its slots are used once every receiver knows
    /// of it. That it cannot be is no error: there are slots, and they come back.
    pub(super) fn grow(&mut self) {
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

    /// Why there is no slot although not all are in use.
    pub(super) fn lack(&self) -> Option<AllocateError> {
        let room = || self.pool.lacks_room().map(AllocateError::from);
        self.lack_of_slot().or_else(|| self.lack_of_descriptor()).or_else(room)
    }

    /// Whether no more receivers can come.
    pub(super) fn lack_of_client(&self) -> Option<ClientFailed> {
        (self.expected.is_empty() && self.pending_links.is_over()).then_some(ClientFailed)
    }

    /// What there is not enough of for a slot that is free.
    pub(super) fn lack_of_slot(&self) -> Option<AllocateError> {
        if self.pool.is_receivers()
            && self.receivers() == 0
            && let Some(failed) = self.lack_of_client()
        {
            return Some(failed.into());
        }
        let bytes = self.pool.capacity() as usize;
        Some(match self.pool.lack()? {
            Lack::Memory(shortage) => AllocateError::NoMemory { bytes, shortage },
            Lack::Descriptors => AllocateError::NoDescriptor { bytes },
            Lack::Permission => AllocateError::NotPermitted { bytes },
            Lack::Proc => AllocateError::NoProc { bytes },
            Lack::Refused { call, errno } => AllocateError::Refused { bytes, call, code: errno as i32 },
        })
    }

    /// Whether a receiver gives a slot for which this process has no descriptor.
    pub(super) fn lack_of_descriptor(&self) -> Option<AllocateError> {
        let lacks = self.pool.links().iter().any(Outbound::lacks_descriptor);
        lacks.then(|| AllocateError::NoDescriptor { bytes: self.pool.capacity() as usize })
    }

    /// Waits until half of the slots are back, as long as they keep coming.
    pub(super) fn gather_slots(&mut self) {
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
}
