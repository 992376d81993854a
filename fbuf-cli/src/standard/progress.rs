//! What takes long shows on a terminal that it goes on.

use std::{
    io::{IsTerminal, stderr},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use super::{has_cursor, say_as_it_is};

/// From then on it takes long.
const LONG: Duration = Duration::from_secs(1);

/// Does it, and says on a terminal, once a second, for how long already.
pub(crate) fn while_it_takes_long<T: Send>(what: &str, act: impl FnOnce() -> T + Send) -> T {
    if !stderr().is_terminal() || !has_cursor() {
        return act();
    }
    let (done, waits) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let start = Instant::now();
            while waits.recv_timeout(LONG) == Err(RecvTimeoutError::Timeout) {
                say_as_it_is(&format!("\rfbuf: {what}: {} s", start.elapsed().as_secs()));
            }
            if start.elapsed() >= LONG {
                // The line is cleared for what is said next.
                say_as_it_is("\r\x1b[K");
            }
        });
        let result = act();
        drop(done);
        result
    })
}
