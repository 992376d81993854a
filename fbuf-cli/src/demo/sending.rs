//! The first process: starts a broker and the second process, streams, and prints the table.

use std::{
    fs::File,
    io::{BufReader, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bytesize::ByteSize;
use fbuf_broker::Embedded;
use fbuf_client::Client;
use fbuf_core::{
    limits::MAX_SLOT_BYTES,
    process::processors::{self, CpuTime, pin},
};
use fbuf_protocol::address::VARIABLE;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::fcntl::{FcntlArg, fcntl};
use xxhash_rust::xxh3::Xxh3;

use super::{Arguments, Over, receiving::Report, source::Source};
use crate::{
    Failure,
    standard::{has_cursor, print},
};

/// Longer than the second process takes for anything but the stream.
const LONG: Duration = Duration::from_secs(60);

/// The second process, which does not outlive an error of the first.
struct Second(Child);

impl Drop for Second {
    fn drop(&mut self) {
        // It has ended, or there is nothing more for it to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One row of the table.
struct Row {
    over: Over,
    time: Duration,
    messages: u64,
    sender: CpuTime,
    report: Report,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let message = usize::try_from(arguments.message.as_u64())?;
    if !(1..=u64::from(MAX_SLOT_BYTES)).contains(&arguments.message.as_u64()) {
        return Err(Failure::new(format!("messages of {message} bytes were asked for: --message can be 1B to 1GiB")));
    }
    let mut source = match &arguments.file {
        Some(path) => {
            Source::open(path).map_err(|error| Failure::new(format!("{} cannot be sent: {error}", path.display())))?
        }
        None => Source::generated(arguments.bytes.as_u64()),
    };
    // Pinned only after the broker's thread has started: that one may run anywhere.
    let broker = Embedded::start()?;
    let [first, second] = processors::two();
    pin(first);
    let bar = ProgressBar::new(source.length().saturating_mul(1 + arguments.over.len() as u64)).with_style(
        ProgressStyle::with_template("{prefix:>8} {wide_bar} {binary_bytes}/{binary_total_bytes}")
            .unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    if !has_cursor() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar.set_prefix("hash");
    let expected = hash(&mut source, message, &bar)?;
    let mut rows = Vec::new();
    for &over in &arguments.over {
        bar.set_prefix(over.name());
        source.rewind()?;
        let row = stream(over, &mut source, &Setting { message, arguments, broker: &broker, second, bar: &bar })?;
        if (row.report.hash, row.report.bytes) != expected {
            bar.finish_and_clear();
            return Err(Failure::new(format!(
                "over {}, {} bytes with hash {:032x} arrived of {} with hash {:032x}",
                over.name(),
                row.report.bytes,
                row.report.hash,
                expected.1,
                expected.0
            )));
        }
        rows.push(row);
    }
    bar.finish_and_clear();
    print(table(&rows, expected, message))
}

/// The hash of all of it, and its length.
fn hash(source: &mut Source, message: usize, bar: &ProgressBar) -> Result<(u128, u64), Failure> {
    let (mut hash, mut bytes) = (Xxh3::new(), 0);
    let mut buffer = vec![0; message.max(1 << 20)];
    loop {
        let count = source.read(&mut buffer)?;
        if count == 0 {
            return Ok((hash.digest128(), bytes));
        }
        hash.update(&buffer[..count]);
        bytes += count as u64;
        bar.inc(count as u64);
    }
}

/// What all rows have in common.
struct Setting<'a> {
    message: usize,
    arguments: &'a Arguments,
    broker: &'a Embedded,
    /// The processor of the second process.
    second: Option<usize>,
    bar: &'a ProgressBar,
}

/// Streams all of it to a second process, which hashes it.
fn stream(over: Over, source: &mut Source, setting: &Setting<'_>) -> Result<Row, Failure> {
    let &Setting { message, arguments, broker, second, bar } = setting;
    let (input, output) = match over {
        Over::Fbuf => (Stdio::null(), None),
        Over::Pipe => {
            let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
            // As large as users may make it; the default of 64 KiB is slower.
            let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1 << 20));
            (Stdio::from(reader), Some(writer))
        }
        Over::Socket => {
            let (one, other) = UnixStream::pair()?;
            (Stdio::from(OwnedFd::from(one)), Some(OwnedFd::from(other)))
        }
    };
    let mut command = Command::new(std::env::current_exe()?);
    if let Some(processor) = second {
        command.args(["demo", "--processor", &processor.to_string()]);
    } else {
        command.arg("demo");
    }
    let child = command
        .args(["--receive", "--over", over.name(), "--message", &message.to_string()])
        .args([
            "--wait",
            clap::ValueEnum::to_possible_value(&arguments.wait).as_ref().map_or("", |wait| wait.get_name()),
        ])
        .env(VARIABLE, broker.address().to_string())
        .stdin(input)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut second = Second(child);
    let mut reports = BufReader::new(second.0.stdout.take().ok_or_else(|| Failure::new("no output to read"))?);
    Report::wait_until_ready(&mut reports)?;
    // Messages are counted; the bar is moved once for so many bytes.
    let mut progress = Progress { bar, pending: 0, messages: 0 };
    let (start, before);
    if let Some(output) = output {
        let mut output = File::from(output);
        let mut buffer = vec![0; message];
        (start, before) = (Instant::now(), CpuTime::so_far()?);
        loop {
            let count = source.read(&mut buffer)?;
            if count == 0 {
                break;
            }
            let written = output.write_all(&buffer[..count]);
            written.map_err(|error| Failure::new(format!("the second process does not read: {error}")))?;
            progress.count(count);
        }
    } else {
        let client = Client::connect_to(broker.address())?;
        let mut sender = client.sender("demo").slot_size(message).wait(arguments.wait.into()).open()?;
        sender.wait_for_receivers_timeout(1, LONG)?;
        (start, before) = (Instant::now(), CpuTime::so_far()?);
        loop {
            let mut fbuf = sender.allocate()?;
            let count = fbuf.read_once_from(source)?;
            if count == 0 {
                break;
            }
            sender.write(fbuf)?;
            progress.count(count);
        }
    }
    let messages = progress.finish();
    // The stream has ended with the block above; the report comes when the other side has it all.
    let report = Report::read(&mut reports)?;
    let (time, sender) = (start.elapsed(), CpuTime::so_far()?.since(before));
    second.0.wait()?;
    Ok(Row { over, time, messages, sender, report })
}

struct Progress<'a> {
    bar: &'a ProgressBar,
    pending: u64,
    messages: u64,
}

impl Progress<'_> {
    fn count(&mut self, bytes: usize) {
        self.messages += 1;
        self.pending += bytes as u64;
        if self.pending >= 32 << 20 {
            self.bar.inc(std::mem::take(&mut self.pending));
        }
    }

    fn finish(self) -> u64 {
        self.bar.inc(self.pending);
        self.messages
    }
}

fn table(rows: &[Row], (hash, bytes): (u128, u64), message: usize) -> String {
    let mut text = format!(
        "{} in messages of {}, written by one process and hashed by another\n\n{:<8}{:>14}{:>10}{:>8}{:>12}{:>12}{:>14}{:>16}\n",
        ByteSize(bytes),
        ByteSize(message as u64),
        "over",
        "bytes",
        "seconds",
        "GB/s",
        "messages",
        "switches",
        "CPU s sender",
        "CPU s receiver"
    );
    for Row { over, time, messages, sender, report } in rows {
        let seconds = time.as_secs_f64();
        text.push_str(&format!(
            "{:<8}{:>14}{:>10.3}{:>8.2}{:>12}{:>12}{:>14.3}{:>16.3}\n",
            over.name(),
            report.bytes,
            seconds,
            report.bytes as f64 / seconds / 1e9,
            messages,
            sender.switches + report.spent.switches,
            sender.cpu.as_secs_f64(),
            report.spent.cpu.as_secs_f64(),
        ));
    }
    text + &format!("\nAll hashes are equal: {hash:032x} (XXH3-128).\n")
}
