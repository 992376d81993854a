//! How a receiver waits for a message.

use std::time::{Duration, Instant};

use fbuf_core::{
    points,
    receive::{
        link::{Greeted, Inbound},
        received::Received,
    },
};

use super::{GetError, Receiver};
use crate::{
    guard::{self, Attempt, Endpoint, Unmet},
    sockets::Sockets,
    wait::{Batching, FOR_EVER, Progress, UNSURE, Waiting},
};

impl Receiver {
    pub(super) fn wait_for_message(&mut self, deadline: Option<Instant>) -> Result<Received, GetError> {
        let waiting = self.waiting(deadline);
        if waiting.looks()
            && self.batching.is_worthwhile(self.messages())
            && let Some(link) = self.links.first()
        {
            self.batching.wait(Batching::RECEIVER_TIME, || match link.has_more_than(Batching::MESSAGES) {
                true => Progress::Enough,
                false => Progress::Nothing,
            });
        }
        match guard::wait(self, waiting, Self::attempt) {
            Ok(result) => result,
            Err(Unmet::Interrupted) => Err(GetError::Interrupted),
            Err(Unmet::Expired) => {
                // The last word is with the sockets: news may have come while it did not sleep.
                self.look();
                self.next().unwrap_or(Err(GetError::TimedOut))
            }
        }
    }

    fn attempt(&mut self, thorough: bool) -> Attempt<Result<Received, GetError>> {
        let ready = self.is_ready();
        if ready && let Some(received) = self.take() {
            return Attempt::Found(Ok(received));
        }
        // What is ready and cannot be taken now may not be had for long.
        match (ready || thorough).then(|| self.next()).flatten() {
            Some(result) => Attempt::Found(result),
            None if ready => Attempt::Stuck,
            None => Attempt::Nothing,
        }
    }

    /// Gives back what could not be given back before: whether nothing is left of it.
    pub(super) fn settle(&self) -> bool {
        self.links.iter().filter(|link| !link.settle()).count() == 0
    }

    /// Whether a message waits.
    fn is_ready(&self) -> bool {
        self.links.iter().any(Inbound::is_ready)
    }

    /// Ends the sleep for which it was left armed.
    pub(super) fn disarm(&mut self) {
        if self.is_armed {
            self.wake(false);
        }
    }

    pub(super) fn lower(&mut self) {
        if std::mem::take(&mut self.is_armed) {
            self.links.iter().for_each(Inbound::lower);
            self.sockets.stop_timer();
        }
    }
}

impl Endpoint for Receiver {
    fn sockets(&self) -> &Sockets {
        &self.sockets
    }

    fn waiting(&self, deadline: Option<Instant>) -> Waiting {
        let links = self.links.len();
        Waiting::new(self.same_cpu.wait(self.wait, links), self.spin_budget, deadline).among(links)
    }

    fn is_behind(&self) -> bool {
        self.unread || !self.ready.is_empty() || self.pending_links.has_new_links()
    }

    fn look(&mut self) {
        Self::look(self);
    }

    fn has_news(&mut self, thorough: bool) -> bool {
        if self.is_ready() || !self.generation.is_current() {
            return true;
        }
        thorough && {
            self.tidy();
            !self.troubles.is_empty() || self.obstacle().is_some()
        }
    }

    fn raise(&mut self) -> bool {
        self.is_armed = true;
        self.links.iter().for_each(Inbound::raise);
        points::reach("park: raised");
        !self.links.is_empty()
    }

    fn look_again(&mut self) -> Option<Duration> {
        let settled = self.settle() && !self.greeted.iter().any(Greeted::is_unsaid);
        if self.links.iter().any(|link| link.is_ready() || link.is_over()) || self.is_behind() {
            return None;
        }
        self.sleeps += 1;
        self.say();
        points::reach("park: about to sleep");
        Some(if settled { FOR_EVER } else { UNSURE })
    }

    fn leave(&mut self) {
        // Taken simply, the next messages would leave flags raised, at which their senders look twice.
        self.begin_round(0);
    }

    fn wake(&mut self, slept: bool) {
        self.lower();
        // A message is taken first: the bell that told of it can be read when there is time.
        let link = self.links.iter().find(|link| link.is_ready());
        self.unread = link.is_some();
        match link {
            Some(link) if slept => self.spin_budget.learn(link.last_ring()),
            Some(_) => {}
            None => Self::look(self),
        }
    }
}
