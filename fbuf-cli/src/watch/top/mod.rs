//! `fbuf top`: a live view in the terminal. One thread asks the broker, one reads keys, and what they bring is drawn
//! by this one: a broker that is stopped holds up no key.

mod view;

use std::{
    io::{self, IsTerminal, stdout},
    mem::ManuallyDrop,
    sync::{
        Arc, Mutex, TryLockError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use fbuf_client::{Client, ClientStatus, EndpointStatus, OpenError};
use ratatui::crossterm::{
    cursor::Show,
    event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    execute,
};

use self::view::View;
use super::lines::By;
use crate::{
    Failure, Place, signals,
    standard::{has_colours, has_cursor, is_hung_up},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What there is a line for at first: each endpoint, or all of a channel or of a client together
    #[arg(long, value_enum, value_name = "WHAT", default_value = "endpoint")]
    by: By,
    /// Seconds between two looks, 0.1 to 86400
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    every: Duration,
}

const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(86_400);

fn seconds(text: &str) -> Result<Duration, String> {
    let parsed = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    parsed
        .filter(|&every| (SHORTEST..=LONGEST).contains(&every))
        .ok_or_else(|| "give a number of seconds from 0.1 to 86400, which is a day".to_owned())
}

/// What the other threads bring.
enum News {
    Event(io::Result<Event>),
    Look(Result<(Vec<EndpointStatus>, Vec<ClientStatus>), OpenError>),
}

/// How often a view is drawn again of which nothing is heard.
const REDRAW: Duration = Duration::from_secs(1);

pub(crate) fn run(arguments: &Arguments, place: &Place) -> Result<(), Failure> {
    if !stdout().is_terminal() {
        return Err(Failure::new("top needs a terminal: for scripts there is `fbuf ls --json`"));
    }
    if !has_cursor() {
        return Err(Failure::new(
            "top needs a terminal that can move its cursor, and TERM says that this one cannot: for others there is `fbuf ls`",
        ));
    }
    let screen = Screen::default();
    let seen = screen.clone();
    signals::before_the_end(move || seen.give_back())?;
    let client = place.connect()?;
    let (tell, news) = channel();
    let mut view = View::new(arguments.by, has_colours(&stdout()), Instant::now());
    let mut terminal = screen.take().map_err(|error| gone(&error))?;
    let result = start(client, arguments.every, tell).and_then(|()| watch(&screen, &mut terminal, &mut view, &news));
    screen.give_back();
    result.map_err(|error| gone(&error))
}

/// The terminal was closed, in most cases.
fn gone(error: &io::Error) -> Failure {
    Failure::new(format!("the terminal cannot be used: {error}"))
}

/// Starts the threads that look and listen. They end with the process.
fn start(client: Client, every: Duration, tell: Sender<News>) -> io::Result<()> {
    let of_looks = tell.clone();
    thread::Builder::new().name("fbuf-look".into()).spawn(move || {
        let look = || Ok((client.status()?, client.clients()?));
        while of_looks.send(News::Look(look())).is_ok() {
            thread::sleep(every);
        }
    })?;
    thread::Builder::new().name("fbuf-keys".into()).spawn(move || {
        let mut is_there = true;
        while is_there {
            let event = event::read();
            is_there = event.is_ok();
            is_there &= tell.send(News::Event(event)).is_ok();
        }
    })?;
    Ok(())
}

fn watch(
    screen: &Screen,
    terminal: &mut ratatui::DefaultTerminal,
    view: &mut View,
    news: &Receiver<News>,
) -> io::Result<()> {
    loop {
        // Where SIGHUP is ignored nothing else says so: reading waits, and a frame that is as before writes nothing.
        if is_hung_up(&stdout())? {
            return Err(io::ErrorKind::NotConnected.into());
        }
        screen.draw(|| terminal.draw(|frame| view.draw(frame, Instant::now())).map(drop))?;
        match news.recv_timeout(REDRAW) {
            Ok(News::Look(Ok((endpoints, clients)))) => view.update(endpoints, clients, Instant::now()),
            Ok(News::Look(Err(error))) => view.fail(&error, Instant::now()),
            Ok(News::Event(event)) => {
                if let Event::Key(key) = event?
                    && key.kind == KeyEventKind::Press
                {
                    match key.code {
                        KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                        KeyCode::Down | KeyCode::Char('j') => view.scroll(1),
                        KeyCode::Up | KeyCode::Char('k') => view.scroll(-1),
                        KeyCode::Tab => view.turn(),
                        _ => {}
                    }
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

/// The terminal while this process has it: given back once, by the thread that drew on it or by the one that heard a
/// signal.
#[derive(Debug, Clone, Default)]
struct Screen(Arc<(Mutex<()>, AtomicBool)>);

impl Screen {
    fn take(&self) -> io::Result<ManuallyDrop<ratatui::DefaultTerminal>> {
        self.draw(|| {
            // SeqCst, as below: it matters only that one of two threads gives it back.
            self.0.1.store(true, Ordering::SeqCst);
            // Its destructor would print with `eprintln!`, which panics on a terminal that has been closed.
            ratatui::try_init().map(ManuallyDrop::new)
        })
    }

    /// Draws, unless the terminal was given back meanwhile.
    fn draw<T>(&self, draw: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _alone = self.0.0.lock();
        draw()
    }

    fn give_back(&self) {
        if !self.0.1.swap(false, Ordering::SeqCst) {
            return;
        }
        // A frame that is being drawn is finished first; unless it has no reader any more.
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut alone = self.0.0.try_lock();
        while matches!(alone, Err(TryLockError::WouldBlock)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
            alone = self.0.0.try_lock();
        }
        // A terminal that is gone needs nothing.
        let _ = ratatui::try_restore();
        let _ = execute!(stdout(), Show);
        // Nothing is drawn any more.
        std::mem::forget(alone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_that_cannot_be_are_refused_with_those_that_can() {
        assert_eq!(["0.1", "86400"].map(|text| seconds(text).unwrap()), [SHORTEST, LONGEST]);
        for text in ["0.09", "86401", "1e300", "nan", "inf", "-1", "soon"] {
            let error = seconds(text).unwrap_err();
            assert!(error.contains("0.1 to 86400"), "{text}: {error}");
        }
    }
}
