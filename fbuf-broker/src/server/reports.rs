//! Asking clients to report what their endpoints do.

use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::{Broker, Inner, lock};
use crate::state::ClientId;

/// How long clients have for a report that somebody wants to see, and how often they are asked for one at most.
const REPORT_TIME: Duration = Duration::from_millis(200);
const REPORT_PAUSE: Duration = Duration::from_millis(400);

impl Inner {
    /// Has all clients of a user, or of all, report that have endpoints and were not asked since this moment; or says how
    /// long to wait until all may be asked again.
    fn ask(&mut self, user: Option<u32>, since: Instant) -> Option<Duration> {
        let (now, mut pause) = (Instant::now(), None);
        for client in self.state.with_endpoints(user) {
            let rest = match self.asked.get(&client) {
                Some((at, _)) if *at >= since => continue,
                Some((at, _)) => (*at + REPORT_PAUSE).saturating_duration_since(now),
                None => Duration::ZERO,
            };
            if !rest.is_zero() {
                pause = pause.max(Some(rest));
            } else if let Some(mailbox) = self.mailboxes.get(&client) {
                mailbox.ask();
                self.asked.insert(client, (now, true));
            }
        }
        pause
    }

    /// Whether a client of a user, or of all, was asked and has not answered.
    fn awaits(&self, user: Option<u32>) -> bool {
        self.state.with_endpoints(user).any(|client| self.asked.get(&client).is_some_and(|&(_, open)| open))
    }

    /// A client has reported, or has gone.
    pub(super) fn note_answer(&mut self, client: ClientId) {
        if let Some((_, open)) = self.asked.get_mut(&client)
            && std::mem::take(open)
        {
            self.reported.notify_waiters();
        }
    }
}

impl Broker {
    /// Asks all clients of a user, or of all, to report, and gives them a moment for it. Requests that come at once are served
    /// together; no client is asked all the time, or for a user that may not see the answer.
    pub(super) async fn ask_for_reports(&self, user: Option<u32>) {
        let came = Instant::now();
        loop {
            let pause = lock(&self.0).ask(user, came);
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                None => break,
            }
        }
        let reported = lock(&self.0).reported.clone();
        let all = async {
            loop {
                // Before the look, so that no report is missed in between.
                let next = reported.notified();
                if !lock(&self.0).awaits(user) {
                    return;
                }
                next.await;
            }
        };
        // Clients that take longer are seen as they last were.
        let _ = timeout(REPORT_TIME, all).await;
    }
}
