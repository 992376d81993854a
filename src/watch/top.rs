//! `fbuf top`: a live view in the terminal.

use std::{
    collections::HashMap,
    io::{IsTerminal, stdout},
    time::{Duration, Instant},
};

use fbuf_client::{Client, ClientStatus, EndpointStatus, OpenError};
use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Color, Modifier, Style},
    widgets::{Paragraph, Row, Table},
};

use super::{
    Rates, is_suspect,
    lines::{By, Line, Watched, lines},
    short,
};
use crate::{Failure, Place};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What there is a line for at first: each endpoint, or all of a channel or of a client together
    #[arg(long, value_enum, value_name = "WHAT", default_value = "endpoint")]
    by: By,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    every: f64,
}

#[derive(Debug)]
struct View {
    by: By,
    clients: Vec<ClientStatus>,
    endpoints: Vec<Watched>,
    looked: Instant,
    /// Since the look before.
    seconds: f64,
    /// How many lines are scrolled away.
    skipped: usize,
    trouble: Option<String>,
}

pub(crate) fn run(arguments: &Arguments, place: &Place) -> Result<(), Failure> {
    if !stdout().is_terminal() {
        return Err(Failure::new("top needs a terminal: for scripts there is `fbuf ls --json`"));
    }
    let every = Duration::try_from_secs_f64(arguments.every)
        .map_err(|error| Failure::new(format!("--every {}: {error}", arguments.every)))?;
    let client = place.connect()?;
    let mut terminal = ratatui::try_init()?;
    let result =
        watch(&mut terminal, &client, View::new(arguments.by, Instant::now()), every.max(Duration::from_millis(100)));
    ratatui::restore();
    Ok(result?)
}

fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    client: &Client,
    mut view: View,
    every: Duration,
) -> std::io::Result<()> {
    let look = || -> Result<_, OpenError> { Ok((client.status()?, client.clients()?)) };
    loop {
        match look() {
            Ok((endpoints, clients)) => view.update(endpoints, clients, Instant::now()),
            Err(error) => view.trouble = Some(error.to_string()),
        }
        let next = Instant::now() + every;
        loop {
            terminal.draw(|frame| view.draw(frame))?;
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() || !event::poll(left)? {
                break;
            }
            if let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
            {
                match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    KeyCode::Down | KeyCode::Char('j') => view.skipped += 1,
                    KeyCode::Up | KeyCode::Char('k') => view.skipped = view.skipped.saturating_sub(1),
                    KeyCode::Tab => (view.by, view.skipped) = (view.by.next(), 0),
                    _ => {}
                }
            }
        }
    }
}

impl View {
    fn new(by: By, now: Instant) -> Self {
        Self { by, clients: Vec::new(), endpoints: Vec::new(), looked: now, seconds: 0.0, skipped: 0, trouble: None }
    }

    fn update(&mut self, endpoints: Vec<EndpointStatus>, clients: Vec<ClientStatus>, now: Instant) {
        let before: HashMap<_, _> =
            self.endpoints.iter().map(|(endpoint, _)| (endpoint.number, endpoint.report)).collect();
        let watched = |endpoint: EndpointStatus| {
            let before = before.get(&endpoint.number).copied().flatten();
            (endpoint, before)
        };
        self.endpoints = endpoints.into_iter().map(watched).collect();
        self.seconds = now.duration_since(std::mem::replace(&mut self.looked, now)).as_secs_f64();
        self.clients = clients;
        self.trouble = None;
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let [top, middle] = Layout::vertical([Constraint::Length(2), Constraint::Min(0)]).areas(frame.area());
        frame.render_widget(Paragraph::new(self.summary()), top);
        let lines = lines(self.by, &self.endpoints, &self.clients);
        self.skipped = self.skipped.min(lines.len().saturating_sub(1));
        let (heads, widths): (Vec<_>, Vec<_>) = self.by.heads_of_rates().unzip();
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let rows = lines.iter().skip(self.skipped).map(|line| row(line, self.seconds));
        let widths = widths.into_iter().map(Constraint::Length);
        frame.render_widget(Table::new(rows, widths).header(Row::new(heads).style(bold)), middle);
    }

