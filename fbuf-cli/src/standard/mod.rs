//! Standard input, output and error, and files that are named in their place, as a command is expected to use them:
//! a closed descriptor is an error, a non-blocking one is waited for, a pipe without a reader ends the command without
//! a word, and nothing here panics, which `println!` and `eprintln!` do.

mod inherited;
mod progress;

use std::{
    env,
    fmt::Display,
    fs::{self, File},
    io::{self, IsTerminal, Read, Write, stderr, stdin, stdout},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::error::ErrorKind;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::Failure;

/// The name by which a command line says standard input or output.
const STANDARD: &str = "-";

/// How long standard error may stay full, if it is non-blocking, before a line is given up.
const PATIENCE: u16 = 1000;

/// Standard input, or a file in its place.
#[derive(Debug)]
pub(crate) struct Input {
    file: File,
    /// In words.
    name: String,
}

impl Input {
    /// Opens a file for reading; none, and `-`, are standard input.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self, Failure> {
        let (name, opened) = match path.filter(|path| *path != Path::new(STANDARD)) {
            Some(path) => (path.display().to_string(), File::open(path)),
            None if inherited::was_closed(0) => {
                return Err(Failure::new("standard input is closed: name a file, or redirect one (`< FILE`)"));
            }
            None => ("standard input".to_owned(), stdin().as_fd().try_clone_to_owned().map(File::from)),
        };
        match opened {
            Ok(file) => Ok(Self { file, name }),
            Err(error) => Err(unread(&name, &error)),
        }
    }

    /// open(2) succeeds for a folder, and the first read does not.
    pub(crate) fn reject_folder(&self) -> Result<(), Failure> {
        if self.file.metadata().is_ok_and(|found| found.is_dir()) {
            return Err(Failure::new(format!("{} is a folder: send what `tar` makes of it", self.name)));
        }
        Ok(())
    }

    /// What a failure to read it is called.
    pub(crate) fn failure(&self, error: &io::Error) -> Failure {
        unread(&self.name, error)
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait(self.file.as_fd(), PollFlags::POLLIN, PollTimeout::NONE)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// Standard output, or a file in its place.
#[derive(Debug)]
pub(crate) struct Output {
    file: File,
    /// None is standard output.
    path: Option<PathBuf>,
    /// The last error, for a caller to which errors come in another shape.
    failed: Option<io::Error>,
}

impl Output {
    /// Standard output.
    pub(crate) fn standard() -> Result<Self, Failure> {
        if inherited::was_closed(1) {
            return Err(Failure::new("standard output is closed: redirect it (`> FILE`)"));
        }
        Self::of(stdout().as_fd().try_clone_to_owned().map(File::from), None)
    }

    /// Opens a file for writing, and leaves what is in it until [`Self::truncate`]; none, and `-`, are standard output.
    pub(crate) fn open(path: Option<&Path>) -> Result<Self, Failure> {
        match path.filter(|path| *path != Path::new(STANDARD)) {
            Some(path) => Self::of(File::options().write(true).create(true).truncate(false).open(path), Some(path)),
            None => Self::standard(),
        }
    }

    fn of(opened: io::Result<File>, path: Option<&Path>) -> Result<Self, Failure> {
        let path = path.map(Path::to_owned);
        match opened {
            Ok(file) => Ok(Self { file, path, failed: None }),
            Err(error) => Err(unwritten(path.as_deref(), &error)),
        }
    }

    /// Empties a file that was opened by its name.
    pub(crate) fn truncate(&self) -> Result<(), Failure> {
        let is_file = || self.file.metadata().is_ok_and(|found| found.is_file());
        if self.path.is_some() && is_file() {
            self.file.set_len(0).map_err(|error| self.failure(&error))?;
        }
        Ok(())
    }

    /// Writes all of it.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.write_all(bytes).map_err(|error| self.failure(&error))
    }

    /// Closes it: some file systems report only then that they could not write.
    pub(crate) fn finish(self) -> Result<(), Failure> {
        if let Some(error) = &self.failed {
            return Err(self.failure(error));
        }
        let Self { file, path, .. } = self;
        nix::unistd::close(file).map_err(|error| unwritten(path.as_deref(), &error.into()))
    }

    fn failure(&self, error: &io::Error) -> Failure {
        unwritten(self.path.as_deref(), error)
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_waiting(&mut self.file, bytes, PollTimeout::NONE).inspect_err(|error| {
            self.failed = Some(error.raw_os_error().map_or_else(|| error.kind().into(), io::Error::from_raw_os_error));
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a failure to read is called.
fn unread(name: &str, error: &io::Error) -> Failure {
    Failure::new(format!("{name} cannot be read: {error}"))
}

/// What a failure to write is called.
fn unwritten(path: Option<&Path>, error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return Failure::ClosedPipe;
    }
    let name = path.map_or_else(|| "standard output".to_owned(), |path| path.display().to_string());
    Failure::new(format!("{name} cannot be written: {error}"))
}

/// Prints a text, to its end, on standard output.
pub(crate) fn print(text: impl Display) -> Result<(), Failure> {
    let mut output = Output::standard()?;
    output.put(text.to_string().as_bytes())?;
    output.finish()
}

/// Says something on standard error, in a line that begins with the name of the command. There is nowhere to say that
/// this failed.
pub(crate) fn say(text: impl Display) {
    say_as_it_is(&format!("fbuf: {text}\n"));
}

fn say_as_it_is(text: &str) {
    let (mut stderr, mut left) = (stderr(), text.as_bytes());
    while !left.is_empty() {
        match write_waiting(&mut stderr, left, PATIENCE.into()) {
            Ok(written) if written > 0 => left = &left[written..],
            _ => return,
        }
    }
}

/// Says why the command line is not understood, or prints the help or the version that it asks for.
pub(crate) fn explain(error: &clap::Error) -> ExitCode {
    let text = error.render();
    let coloured = |is_wanted| if is_wanted { text.ansi().to_string() } else { text.to_string() };
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match print(coloured(has_colours(&stdout()))) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => end(failure),
        },
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            say_as_it_is(&coloured(has_colours(&stderr())));
            ExitCode::from(Failure::USAGE)
        }
        _ => end(Failure::usage(in_one_line(&text.to_string()))),
    }
}

/// What clap says in paragraphs, the last of which says where to find help.
fn in_one_line(text: &str) -> String {
    let paragraphs = text.trim_start_matches("error: ").split("\n\n").map(|paragraph| {
        let words: Vec<_> = paragraph.split_whitespace().collect();
        words.join(" ").replacen("Usage: ", "usage: ", 1).replacen("For more information, try", "for more, try", 1)
    });
    paragraphs.collect::<Vec<_>>().join("; ").trim_end_matches('.').to_owned()
}

/// Says why the command failed, and with which status it ends.
pub(crate) fn end(failure: Failure) -> ExitCode {
    match failure {
        Failure::Said { text, status } => {
            say(text);
            ExitCode::from(status)
        }
        Failure::Shown => ExitCode::FAILURE,
        Failure::ClosedPipe => {
            inherited::die_of_closed_pipe();
            // As a shell reports it.
            ExitCode::from(128 + nix::libc::SIGPIPE as u8)
        }
    }
}

/// Whether colours are wanted there: on a terminal that has them, unless NO_COLOR is set (no-color.org).
pub(crate) fn has_colours(stream: &impl IsTerminal) -> bool {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !is_set("NO_COLOR") && has_cursor()
}

/// Whether the terminal understands sequences for colours and for the cursor.
pub(crate) fn has_cursor() -> bool {
    env::var_os("TERM").is_some_and(|term| !term.is_empty() && term != "dumb")
}

/// Whether the other side of a terminal or a pipe is closed.
pub(crate) fn is_hung_up(descriptor: &impl AsFd) -> io::Result<bool> {
    let mut polled = [PollFd::new(descriptor.as_fd(), PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO)?;
    Ok(polled[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)))
}

pub(crate) use inherited::ignores;
pub(crate) use progress::while_it_takes_long;

/// Whether standard input was not redirected to data: a terminal, /dev/null, or nothing.
pub(crate) fn has_no_input() -> bool {
    let is_null = || {
        let standard = File::from(stdin().as_fd().try_clone_to_owned().ok()?);
        Some(standard.metadata().ok()?.rdev() == fs::metadata("/dev/null").ok()?.rdev())
    };
    inherited::was_closed(0) || stdin().is_terminal() || is_null() == Some(true)
}

/// Writes once, and waits before if the descriptor is non-blocking and full.
fn write_waiting(file: &mut (impl Write + AsFd), bytes: &[u8], patience: PollTimeout) -> io::Result<usize> {
    loop {
        match file.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait(file.as_fd(), PollFlags::POLLOUT, patience)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn wait(descriptor: BorrowedFd<'_>, events: PollFlags, patience: PollTimeout) -> io::Result<()> {
    match poll(&mut [PollFd::new(descriptor, events)], patience) {
        Ok(0) => Err(io::ErrorKind::TimedOut.into()),
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
