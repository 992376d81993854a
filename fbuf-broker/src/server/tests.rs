//! What requests cost their user beside that they are requests.

use std::time::Duration;

use fbuf_core::{
    peer::{Credentials, LinkId},
    protection::Protection,
};
use fbuf_protocol::{Control, Limits, Open, Page, PreviousRegistration, Report, Role, Secret};

use super::*;
use crate::{policy::Quota, policy::User};

const USER: u32 = 1000;

/// A broker at which a user may make one request in a second, and that user's clients, each with an endpoint.
fn broker(clients: usize) -> (Broker, Vec<Session>) {
    let broker = Broker::new(Policy::only(USER).with_quota(Quota::default().with_requests_per_second(1)));
    let process = Credentials::new(1, USER, USER);
    let sessions = (0..clients).map(|_| {
        let mut inner = lock(&broker.0);
        let admission = inner.state.admit(process, User::new(USER, vec![USER])).unwrap();
        let client = inner.state.join(admission).unwrap();
        inner.state.open(client, 1, open(None)).unwrap();
        inner.state.take_looks();
        Session { broker: broker.clone(), client, process, program: Program::default(), mailbox: Arc::default() }
    });
    let sessions = sessions.collect();
    (broker, sessions)
}

fn open(earlier: Option<PreviousRegistration>) -> Open {
    let role = Role::Receiver { require: Protection::Volatile, accepts: Limits::DEFAULT };
    Open { channel: "c".into(), role, label: None, users: None, earlier }
}

/// For how many requests the next one of this client's user waits.
fn work(session: &Session) -> u64 {
    let inner = lock(&session.broker.0);
    let (payer, now) = (inner.state.payer(session.client).unwrap(), Instant::now());
    // Rounded: a second is a request, of which one may be made at once.
    (inner.state.note_request(&payer, now) - now + Duration::from_millis(500)).as_secs()
}

/// What is done when it is first asked for.
fn at_once(request: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(request);
}

fn context() -> tarpc::context::Context {
    tarpc::context::current()
}

#[test]
fn a_full_report_is_as_much_work_as_a_request() {
    let (_broker, sessions) = broker(1);
    let report = || Page::split(&[(1, Report::default()); MAX_PAGE]).next().unwrap();
    let before = work(&sessions[0]);
    (0..10).for_each(|_| at_once(sessions[0].clone().report(context(), report(), false)));
    assert_eq!(work(&sessions[0]) - before, 10 + 1);
}

#[test]
fn to_ask_for_reports_is_as_much_work_as_there_are_clients_to_be_looked_at() {
    let (broker, sessions) = broker(3 * LOOKS);
    let before = work(&sessions[0]);
    at_once(broker.ask_for_reports(Some(USER), Some(sessions[0].client)));
    assert_eq!(work(&sessions[0]) - before, 3 + 1);
}

#[test]
fn to_name_links_of_before_is_work() {
    let (_broker, sessions) = broker(1);
    let before = work(&sessions[0]);
    let links = (0..5 * LOOKS as u64).map(LinkId::from_bits).collect();
    let earlier = PreviousRegistration { secret: Secret::draw().unwrap(), links };
    sessions[0].open_here(2, open(Some(earlier))).unwrap();
    assert_eq!(work(&sessions[0]) - before, 5 + 1);
}
