//! What is seen, line by line: of each endpoint, or of all endpoints of a channel or of a client together.

use std::collections::{BTreeMap, BTreeSet};

use fbuf_client::{ClientStatus, EndStatus, EndpointStatus, Oldest, Report};

use super::{Rates, age, columns::Column, is_suspect, number, protection, role, short};

/// What there is a line for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum By {
    Endpoint,
    Channel,
    Client,
}

/// What a line is about.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Subject {
    Endpoint(Box<EndpointStatus>),
    Channel { channel: String, senders: usize, receivers: usize },
    Client { client: ClientStatus, channels: usize },
}

/// What is seen of one endpoint, or of several together.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    pub(super) subject: Subject,
    /// What is reported; none if nobody has answered.
    pub(super) report: Option<Report>,
    /// What was reported a look before.
    before: Report,
    /// Whether a message may have been forgotten.
    pub(super) is_suspect: bool,
}

/// An endpoint, and what it had reported a look before.
pub(super) type Watched = (EndpointStatus, Option<Report>);

/// A line for each, in the order in which a person looks for them.
pub(super) fn lines(by: By, endpoints: &[Watched], clients: &[ClientStatus]) -> Vec<Line> {
    match by {
        By::Endpoint => of_endpoints(endpoints),
        By::Channel => of_channels(endpoints),
        By::Client => of_clients(endpoints, clients),
    }
}

fn of_endpoints(endpoints: &[Watched]) -> Vec<Line> {
    let mut endpoints: Vec<_> = endpoints.iter().collect();
    endpoints.sort_by(|(one, _), (other, _)| {
        (&one.channel, role(other.end), one.number).cmp(&(&other.channel, role(one.end), other.number))
    });
    let line = |watched: &Watched| {
        together(Subject::Endpoint(Box::new(watched.0.clone())), std::iter::once(watched), |_| true)
    };
    endpoints.into_iter().map(line).collect()
}

fn of_channels(endpoints: &[Watched]) -> Vec<Line> {
    let mut channels: BTreeMap<&str, Vec<&Watched>> = BTreeMap::new();
    for watched in endpoints {
        channels.entry(&watched.0.channel).or_default().push(watched);
    }
    let line = |(channel, ends): (&str, Vec<&Watched>)| {
        let senders = ends.iter().filter(|(endpoint, _)| is_sender(endpoint)).count();
        let subject = Subject::Channel { channel: channel.to_owned(), senders, receivers: ends.len() - senders };
        // What receivers get is what senders have sent, which may be of another user, or silent.
        let has_sender = ends.iter().any(|(endpoint, _)| is_sender(endpoint) && endpoint.report.is_some());
        together(subject, ends.into_iter(), |endpoint| !has_sender || is_sender(endpoint))
    };
    channels.into_iter().map(line).collect()
}

fn of_clients(endpoints: &[Watched], clients: &[ClientStatus]) -> Vec<Line> {
    let mut clients = clients.to_vec();
    clients.sort_by_key(|client| (client.process.pid, client.number));
    let mut of: BTreeMap<u64, Vec<&Watched>> = BTreeMap::new();
    for watched in endpoints {
        of.entry(watched.0.client).or_default().push(watched);
    }
    let line = |client: ClientStatus| {
        let ends = of.remove(&client.number).unwrap_or_default();
        let channels = ends.iter().map(|(endpoint, _)| &endpoint.channel).collect::<BTreeSet<_>>().len();
        together(Subject::Client { client, channels }, ends.into_iter(), |_| true)
    };
    clients.into_iter().map(line).collect()
}

fn is_sender(endpoint: &EndpointStatus) -> bool {
    matches!(endpoint.end, EndStatus::Sender { .. })
}

/// A line about several endpoints: what all of them hold, and what those exchange that count.
fn together<'a>(
    subject: Subject,
    endpoints: impl Iterator<Item = &'a Watched>,
    counts: impl Fn(&EndpointStatus) -> bool,
) -> Line {
    let mut line = Line { subject, report: None, before: Report::default(), is_suspect: false };
    for (endpoint, before) in endpoints {
        let Some(report) = &endpoint.report else { continue };
        let counts = counts(endpoint);
        add(line.report.get_or_insert_default(), report, counts);
        // Of one that had not answered then, nothing is known to have changed.
        add(&mut line.before, before.as_ref().unwrap_or(report), counts);
        line.is_suspect |= is_suspect(report);
    }
    line
}

