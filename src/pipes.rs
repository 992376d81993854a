//! `fbuf send` and `fbuf recv`: a channel as a pipe between two shells.

use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use fbuf_client::{Farewell, GetError, Protection, Sender};

use crate::{
    Failure, Place, WaitArgument,
    standard::{self, Input, Output, say, while_it_takes_long},
};

#[derive(Debug, clap::Args)]
pub(crate) struct SendArguments {
    /// The channel
    channel: String,
    /// What to send; `-` is standard input [default: standard input]
    file: Option<PathBuf>,
    /// The longest message
    #[arg(long, value_name = "BYTES", value_parser = fbuf_bench::size, default_value = "1MiB")]
    slot_size: ByteSize,
    /// How many messages may be under way [default: as many as suit the caches of this machine]
    #[arg(long, value_name = "COUNT")]
    slots: Option<u64>,
    /// What receivers may rely on
    #[arg(long, value_name = "LEVEL", value_enum, default_value = "volatile")]
    protection: Level,
    /// How many receivers to wait for
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    receivers: usize,
    /// What to do while all slots are in use
    #[arg(long, value_enum, default_value = "adaptive")]
    wait: WaitArgument,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RecvArguments {
    /// The channel
    channel: String,
    /// Where to write; `-` is standard output [default: standard output]
    file: Option<PathBuf>,
    /// Refuse senders whose messages are protected less than this
    #[arg(long, value_name = "LEVEL", value_enum, default_value = "volatile")]
    require: Level,
    /// What to do while there is no message
    #[arg(long, value_enum, default_value = "adaptive")]
    wait: WaitArgument,
}

/// What a receiver may rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Level {
    /// The sender's safe code does not change messages that it has sent
    Volatile,
    /// No code can change them; I/O into memory that was pinned before could
    Leased,
    /// Nothing can change them
    Sealed,
}

impl From<Level> for Protection {
    fn from(level: Level) -> Self {
        match level {
            Level::Volatile => Self::Volatile,
            Level::Leased => Self::Leased,
            Level::Sealed => Self::Sealed,
        }
    }
}

pub(crate) fn send(arguments: &SendArguments, place: &Place) -> Result<(), Failure> {
    if arguments.file.is_none() {
        reject_file_as_channel(&arguments.channel)?;
    }
    let mut input = Input::open(arguments.file.as_deref())?;
    let client = place.connect()?;
    let mut builder =
        client.sender(&arguments.channel).slot_size(arguments.slot_size.as_u64()).wait(arguments.wait.into());
    if let Some(slots) = arguments.slots {
        builder = builder.slots(slots);
    }
    let builder = builder.protection(arguments.protection.into());
    let what = format!("the channel {:?} is opened, and its memory reserved", arguments.channel);
    let mut sender = while_it_takes_long(&what, || builder.open())?;
    if arguments.protection != Level::Volatile {
        say(format_args!("messages are {}", sender.granted()));
    }
    sender.wait_for_receivers(arguments.receivers)?;
    loop {
        let mut fbuf = sender.allocate()?;
        match fbuf.read_from(&mut input) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => return Err(Failure::new(format!("the input could not be read: {error}"))),
        }
        let written = sender.write(fbuf).map_err(|error| error.to_string());
        complain(&mut sender)?;
        written.map_err(Failure::new)?;
    }
    // Not before every receiver has written out what it got.
    sender.wait_for_returns()?;
    complain(&mut sender)
}

/// `fbuf send FILE` has one argument, which is the channel: whoever gives it a file has forgotten the channel.
fn reject_file_as_channel(channel: &str) -> Result<(), Failure> {
    let is_file = Path::new(channel).is_file();
    // A channel may well be called like a file that is in this folder, if there is something to send.
    if is_file && (channel.contains('/') || standard::has_no_input()) {
        return Err(Failure::usage(format!(
            "no channel was given, only the file {channel}: say `fbuf send CHANNEL {channel}`, or, if that is the \
             channel, `fbuf send {channel} -` to send standard input"
        )));
    }
    Ok(())
}

/// A receiver that went before the end has not got everything.
fn complain(sender: &mut Sender) -> Result<(), Failure> {
    let Some(departure) = sender.departed() else { return Ok(()) };
    let process = departure.peer.process;
    Err(Failure::new(match departure.farewell {
        Farewell::Left => format!("the receiver ({process}) left before the end"),
        Farewell::Died => format!("the receiver ({process}) died before the end"),
        Farewell::Violation(violation) => format!("the receiver ({process}) broke a rule: {violation}"),
        Farewell::Exhausted(what) => format!("the receiver ({process}) could not be linked: {what}"),
        _ => format!("the receiver ({process}) is gone"),
    }))
}

pub(crate) fn receive(arguments: &RecvArguments, place: &Place) -> Result<(), Failure> {
    let client = place.connect()?;
    // Before a sender could be linked, which would then be told that its receiver has left.
    let mut output = Output::open(arguments.file.as_deref())?;
    let builder = client.receiver(&arguments.channel).wait(arguments.wait.into());
    let mut receiver = builder.require(arguments.require.into()).open()?;
    output.truncate()?;
    let mut only = None;
    loop {
        let received = match receiver.get() {
            Ok(received) => received,
            Err(GetError::Ended) => return output.finish(),
            Err(error @ GetError::Disconnected(_)) => return Err(Failure::from(error).with_status(3)),
            Err(error) => return Err(error.into()),
        };
        let sender = received.sender();
        let first = *only.get_or_insert(sender.endpoint);
        if sender.endpoint != first {
            return Err(Failure::new(format!(
                "{} sends on the channel {:?} as well: one file can take one stream only",
                sender.process, arguments.channel
            )));
        }
        output.put(&received)?;
    }
}
