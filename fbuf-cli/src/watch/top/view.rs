//! What `fbuf top` draws: a summary, and a line for each endpoint, channel or client, as many columns as there is room
//! for.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use fbuf_client::{ClientStatus, EndpointStatus, OpenError};
use ratatui::{
    Frame,
    layout::{Constraint, Layout},
    style::{Color, Modifier, Style},
    text,
    widgets::Paragraph,
};

use crate::watch::{
    Rates,
    columns::{fit, line, wrapped},
    is_suspect,
    lines::{By, Line, Watched, lines},
    short,
};

const KEYS: &str = "q quits, arrows scroll, tab: by channel, client, endpoint";
/// An answer that takes longer is worth a word.
const LATE: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub(super) struct View {
    by: By,
    has_colours: bool,
    clients: Vec<ClientStatus>,
    endpoints: Vec<Watched>,
    looked: Instant,
    /// Since the look before.
    seconds: f64,
    /// How many lines are scrolled away.
    skipped: usize,
    /// Since when what is shown is old, and why.
    heard: Instant,
    trouble: Option<String>,
}

impl View {
    pub(super) fn new(by: By, has_colours: bool, now: Instant) -> Self {
        Self {
            by,
            has_colours,
            clients: Vec::new(),
            endpoints: Vec::new(),
            looked: now,
            seconds: 0.0,
            skipped: 0,
            heard: now,
            trouble: None,
        }
    }

    pub(super) fn update(&mut self, endpoints: Vec<EndpointStatus>, clients: Vec<ClientStatus>, now: Instant) {
        let before: HashMap<_, _> =
            self.endpoints.iter().map(|(endpoint, _)| (endpoint.number, endpoint.report)).collect();
        let watched = |endpoint: EndpointStatus| {
            let before = before.get(&endpoint.number).copied().flatten();
            (endpoint, before)
        };
        self.endpoints = endpoints.into_iter().map(watched).collect();
        self.seconds = now.duration_since(std::mem::replace(&mut self.looked, now)).as_secs_f64();
        self.clients = clients;
        (self.heard, self.trouble) = (now, None);
    }

    pub(super) fn fail(&mut self, error: &OpenError, now: Instant) {
        (self.heard, self.trouble) = (now, Some(error.to_string()));
    }

    pub(super) fn scroll(&mut self, lines: isize) {
        self.skipped = self.skipped.saturating_add_signed(lines);
    }

    /// To the next way of putting endpoints together.
    pub(super) fn turn(&mut self) {
        (self.by, self.skipped) = (self.by.next(), 0);
    }

    pub(super) fn draw(&mut self, frame: &mut Frame<'_>, now: Instant) {
        let (room, height) = (frame.area().width.into(), frame.area().height);
        let mut above = wrapped(&self.summary(now), room);
        above.extend(wrapped(KEYS, room));
        // A low window has lines of its own, too.
        above.truncate((height / 2).max(2).into());
        let parts = Layout::vertical([Constraint::Length(above.len() as u16), Constraint::Min(0)]);
        let [top, middle] = parts.areas(frame.area());
        frame.render_widget(Paragraph::new(above.into_iter().map(text::Line::from).collect::<Vec<_>>()), top);
        frame.render_widget(Paragraph::new(self.table(room, middle.height.into())), middle);
    }

    /// The heads, and so many lines less one.
    fn table(&mut self, room: usize, height: usize) -> Vec<text::Line<'static>> {
        let lines = lines(self.by, &self.endpoints, &self.clients);
        self.skipped = self.skipped.min(lines.len().saturating_sub(1));
        let columns = self.by.columns();
        let cells: Vec<_> = lines.iter().map(|line| line.cells_of_rates(self.seconds)).collect();
        let shown = fit(&columns, &cells, room);
        let heads: Vec<_> = columns.iter().map(|column| column.head).collect();
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let row = |(about, cells): (&Line, &Vec<String>)| {
            let text = line(&shown, cells);
            let note = about.note().map_or_else(String::new, |note| format!("  {note}"));
            text::Line::styled(text + &note, self.style(about))
        };
        let rows = lines.iter().zip(&cells).skip(self.skipped).take(height.saturating_sub(1)).map(row);
        std::iter::once(text::Line::styled(line(&shown, &heads), bold)).chain(rows).collect()
    }

    /// All together, or why there is nothing new.
    fn summary(&self, now: Instant) -> String {
        let silent = now.saturating_duration_since(self.heard);
        match &self.trouble {
            Some(trouble) => return format!("fbuf: {trouble}"),
            None if silent >= LATE => {
                return format!(
                    "fbuf: the broker has not answered for {} s: look whether it is stopped or overloaded",
                    silent.as_secs()
                );
            }
            None => {}
        }
        let channels = lines(By::Channel, &self.endpoints, &[]);
        let links = channels.iter().filter_map(|channel| channel.report).map(|report| report.links);
        let links = links.fold(0, u64::saturating_add);
        let [messages, bytes] = [|rates: Rates| rates.messages, |rates: Rates| rates.bytes]
            .map(|of| channels.iter().map(|channel| of(channel.rates(self.seconds))).sum());
        let reports = self.endpoints.iter().filter_map(|(endpoint, _)| endpoint.report.as_ref());
        format!(
            "fbuf: {}, {}, {}, {}; {} messages/s, {} bytes/s; {} may have forgotten a message",
            several(self.clients.len() as u64, "client"),
            several(channels.len() as u64, "channel"),
            several(self.endpoints.len() as u64, "endpoint"),
            several(links, "link"),
            short(messages),
            short(bytes),
            reports.filter(|report| is_suspect(report)).count()
        )
    }

    fn style(&self, line: &Line) -> Style {
        let is_bad = line.is_suspect || line.report.is_some_and(|report| report.violations > 0);
        match line.report {
            _ if !self.has_colours => Style::new(),
            _ if is_bad => Style::new().fg(Color::Red),
            None if !line.is_idle() => Style::new().fg(Color::DarkGray),
            _ => Style::new(),
        }
    }
}

