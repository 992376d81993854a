//! `fbuf recv`.

use std::path::PathBuf;

use bytesize::ByteSize;
use fbuf_client::{GetError, Received, Receiver, ReceiverCounters};

use super::{Accepted, FAILED, For, Level, SILENCE, Users, Waiting, is_own, list, of_users};
use crate::{
    Failure, Place, WaitArgument,
    standard::{Output, say},
};

/// The status if what was written is not a whole stream.
const INCOMPLETE: u8 = 3;

#[derive(Debug, clap::Args)]
pub(crate) struct RecvArguments {
    /// The channel
    channel: String,
    /// Where to write; `-` is standard output [default: standard output]
    file: Option<PathBuf>,
    /// What `fbuf ls`, `fbuf top` and metrics call this receiver
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// Receive from senders of these users only: names or ids between commas, or `*` for all users [default: your own and root]
    #[arg(long, value_name = "USERS", value_parser = Users::parse)]
    from_users: Option<Users>,
    /// Refuse senders with messages that are protected less than this
    #[arg(long, value_name = "LEVEL", value_enum, default_value = "volatile")]
    require: Level,
    /// Accept senders with slots of at most so many bytes [default: 4MiB of other users, any of one's own]
    #[arg(long, value_name = "BYTES", value_parser = fbuf_broker::size)]
    max_slot_size: Option<ByteSize>,
    /// What to do while there is no message
    #[arg(long, value_enum, default_value = "adaptive")]
    wait: WaitArgument,
}

pub(crate) fn receive(arguments: &RecvArguments, place: &Place) -> Result<(), Failure> {
    let client = place.connect()?;
    // Before a sender could be linked, which would then be told that its receiver has left.
    let mut output = Output::open(arguments.file.as_deref())?;
    let mut builder = client.receiver(&arguments.channel).wait(arguments.wait.into());
    if let Some(label) = &arguments.label {
        builder = builder.label(label);
    }
    if let Some(bytes) = arguments.max_slot_size {
        builder = builder.max_slot_size(bytes.as_u64() as usize);
    }
    builder = match Accepted::of(arguments.from_users.as_ref()) {
        Accepted::All => builder,
        Accepted::Users(users) => builder.from_users(users),
        Accepted::Own => builder.accept(is_own),
    };
    let mut receiver = builder.require(arguments.require.into()).open()?;
    let mut waiting = Waiting::new(&arguments.channel, &client);
    let mut only = None;
    loop {
        let received = match next(&mut receiver, arguments, only.is_some(), &mut waiting) {
            Ok(received) => received,
            Err(GetError::Ended) => break,
            Err(error) => {
                // Other senders go on, and are to hear that this receiver does not.
                receiver.abort(FAILED);
                return Err(Failure::from(error).with_status(INCOMPLETE));
            }
        };
        // A file keeps what is in it until something comes in its place.
        let emptied = if only.is_none() { output.truncate() } else { Ok(()) };
        let put =
            emptied.and_then(|()| admit(&mut only, &received, &arguments.channel)).and_then(|()| output.put(&received));
        if let Err(failure) = put {
            // Before the message goes back, which its sender would take for written.
            receiver.abort(FAILED);
            return Err(failure);
        }
    }
    if only.is_none() {
        output.truncate()?;
    }
    output.finish()?;
    let ReceiverCounters { missed_before, missed, .. } = receiver.counters();
    let lacks = [(missed_before > 0).then(|| late(missed_before)), (missed > 0).then(|| left_out(missed))];
    let lacks: Vec<_> = lacks.into_iter().flatten().collect();
    if lacks.is_empty() { Ok(()) } else { Err(Failure::new(lacks.join("; ")).with_status(INCOMPLETE)) }
}

/// Waits for the next message.
fn next(
    receiver: &mut Receiver,
    RecvArguments { from_users, .. }: &RecvArguments,
    has_begun: bool,
    waiting: &mut Waiting,
) -> Result<Received, GetError> {
    loop {
        match receiver.get_timeout(SILENCE) {
            // By a handler of a library that was preloaded.
            Err(GetError::Interrupted) => {}
            // A sender may pause for as long as it likes once it has begun.
            Err(GetError::TimedOut) if has_begun => {}
            Err(GetError::TimedOut) => {
                let peers = || list(receiver.peers().map(|peer| peer.process.to_string()));
                match (receiver.peers().count(), receiver.senders()) {
                    (0, _) => {
                        let sender = || of_users("waiting for a sender", from_users.as_ref(), "--from-users");
                        waiting.say(For::Peers, sender);
                        waiting.say_unpaired(|| receiver.unpaired());
                        waiting.say_failure(receiver.link_failure());
                    }
                    (_, 0) => waiting.say(For::Link, || format!("waiting for {} to answer this receiver", peers())),
                    _ => waiting.say(For::FirstMessage, || format!("waiting for the first message of {}", peers())),
                }
            }
            result => return result,
        }
    }
}

/// One file can take one stream only, from its beginning.
fn admit(only: &mut Option<u64>, received: &Received, channel: &str) -> Result<(), Failure> {
    let sender = received.sender();
    match *only {
        Some(endpoint) if endpoint == sender.endpoint => Ok(()),
        Some(_) => Err(Failure::new(format!(
            "{} sends on the channel {channel:?} as well: one file can take one stream only",
            sender.process
        ))),
        None => {
            *only = Some(sender.endpoint);
            if received.sequence() > 0 {
                say(late(received.sequence()));
            }
            Ok(())
        }
    }
}

fn late(missed: u64) -> String {
    format!("the beginning is missing: {missed} messages had been sent before this receiver was linked")
}

fn left_out(missed: u64) -> String {
    format!("{missed} messages are missing: their sender is lossy, and left them out while this receiver was behind")
}