/// What a client reports is anything.
fn add(sum: &mut Report, report: &Report, counts: bool) {
    let age = |oldest: &Option<Oldest>| oldest.map(|oldest| (oldest.milliseconds, oldest.behind));
    sum.oldest = std::cmp::max_by_key(sum.oldest, report.oldest, age);
    sum.waits = sum.waits.saturating_add(report.waits);
    sum.sleeps = sum.sleeps.saturating_add(report.sleeps);
    sum.violations = sum.violations.saturating_add(report.violations);
    sum.slots = sum.slots.saturating_add(report.slots);
    sum.held = sum.held.saturating_add(report.held);
    if counts {
        sum.links = sum.links.saturating_add(report.links);
        sum.messages = sum.messages.saturating_add(report.messages);
        sum.bytes = sum.bytes.saturating_add(report.bytes);
        sum.left_out = sum.left_out.saturating_add(report.left_out);
    }
}

impl By {
    /// The next, over and over.
    pub(super) fn next(self) -> Self {
        match self {
            Self::Endpoint => Self::Channel,
            Self::Channel => Self::Client,
            Self::Client => Self::Endpoint,
        }
    }

    /// What lines begin with: the head of each column, and how important it is.
    fn subjects(self) -> &'static [(&'static str, u8)] {
        match self {
            Self::Endpoint => &[
                ("channel", 9),
                ("end", 8),
                ("process", 6),
                ("program", 5),
                ("label", 7),
                ("user", 2),
                ("protection", 2),
            ],
            Self::Channel => &[("channel", 9), ("senders", 6), ("receivers", 6)],
            Self::Client => &[("process", 9), ("program", 7), ("user", 6), ("endpoints", 5), ("channels", 4)],
        }
    }

    /// The heads of all columns, for numbers that count from the beginning.
    pub(super) fn heads(self) -> Vec<&'static str> {
        let numbers = ["links", "messages", "bytes", "waits", "sleeps", "left out", "slots", "held", "violations"];
        self.subjects().iter().map(|&(head, _)| head).chain(numbers).chain(["oldest held"]).collect()
    }

    /// The same for numbers by the second.
    pub(super) fn columns(self) -> Vec<Column> {
        let rates = [("messages/s", 8), ("bytes/s", 7), ("waits/s", 1), ("sleeps/s", 1), ("left out/s", 3)];
        let numbers = [("slots", 4), ("held", 5), ("violations", 3), ("oldest held", 4)];
        let all = self.subjects().iter().copied().chain([("links", 5)]).chain(rates).chain(numbers);
        all.map(|(head, importance)| Column { head, importance }).collect()
    }
}

impl Line {
    /// The cells under [`By::heads`].
    pub(super) fn cells(&self) -> Vec<String> {
        self.with(|report| {
            let Report { messages, bytes, waits, sleeps, left_out, .. } = report;
            [messages, bytes, waits, sleeps, left_out].map(|&number| short(number as f64))
        })
    }

    /// What has changed by the second, so many seconds after the look before.
    pub(super) fn rates(&self, seconds: f64) -> Rates {
        self.report.map_or_else(Rates::default, |report| Rates::between(&self.before, &report, seconds))
    }

    /// The cells under [`By::columns`].
    pub(super) fn cells_of_rates(&self, seconds: f64) -> Vec<String> {
        let Rates { messages, bytes, waits, sleeps, left_out } = self.rates(seconds);
        self.with(|_| [messages, bytes, waits, sleeps, left_out].map(short))
    }

    fn with(&self, exchanged: impl Fn(&Report) -> [String; 5]) -> Vec<String> {
        let mut cells = match &self.subject {
            Subject::Endpoint(endpoint) => {
                let EndpointStatus { process, program, label, channel, end, .. } = &**endpoint;
                let (process, user) = (number(*process), process.uid.to_string());
                let label = label.as_ref().map_or(String::new(), ToString::to_string);
                vec![channel.clone(), role(*end).into(), process, program.to_string(), label, user, protection(*end)]
            }
            Subject::Channel { channel, senders, receivers } => {
                vec![channel.clone(), senders.to_string(), receivers.to_string()]
            }
            Subject::Client { client: ClientStatus { process, program, endpoints, .. }, channels } => {
                let [user, endpoints, channels] =
                    [process.uid.into(), *endpoints, *channels as u64].map(|n| n.to_string());
                vec![number(*process), program.to_string(), user, endpoints, channels]
            }
        };
        let Some(report) = &self.report else { return cells };
        cells.push(report.links.to_string());
        cells.extend(exchanged(report));
        cells.extend([report.slots, report.held, report.violations].map(|number| short(number as f64)));
        cells.push(age(report.oldest) + if self.is_suspect { ", forgotten?" } else { "" });
        cells
    }

