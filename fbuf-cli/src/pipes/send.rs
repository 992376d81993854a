//! `fbuf send`.

use std::{
    iter,
    path::{Path, PathBuf},
};

use bytesize::ByteSize;
use fbuf_client::{AllocateError, Departure, DisconnectReason, Fbuf, Sender, WaitError, WriteError};

use super::{Accepted, FAILED, For, Level, SILENCE, Users, Waiting, is_own, list, of_users};
use crate::{
    Failure, Place, WaitArgument,
    standard::{self, Input, say, while_it_takes_long},
};

#[derive(Debug, clap::Args)]
pub(crate) struct SendArguments {
    /// The channel
    channel: String,
    /// What to send; `-` is standard input [default: standard input]
    file: Option<PathBuf>,
    /// The longest message
    #[arg(long, value_name = "BYTES", value_parser = fbuf_broker::size, default_value = "1MiB")]
    slot_size: ByteSize,
    /// How many messages may be under way [default: as many as suit the caches of this machine]
    #[arg(long, value_name = "COUNT")]
    slots: Option<usize>,
    /// What `fbuf ls`, `fbuf top` and metrics call this sender
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// Send to receivers of these users only: names or ids between commas, or `*` for all users [default: your own and root]
    #[arg(long, value_name = "USERS", value_parser = Users::parse)]
    to_users: Option<Users>,
    /// What receivers may rely on
    #[arg(long, value_name = "LEVEL", value_enum, default_value = "volatile")]
    protection: Level,
    /// Never wait for receivers that are slow: leave messages out for them, which they report
    #[arg(long)]
    lossy: bool,
    /// How many receivers to wait for
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    receivers: usize,
    /// What to do while all slots are in use
    #[arg(long, value_enum, default_value = "adaptive")]
    wait: WaitArgument,
}

pub(crate) fn send(arguments: &SendArguments, place: &Place) -> Result<(), Failure> {
    if arguments.file.is_none() {
        reject_file_as_channel(&arguments.channel)?;
    }
    let mut input = Input::open(arguments.file.as_deref())?;
    let client = place.connect()?;
    let mut builder =
        client.sender(&arguments.channel).slot_size(arguments.slot_size.as_u64() as usize).wait(arguments.wait.into());
    if let Some(label) = &arguments.label {
        builder = builder.label(label);
    }
    if let Some(slots) = arguments.slots {
        builder = builder.slots(slots);
    }
    if arguments.lossy {
        builder = builder.lossy();
    }
    builder = match Accepted::of(arguments.to_users.as_ref()) {
        Accepted::All => builder,
        Accepted::Users(users) => builder.to_users(users),
        Accepted::Own => builder.accept(is_own),
    };
    let builder = builder.protection(arguments.protection.into()).require_finish();
    let what = format!("the channel {:?} is opened, and its memory reserved", arguments.channel);
    let mut sender = while_it_takes_long(&what, || builder.open())?;
    if arguments.protection != Level::Volatile {
        say(format_args!("messages are {}", sender.protection_info()));
    }
    let mut waiting = Waiting::new(&arguments.channel, &client);
    match stream(&mut sender, &mut input, arguments, &mut waiting) {
        Ok(lost) => {
            sender.finish();
            match lost {
                0 => Ok(()),
                lost => Err(Failure::new(format!("{lost} of the receivers did not get everything; the others did"))),
            }
        }
        // No receiver takes what it has got for all.
        Err(failure) => {
            sender.abort(FAILED);
            Err(failure)
        }
    }
}

/// `fbuf send FILE` has one argument, which is the channel: if it is the path of a file, the channel was forgotten.
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

