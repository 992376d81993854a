//! Asking clients to report what their endpoints do.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, futures::OwnedNotified},
    time::timeout,
};

use super::{Broker, Inner, LOOKS, lock};
use crate::state::ClientId;

/// How long clients have for a report that somebody wants to see, and how often they are asked for one at most.
const REPORT_TIME: Duration = Duration::from_millis(200);
const REPORT_PAUSE: Duration = Duration::from_millis(400);

/// How many clients were asked to report and have not answered: of each user, and of all. An answer is one look here, however many
/// clients and waiting requests there are; those that wait are woken by the last answer only.
#[derive(Debug, Default)]
pub(super) struct Unanswered(BTreeMap<Option<u32>, Open>);

/// Questions that are open, and what is notified when none is.
#[derive(Debug, Default)]
struct Open {
    count: usize,
    none: Arc<Notify>,
}

impl Unanswered {
    /// A client of this user was asked.
    fn ask(&mut self, user: u32) {
        [None, Some(user)].into_iter().for_each(|of| self.0.entry(of).or_default().count += 1);
    }

    /// A client of this user that was asked has answered.
    fn answer(&mut self, user: u32) {
        for of in [None, Some(user)] {
            let Some(open) = self.0.get_mut(&of) else { continue };
            open.count -= 1;
            if open.count == 0 {
                open.none.notify_waiters();
                self.0.remove(&of);
            }
        }
    }

    /// If clients of a user, or of all, have not answered: what waits until they have.
    fn wait(&self, user: Option<u32>) -> Option<OwnedNotified> {
        // It is notified from now on, not only once it is polled.
        self.0.get(&user).map(|open| open.none.clone().notified_owned())
    }
}

impl Inner {
    /// Has all clients of a user, or of all, report that have endpoints and were not asked since this moment; or says how
    /// long to wait until all may be asked again. Also at how many clients it has looked.
    fn ask(&mut self, user: Option<u32>, since: Instant) -> (Option<Duration>, usize) {
        let (now, mut pause, mut looks) = (Instant::now(), None, 0);
        for (client, of) in self.state.with_endpoints(user) {
            looks += 1;
            let (asked, open) = self.asked.get(&client).copied().unzip();
            let rest = match asked {
                Some(at) if at >= since => continue,
                Some(at) => (at + REPORT_PAUSE).saturating_duration_since(now),
                None => Duration::ZERO,
            };
            if !rest.is_zero() {
                pause = pause.max(Some(rest));
            } else if let Some(mailbox) = self.mailboxes.get(&client) {
                mailbox.ask();
                if open.flatten().is_none() {
                    self.unanswered.ask(of);
                }
                self.asked.insert(client, (now, Some(of)));
            }
        }
        (pause, looks)
    }

    /// A client has reported, or has gone.
    pub(super) fn note_answer(&mut self, client: ClientId) {
        if let Some(user) = self.asked.get_mut(&client).and_then(|(_, open)| open.take()) {
            self.unanswered.answer(user);
        }
    }
}

impl Broker {
    /// Asks all clients of a user, or of all, to report, and gives them a moment for it. Requests that come at once are served
    /// together; no client is asked all the time, or for a user that may not see the answer. The looks are work of the client that
    /// asks, if one does.
    pub(super) async fn ask_for_reports(&self, user: Option<u32>, by: Option<ClientId>) {
        let came = Instant::now();
        loop {
            let pause = {
                let mut inner = lock(&self.0);
                let (pause, looks) = inner.ask(user, came);
                if let Some(client) = by {
                    inner.state.note_work(client, looks / LOOKS, Instant::now());
                }
                pause
            };
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                None => break,
            }
        }
        let all = async {
            loop {
                let next = lock(&self.0).unanswered.wait(user);
                let Some(next) = next else { return };
                next.await;
            }
        };
        // Clients that take longer are seen as they last were.
        let _ = timeout(REPORT_TIME, all).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::Pin,
        task::{Context, Poll, Waker},
    };

    use super::*;

    #[test]
    fn those_that_wait_for_reports_are_woken_by_the_last_answer_and_not_by_each() {
        let mut unanswered = Unanswered::default();
        [1, 1, 1, 2].into_iter().for_each(|user| unanswered.ask(user));
        let mut waits = [Some(1), Some(2), None].map(|of| Box::pin(unanswered.wait(of).unwrap()));
        let mut woken = || {
            let mut context = Context::from_waker(Waker::noop());
            waits.each_mut().map(|wait| Pin::new(wait).poll(&mut context) == Poll::Ready(()))
        };
        unanswered.answer(1);
        unanswered.answer(1);
        assert_eq!(woken(), [false; 3]);
        unanswered.answer(1);
        assert_eq!(woken(), [true, false, false]);
        assert!(unanswered.wait(Some(1)).is_none() && unanswered.wait(Some(3)).is_none());
        unanswered.answer(2);
        assert!(unanswered.wait(None).is_none());
    }
}