fn several(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fbuf_client::{Credentials, Label, Mechanism, Program};
    use fbuf_protocol as protocol;
    use ratatui::{Terminal, backend::TestBackend};

    const PROCESS: Credentials = Credentials::new(4321, 1000, 1000);

    fn sender(number: u64, messages: u64) -> EndpointStatus {
        let status = protocol::EndpointStatus {
            number,
            endpoint: number,
            process: PROCESS,
            program: protocol::Wire(Program::from_bytes(b"ffmpeg")),
            label: None,
            client: 1,
            channel: "camera/front".into(),
            end: protocol::EndStatus::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Shared },
            unpaired: 0,
            first_unpaired: None,
            report: Some(protocol::Report { links: 2, messages, slots: 4, ..protocol::Report::default() }),
        };
        status.into()
    }

    fn drawn_in(view: &mut View, width: u16, height: u16, later: Duration) -> Vec<String> {
        let now = view.heard + later;
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame, now)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        (0..height).map(|row| (0..width).map(|column| buffer[(column, row)].symbol().to_owned()).collect()).collect()
    }

    fn drawn(view: &mut View) -> Vec<String> {
        drawn_in(view, 180, 6, Duration::ZERO)
    }

    #[test]
    fn a_frame_shows_rates_and_what_may_be_forgotten() {
        let start = Instant::now();
        let mut view = View::new(By::Endpoint, true, start);
        let clients: Vec<ClientStatus> = vec![
            protocol::ClientStatus {
                number: 1,
                process: PROCESS,
                program: protocol::Wire(Program::default()),
                endpoints: 2,
            }
            .into(),
        ];
        view.update(vec![sender(1, 1000)], clients.clone(), start);
        let mut receiver = sender(2, 0);
        receiver.end = protocol::EndStatus::Receiver { require: fbuf_client::Protection::Volatile }.into();
        let oldest = Some(protocol::Oldest { sequence: 7, behind: 5000, milliseconds: 12_300 });
        receiver.report = Some(protocol::Report { held: 3, oldest, ..protocol::Report::default() }.into());
        receiver.label = Label::new("viewer/1").ok();
        view.update(vec![receiver, sender(1, 6000)], clients, start + Duration::from_secs(2));
        let rows = drawn(&mut view);
        let shows = |row: &String, all: &[&str]| all.iter().all(|text| row.contains(text));
        assert!(shows(&rows[0], &["1 client, 1 channel, 2 endpoints", "1 may have forgotten"]), "{rows:#?}");
        assert!(shows(&rows[3], &["camera/front", "sender", "4321", "ffmpeg", "2.5k"]), "{rows:#?}");
        assert!(shows(&rows[4], &["receiver", "viewer/1", "12.3 s, 5.0k behind, forgotten?"]), "{rows:#?}");
        view.by = By::Channel;
        let rows = drawn(&mut view);
        assert!(shows(&rows[2], &["senders", "receivers", "messages/s"]), "{rows:#?}");
        assert!(shows(&rows[3], &["camera/front", "2.5k", "12.3 s, 5.0k behind, forgotten?"]), "{rows:#?}");
        view.by = By::Client;
        let rows = drawn(&mut view);
        assert!(shows(&rows[3], &["4321", "1000", "2.5k", "forgotten?"]) && rows[4].trim().is_empty(), "{rows:#?}");
    }

    #[test]
    fn a_narrow_window_has_fewer_columns_and_whole_numbers() {
        let start = Instant::now();
        let mut view = View::new(By::Endpoint, true, start);
        let mut silent = sender(2, 0);
        silent.report = None;
        let mut long = sender(3, 0);
        long.channel = "a/channel/with/a/name/that/is/long".into();
        view.update(vec![sender(1, 0)], Vec::new(), start);
        view.update(vec![sender(1, 1234), silent, long], Vec::new(), start + Duration::from_secs(1));
        let rows = drawn_in(&mut view, 40, 12, Duration::ZERO);
        let text = rows.join("\n");
        assert!(rows.iter().any(|row| row.starts_with("channel") && row.contains("messages/s")), "{text}");
        assert!(rows.iter().any(|row| row.starts_with("camera/front") && row.contains("1.2k")), "{text}");
        assert!(text.contains("a/channel/with/a/na…"), "{text}");
        let rows = drawn_in(&mut view, 200, 12, Duration::ZERO);
        assert!(rows.iter().any(|row| row.starts_with("a/channel/with/a/name/that/is/long  ")), "{rows:#?}");
        assert!(rows.iter().any(|row| row.trim_end().ends_with("does not answer")), "{rows:#?}");
        // In a window that is as small as can be, too.
        drawn_in(&mut view, 1, 1, Duration::ZERO);
    }

    #[test]
    fn a_broker_that_does_not_answer_is_told() {
        let start = Instant::now();
        let mut view = View::new(By::Endpoint, true, start);
        assert!(drawn_in(&mut view, 180, 6, Duration::ZERO)[0].contains("0 clients"));
        let rows = drawn_in(&mut view, 180, 6, Duration::from_secs(7));
        assert!(rows[0].contains("the broker has not answered for 7 s"), "{rows:#?}");
        view.update(Vec::new(), Vec::new(), start + Duration::from_secs(8));
        assert!(drawn(&mut view)[0].contains("0 messages/s, 0 bytes/s"));
    }
}
