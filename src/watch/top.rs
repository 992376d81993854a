//! `fbuf top`: a live view in the terminal.

use std::{
    collections::HashMap,
    io::{IsTerminal, stdout},
    time::{Duration, Instant},
};

use fbuf_client::{Client, EndpointStatus, Report};
use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Color, Modifier, Style},
    widgets::{Paragraph, Row, Table},
};

use super::{Rates, age, is_suspect, protection, role, short, sorted};
use crate::{Failure, Place};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    every: f64,
    #[command(flatten)]
    place: Place,
}

/// One endpoint, as it was a look before and as it is.
#[derive(Debug)]
struct Line {
    status: EndpointStatus,
    rates: Rates,
}

#[derive(Debug, Default)]
struct View {
    lines: Vec<Line>,
    before: HashMap<u64, (Report, Instant)>,
    /// How many lines are scrolled away.
    skipped: usize,
    trouble: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    if !stdout().is_terminal() {
        return Err(Failure::new("top needs a terminal: for scripts there is `fbuf ls --json`"));
    }
    let every = Duration::try_from_secs_f64(arguments.every)
        .map_err(|error| Failure::new(format!("--every {}: {error}", arguments.every)))?;
    let client = arguments.place.connect()?;
    let mut terminal = ratatui::try_init()?;
    let result = watch(&mut terminal, &client, every.max(Duration::from_millis(100)));
    ratatui::restore();
    Ok(result?)
}

fn watch(terminal: &mut ratatui::DefaultTerminal, client: &Client, every: Duration) -> std::io::Result<()> {
    let mut view = View::default();
    loop {
        match client.status() {
            Ok(endpoints) => view.update(endpoints, Instant::now()),
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
                    _ => {}
                }
            }
        }
    }
}

impl View {
    fn update(&mut self, endpoints: Vec<EndpointStatus>, now: Instant) {
        let before = std::mem::take(&mut self.before);
        let line = |status: EndpointStatus| {
            let rates = match (&status.report, before.get(&status.number)) {
                (Some(report), Some((last, at))) => Rates::between(last, report, now.duration_since(*at).as_secs_f64()),
                _ => Rates::default(),
            };
            Line { status, rates }
        };
        self.lines = sorted(endpoints).into_iter().map(line).collect();
        let reports = self.lines.iter().filter_map(|line| Some((line.status.number, (line.status.report?, now))));
        self.before = reports.collect();
        self.skipped = self.skipped.min(self.lines.len().saturating_sub(1));
        self.trouble = None;
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let [top, middle] = Layout::vertical([Constraint::Length(2), Constraint::Min(0)]).areas(frame.area());
        frame.render_widget(Paragraph::new(self.summary()), top);
        let heads = [
            "channel",
            "end",
            "process",
            "user",
            "protection",
            "links",
            "messages/s",
            "bytes/s",
            "waits/s",
            "sleeps/s",
            "left out/s",
            "slots",
            "held",
            "violations",
            "oldest held",
        ];
        let widths = [20, 8, 8, 6, 10, 5, 10, 8, 8, 8, 10, 6, 5, 10, 24].map(Constraint::Length);
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let rows = self.lines.iter().skip(self.skipped).map(Line::row);
        frame.render_widget(Table::new(rows, widths).header(Row::new(heads).style(bold)), middle);
    }

    /// All together, and what went wrong.
    fn summary(&self) -> String {
        if let Some(trouble) = &self.trouble {
            return format!("fbuf: {trouble}\nq quits");
        }
        let clients: std::collections::HashSet<_> = self.lines.iter().map(|line| line.status.client).collect();
        let channels: std::collections::HashSet<_> = self.lines.iter().map(|line| &line.status.channel).collect();
        let senders = || self.lines.iter().filter(|line| role(line.status.end) == "sender");
        let links: u64 = senders().filter_map(|line| line.status.report).map(|report| report.links).sum();
        let [messages, bytes] = [|rates: Rates| rates.messages, |rates: Rates| rates.bytes]
            .map(|of| senders().map(|line| of(line.rates)).sum());
        let suspects =
            self.lines.iter().filter_map(|line| line.status.report.as_ref()).filter(|report| is_suspect(report));
        format!(
            "fbuf: {} clients, {} channels, {} endpoints, {links} links; {} messages/s, {} bytes/s; {} may have forgotten a \
             message\nq quits, arrows scroll",
            clients.len(),
            channels.len(),
            self.lines.len(),
            short(messages),
            short(bytes),
            suspects.count()
        )
    }
}

impl Line {
    fn row(&self) -> Row<'static> {
        let EndpointStatus { process, channel, end, report, .. } = &self.status;
        let Rates { messages, bytes, waits, sleeps, left_out } = self.rates;
        let mut cells = vec![
            channel.clone(),
            role(*end).into(),
            process.pid.to_string(),
            process.uid.to_string(),
            protection(*end),
        ];
        let Some(report) = report else {
            cells.push("does not answer".into());
            return Row::new(cells).style(Style::new().fg(Color::DarkGray));
        };
        cells.push(report.links.to_string());
        cells.extend([messages, bytes, waits, sleeps, left_out].map(short));
        cells.extend([report.slots, report.held, report.violations].map(|number| short(number as f64)));
        cells.push(age(report.oldest));
        let style = match is_suspect(report) || report.violations > 0 {
            true => Style::new().fg(Color::Red),
            false => Style::new(),
        };
        Row::new(cells).style(style)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fbuf_client::{Credentials, EndStatus, Mechanism, Oldest};
    use ratatui::{Terminal, backend::TestBackend};

    fn sender(number: u64, messages: u64) -> EndpointStatus {
        EndpointStatus {
            number,
            endpoint: number,
            process: Credentials { pid: 4321, uid: 1000, gid: 1000 },
            client: 1,
            channel: "camera/front".into(),
            end: EndStatus::Sender { slot_bytes: 64, max_slots: 4, mechanism: Mechanism::Shared },
            report: Some(Report { links: 2, messages, slots: 4, ..Report::default() }),
        }
    }

    #[test]
    fn a_frame_shows_rates_and_what_may_be_forgotten() {
        let mut view = View::default();
        let start = Instant::now();
        view.update(vec![sender(1, 1000)], start);
        let mut receiver = sender(2, 0);
        receiver.end = EndStatus::Receiver { require: fbuf_client::Protection::Volatile };
        let oldest = Some(Oldest { sequence: 7, behind: 5000, milliseconds: 12_300 });
        receiver.report = Some(Report { held: 3, oldest, ..Report::default() });
        view.update(vec![receiver, sender(1, 6000)], start + Duration::from_secs(2));
        let mut terminal = Terminal::new(TestBackend::new(170, 6)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let rows: Vec<String> =
            (0..6).map(|row| (0..170).map(|column| buffer[(column, row)].symbol().to_owned()).collect()).collect();
        assert!(
            rows[0].contains("1 clients, 1 channels, 2 endpoints") && rows[0].contains("1 may have forgotten"),
            "{rows:#?}"
        );
        assert!(
            rows[3].contains("camera/front") && rows[3].contains("sender") && rows[3].contains("2.5k"),
            "{rows:#?}"
        );
        assert!(rows[4].contains("receiver") && rows[4].contains("12.3 s, 5.0k behind"), "{rows:#?}");
    }
}