    /// What stands in the place of numbers.
    pub(super) fn note(&self) -> Option<&'static str> {
        (self.report.is_none() && !self.is_idle()).then_some("does not answer")
    }

    /// Whether there is no process that could answer.
    pub(super) fn is_idle(&self) -> bool {
        matches!(&self.subject, Subject::Client { client, .. } if client.endpoints == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fbuf_client::{Credentials, Mechanism, Program, Protection};
    use fbuf_protocol as protocol;

    fn endpoint(number: u64, channel: &str, sends: bool, report: protocol::Report) -> Watched {
        let end = match sends {
            true => protocol::EndStatus::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Shared },
            false => protocol::EndStatus::Receiver { require: Protection::Volatile },
        };
        let process = Credentials::new(10, 1000, 1000);
        let before = Some(protocol::Report { messages: 0, ..report }.into());
        let (client, channel, report) = (1, channel.to_owned(), Some(report));
        let status = protocol::EndpointStatus {
            number,
            endpoint: number,
            process,
            program: protocol::Wire(Program::from_bytes(b"ffmpeg")),
            label: None,
            client,
            channel,
            end,
            unpaired: 0,
            first_unpaired: None,
            report,
        };
        (status.into(), before)
    }

    fn seen() -> Vec<Watched> {
        let oldest = |milliseconds| Some(protocol::Oldest { sequence: 1, behind: 5, milliseconds });
        let receives = |oldest| protocol::Report {
            messages: 60,
            links: 1,
            held: 2,
            left_out: 40,
            oldest,
            ..protocol::Report::default()
        };
        let sends = protocol::Report {
            messages: 100,
            links: 2,
            slots: 8,
            left_out: 80,
            waits: 3,
            ..protocol::Report::default()
        };
        vec![
            endpoint(3, "a", false, receives(oldest(7000))),
            endpoint(2, "a", true, sends),
            endpoint(4, "a", false, receives(oldest(9000))),
            endpoint(5, "b", false, receives(None)),
        ]
    }

    #[test]
    fn a_client_that_reports_anything_is_summed_up_with_others() {
        let all = u64::MAX;
        let liar = protocol::Report {
            links: all,
            messages: all,
            bytes: all,
            left_out: all,
            waits: all,
            sleeps: all,
            violations: all,
            slots: all,
            held: all,
            oldest: Some(protocol::Oldest { sequence: all, behind: all, milliseconds: all }),
        };
        let mut sum = Report::from(protocol::Report { oldest: None, ..liar });
        let liar = Report::from(liar);
        add(&mut sum, &liar, true);
        assert_eq!(sum, liar);
    }

    #[test]
    fn a_channel_counts_what_is_sent_once_and_what_everybody_holds() {
        let all = lines(By::Channel, &seen(), &[]);
        let [a, b] = &all[..] else { panic!("{all:?}") };
        assert_eq!(a.subject, Subject::Channel { channel: "a".into(), senders: 1, receivers: 2 });
        let sum = a.report.unwrap();
        assert_eq!((sum.messages, sum.links, sum.left_out, a.rates(2.0).messages), (100, 2, 80, 50.0));
        assert_eq!((sum.held, sum.slots, sum.waits, sum.oldest.unwrap().milliseconds), (4, 8, 3, 9000));
        // The sender there is not seen.
        assert_eq!((b.report.unwrap().messages, b.rates(2.0).messages), (60, 30.0));
        let mut silent = seen();
        silent[1].0.report = None;
        assert_eq!(lines(By::Channel, &silent, &[])[0].report.unwrap().messages, 120);
    }

    #[test]
    fn a_client_without_endpoints_has_a_line_as_well() {
        let client = |number, pid, endpoints| {
            let process = Credentials::new(pid, 1000, 1000);
            let program = Program::from_bytes(b"ffmpeg");
            protocol::ClientStatus { number, process, program: protocol::Wire(program), endpoints }.into()
        };
        let lines = lines(By::Client, &seen(), &[client(6, 20, 0), client(1, 10, 4)]);
        let cells: Vec<_> = lines.iter().map(Line::cells).collect();
        assert_eq!(cells[0][..7], ["10", "ffmpeg", "1000", "4", "2", "5", "280"].map(str::to_owned));
        assert_eq!(cells[1], ["20", "ffmpeg", "1000", "0", "0"].map(str::to_owned));
        assert_eq!(cells[0].len(), By::Client.heads().len());
    }

    #[test]
    fn endpoints_are_sorted_by_channel_senders_first() {
        let lines = lines(By::Endpoint, &seen(), &[]);
        let numbers: Vec<_> = lines
            .iter()
            .map(|line| match &line.subject {
                Subject::Endpoint(endpoint) => endpoint.number,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(numbers, [2, 3, 4, 5]);
        assert_eq!(lines[0].cells().len(), By::Endpoint.heads().len());
        assert_eq!(lines[0].cells_of_rates(1.0).len(), By::Endpoint.columns().len());
    }
}
