//! What `--help` says of a command behind its options, and its man page in sections of their own (`generate.rs`). A section
//! begins with its title. An item is indented by two blanks; what it means stands behind two more, or further indented in
//! the lines below.

macro_rules! status {
    () => {
        "\
Exit status:
  0  it did what was asked
  1  something went wrong; standard error says what, and what to do
  2  the command line is not understood
  A reader that closes the pipe ends it as SIGPIPE does (141 in a shell)."
    };
}

macro_rules! broker {
    () => {
        "

Environment:
  FBUF_BROKER      where the broker listens, if there is no --socket
  XDG_RUNTIME_DIR  the folder with the socket of a broker of one's own

Files:
  $XDG_RUNTIME_DIR/fbuf.sock  the socket of a broker of one's own
  /run/fbuf/broker.sock       the socket of the machine's broker, asked if there is no other"
    };
}

pub(crate) const FBUF: &str = concat!(
    status!(),
    broker!(),
    "

Examples:
  fbuf broker &
      Runs a broker that serves the own user
  fbuf recv pictures copy & fbuf send pictures big.iso
      Sends a file from one process to another
  fbuf ls; fbuf top
      Shows what is going on
  fbuf demo
      Compares fbufs with a pipe and a Unix socket, without a broker that is there"
);

pub(crate) const BROKER: &str = "\
Exit status:
  0  it was stopped by SIGTERM or SIGINT
  1  it could not listen, or serve; standard error says why
  2  the command line is not understood
  A log that cannot be written is no reason to end.

Metrics:
  fbuf_messages_total, fbuf_bytes_total, fbuf_left_out_total, fbuf_waits_total, fbuf_sleeps_total, fbuf_violations_total
      What endpoints have done since the broker started, those that have ended as well
  fbuf_endpoints, fbuf_links, fbuf_slots, fbuf_held, fbuf_oldest_held_milliseconds, fbuf_forgotten
      What is open now
  fbuf_used
      What a user takes up of its quota
  fbuf_clients, fbuf_channels
      How many there are
  Endpoints of one user, channel, program and label are one series of the first twelve, with the labels end (sender or
  receiver), uid, channel, program and label. There are at most 6168 such series: what has none of its own is summed up
  under other=\"true\".

Environment:
  FBUF_BROKER, XDG_RUNTIME_DIR  where it listens, if there is no --socket
  RUST_LOG                      what is logged, for example fbuf_broker=debug
  NO_COLOR                      no colours in the log

Files:
  $XDG_RUNTIME_DIR/fbuf.sock  where it listens, if nothing else is said
  /run/fbuf/broker.sock       where it listens without a folder for the user; clients ask there last
  /etc/fbuf/policy.toml       the policy of the broker that a package installs

Examples:
  fbuf broker
      Serves the own user
  fbuf broker --socket /run/x/fbuf.sock --allow alice
      Serves one more user, at a place that both can reach
  fbuf broker --check-policy policy.toml
      Says what a policy allows
  fbuf broker --policy policy.toml --metrics 127.0.0.1:9464
      Serves the users of a policy, and Prometheus";

pub(crate) const SEND: &str = concat!(
    "\
Exit status:
  0  all of the input was sent, and every receiver has written it out; or, with --lossy, it was
     sent, or left out for receivers that were slow, which exit with 3
  1  something else; standard error says what. If a receiver left, failed or died before the
     end, the others get the rest and exit with 0; if the input could not be read, with 3
  2  the command line is not understood, or the channel is missing",
    broker!(),
    "

Examples:
  fbuf send pictures big.iso
      Sends a file to the next receiver
  tar c folder | fbuf send backup --receivers 2
      Sends what another command prints, once two receivers are there
  fbuf send pictures big.iso --to-users alice,bob
      Sends to receivers of other users, which have to accept it: fbuf recv pictures --from-users NAME
  fbuf send frames video.raw --slot-size 8MiB --protection leased
      Sends long messages that no code can change while a receiver reads them
  journalctl -f | fbuf send log --lossy
      Sends what another command prints as it comes, whatever receivers do"
);

pub(crate) const RECV: &str = concat!(
    "\
Exit status:
  0  the sender has ended its stream, and all of it was written
  1  something else went wrong; standard error says what, and the sender exits with 1
  2  the command line is not understood
  3  what was written is not all: the sender died or failed before it ended its stream,
     had begun before this receiver was linked, or is lossy and left messages out
  A reader that closes the pipe ends it as SIGPIPE does (141 in a shell).",
    broker!(),
    "

Examples:
  fbuf recv pictures copy.iso
      Receives one stream into a file
  fbuf recv backup | tar x
      Receives into another command
  fbuf recv pictures --from-users alice
      Receives what another user sends
  fbuf recv frames --require sealed --max-slot-size 64MiB
      Takes nothing that a sender could change later, and longer messages of other users"
);

pub(crate) const DEMO: &str = concat!(
    status!(),
    "

Examples:
  fbuf demo
      Streams 4 GiB of generated data each way
  fbuf demo big.iso --over fbuf,pipe --message 64KiB
      Streams a file, in shorter messages"
);

#[cfg(feature = "bench")]
pub(crate) const BENCH: &str = concat!(
    status!(),
    "

Examples:
  fbuf bench latency --size 64,1MiB
      How long a message takes one way
  fbuf bench all --out report
      Everything, as a page with plots in a folder"
);

pub(crate) const LS: &str = concat!(
    status!(),
    broker!(),
    "

Examples:
  fbuf ls
      Lists every endpoint, and says which are not paired, and why
  fbuf ls --by client
      Lists processes
  fbuf ls --json
      Prints a line of JSON for each, for scripts"
);

pub(crate) const TOP: &str = concat!(
    status!(),
    broker!(),
    "

Examples:
  fbuf top --by channel
      Begins with a line for each channel
  fbuf top --every 0.5
      Looks twice a second"
);

pub(crate) const DOCTOR: &str = concat!(
    "\
Exit status:
  0  all that fbuf needs works here
  1  something that it needs is missing, or could not be tried
  2  the command line is not understood",
    broker!(),
    "

Examples:
  fbuf doctor
      Says what this machine offers, and how to get what is missing
  fbuf doctor --socket /run/x/fbuf.sock
      Tries the broker that listens there as well"
);