    /// All together, and what went wrong.
    fn summary(&self) -> String {
        if let Some(trouble) = &self.trouble {
            return format!("fbuf: {trouble}\nq quits");
        }
        let channels = lines(By::Channel, &self.endpoints, &[]);
        let links: u64 = channels.iter().filter_map(|channel| channel.report).map(|report| report.links).sum();
        let [messages, bytes] = [|rates: Rates| rates.messages, |rates: Rates| rates.bytes]
            .map(|of| channels.iter().map(|channel| of(channel.rates(self.seconds))).sum());
        let reports = self.endpoints.iter().filter_map(|(endpoint, _)| endpoint.report.as_ref());
        format!(
            "fbuf: {} clients, {} channels, {} endpoints, {links} links; {} messages/s, {} bytes/s; {} may have forgotten a \
             message\nq quits, arrows scroll, tab: by channel, client, endpoint",
            self.clients.len(),
            channels.len(),
            self.endpoints.len(),
            short(messages),
            short(bytes),
            reports.filter(|report| is_suspect(report)).count()
        )
    }
}

fn row(line: &Line, seconds: f64) -> Row<'static> {
    let is_bad = line.is_suspect || line.report.is_some_and(|report| report.violations > 0);
    let style = match line.report {
        _ if is_bad => Style::new().fg(Color::Red),
        None if !line.is_idle() => Style::new().fg(Color::DarkGray),
        _ => Style::new(),
    };
    Row::new(line.cells_of_rates(seconds)).style(style)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fbuf_client::{Credentials, EndStatus, Mechanism, Oldest, Report};
    use ratatui::{Terminal, backend::TestBackend};

    const PROCESS: Credentials = Credentials { pid: 4321, uid: 1000, gid: 1000 };

    fn sender(number: u64, messages: u64) -> EndpointStatus {
        EndpointStatus {
            number,
            endpoint: number,
            process: PROCESS,
            client: 1,
            channel: "camera/front".into(),
            end: EndStatus::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Shared },
            report: Some(Report { links: 2, messages, slots: 4, ..Report::default() }),
        }
    }

    fn drawn(view: &mut View) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(180, 6)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        (0..6).map(|row| (0..180).map(|column| buffer[(column, row)].symbol().to_owned()).collect()).collect()
    }

    #[test]
    fn a_frame_shows_rates_and_what_may_be_forgotten() {
        let start = Instant::now();
        let mut view = View::new(By::Endpoint, start);
        let clients = vec![ClientStatus { number: 1, process: PROCESS, endpoints: 2 }];
        view.update(vec![sender(1, 1000)], clients.clone(), start);
        let mut receiver = sender(2, 0);
        receiver.end = EndStatus::Receiver { require: fbuf_client::Protection::Volatile };
        let oldest = Some(Oldest { sequence: 7, behind: 5000, milliseconds: 12_300 });
        receiver.report = Some(Report { held: 3, oldest, ..Report::default() });
        view.update(vec![receiver, sender(1, 6000)], clients, start + Duration::from_secs(2));
        let rows = drawn(&mut view);
        let shows = |row: &String, all: &[&str]| all.iter().all(|text| row.contains(text));
        assert!(shows(&rows[0], &["1 clients, 1 channels, 2 endpoints", "1 may have forgotten"]), "{rows:#?}");
        assert!(shows(&rows[3], &["camera/front", "sender", "2.5k"]), "{rows:#?}");
        assert!(shows(&rows[4], &["receiver", "12.3 s, 5.0k behind, forgotten?"]), "{rows:#?}");
        view.by = By::Channel;
        let rows = drawn(&mut view);
        assert!(shows(&rows[2], &["senders", "receivers", "messages/s"]), "{rows:#?}");
        assert!(shows(&rows[3], &["camera/front", "2.5k", "12.3 s, 5.0k behind, forgotten?"]), "{rows:#?}");
        view.by = By::Client;
        let rows = drawn(&mut view);
        assert!(shows(&rows[3], &["4321", "1000", "2.5k", "forgotten?"]) && rows[4].trim().is_empty(), "{rows:#?}");
    }
}