/// Sends all of the input, and waits until every receiver has written it out, unless messages may be left out for it. Says how
/// many receivers were lost before the end.
fn stream(
    sender: &mut Sender,
    input: &mut Input,
    arguments: &SendArguments,
    waiting: &mut Waiting,
) -> Result<usize, Failure> {
    let &SendArguments { receivers, lossy, .. } = arguments;
    if let Err(failure) = input.reject_folder() {
        // A receiver that waits already hears of it as well.
        let _ = sender.wait_for_receivers_timeout(1, SILENCE);
        return Err(failure);
    }
    wait_for_receivers(sender, arguments, waiting)?;
    let mut lost = 0;
    loop {
        let mut fbuf = allocate(sender, waiting)?;
        if fbuf.read_once_from(input).map_err(|error| input.failure(&error))? == 0 {
            break;
        }
        let written = sender.write(fbuf);
        complain(sender, &mut lost)?;
        written.map_err(|error| match error {
            WriteError::NoReceiver { .. } if receivers == 0 => {
                Failure::new("there is no receiver, and none was to be waited for: give --receivers 1")
            }
            WriteError::NoReceiver { .. } => Failure::new("every receiver left before the end"),
            other => other.into(),
        })?;
    }
    match sender.counters().skipped {
        _ if !lossy => wait_for_returns(sender, waiting)?,
        0 => {}
        skipped => say(format_args!("{skipped} messages were left out for receivers that were slow")),
    }
    complain(sender, &mut lost)?;
    Ok(lost)
}

fn wait_for_receivers(
    sender: &mut Sender,
    SendArguments { receivers, to_users, .. }: &SendArguments,
    waiting: &mut Waiting,
) -> Result<(), Failure> {
    let of_users = |ends: &str| of_users(ends, to_users.as_ref(), "--to-users");
    loop {
        match sender.wait_for_receivers_timeout(*receivers, SILENCE) {
            Err(WaitError::TimedOut { wanted, linked, failure }) => {
                waiting.say(For::Peers, || match (wanted, linked) {
                    (1, _) => of_users("waiting for a receiver"),
                    _ => format!(
                        "{}, of which {linked} are linked,",
                        of_users(&format!("waiting for {wanted} receivers"))
                    ),
                });
                waiting.say_unpaired(|| sender.unpaired());
                waiting.say_failure(failure);
            }
            Err(WaitError::Interrupted) => {}
            result => {
                result?;
                return Ok(());
            }
        }
    }
}

fn allocate(sender: &mut Sender, waiting: &mut Waiting) -> Result<Fbuf, Failure> {
    loop {
        match sender.allocate_timeout(SILENCE) {
            Err(AllocateError::TimedOut { slots }) => {
                waiting.say(For::Slots, || format!("waiting for one of {slots} slots, in use by {},", holders(sender)));
            }
            // By a handler of a library that was preloaded.
            Err(AllocateError::Interrupted) => {}
            result => return Ok(result?),
        }
    }
}

/// Waits until every receiver has written out what it got.
fn wait_for_returns(sender: &mut Sender, waiting: &mut Waiting) -> Result<(), Failure> {
    loop {
        match sender.wait_for_returns_timeout(SILENCE) {
            Err(WaitError::StillLent { .. }) => {
                waiting.say(For::Returns, || format!("waiting for {} to write out the rest", holders(sender)));
            }
            Err(WaitError::Interrupted) => {}
            result => return Ok(result?),
        }
    }
}

/// Which receivers have how many messages.
fn holders(sender: &Sender) -> String {
    list(sender.lent().map(|(peer, messages)| format!("{} ({messages})", peer.process)))
}

/// Says which receivers went before the end and so have not got everything. Those that remain get the rest.
///
/// # Errors
/// None remains.
fn complain(sender: &mut Sender, lost: &mut usize) -> Result<(), Failure> {
    let mut gone: Vec<_> = iter::from_fn(|| sender.next_departure()).map(describe).collect();
    *lost += gone.len();
    let failure = if sender.receivers() == 0 { gone.pop() } else { None };
    gone.iter().for_each(say);
    failure.map_or(Ok(()), |text| Err(Failure::new(text)))
}

/// How a receiver went.
fn describe(Departure { peer, reason, unread, .. }: Departure) -> String {
    let unread = unread.map_or(String::new(), |unread| format!(", with {} messages unread", unread.messages));
    let how = match reason {
        DisconnectReason::Left => "left before the end".to_owned(),
        DisconnectReason::Failed { .. } => "failed before the end: see what it says".to_owned(),
        DisconnectReason::Died => "died before the end".to_owned(),
        DisconnectReason::Violation { violation } => format!("broke a rule: {violation}"),
        DisconnectReason::Exhausted { what } => format!("could not be linked: {what}"),
        _ => "is gone".to_owned(),
    };
    format!("the receiver ({}) {how}{unread}", peer.process)
}
