//! The fbuf command.

mod broker;
mod demo;
mod doctor;
mod failure;
mod generate;
mod help;
mod pipes;
mod signals;
mod standard;
mod watch;

use std::{ffi::OsString, process::ExitCode};

use clap::{
    CommandFactory, Parser, Subcommand, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use fbuf_client::{Address, Client, ClientBuilder, ConnectError, Wait};
use nix::unistd::User;

use failure::Failure;

/// Shared-buffer IPC: processes exchange buffers without copying them.
#[derive(Debug, Parser)]
#[command(name = "fbuf", version, propagate_version = true, arg_required_else_help = true, after_help = help::FBUF)]
struct Arguments {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the broker that introduces processes to each other
    #[command(after_help = help::BROKER)]
    Broker(broker::Arguments),
    /// Send a file, or standard input, to the receivers on a channel
    ///
    /// What it waits for for longer than a second, it says on standard error.
    #[command(after_help = help::SEND)]
    Send(pipes::SendArguments),
    /// Receive what is sent on a channel into a file, or to standard output
    ///
    /// What it waits for for longer than a second, it says on standard error.
    #[command(after_help = help::RECV)]
    Recv(pipes::RecvArguments),
    /// Stream a file through fbufs, a pipe and a Unix socket, and compare
    #[command(after_help = help::DEMO)]
    Demo(demo::Arguments),
    /// Measure what fbuf costs, beside other ways between two processes
    #[cfg(feature = "bench")]
    #[command(after_help = help::BENCH)]
    Bench(fbuf_bench::Arguments),
    /// List every endpoint, channel or client, and what it does
    #[command(after_help = help::LS)]
    Ls(watch::ls::Arguments),
    /// Watch endpoints, channels and clients in the terminal
    #[command(after_help = help::TOP)]
    Top(watch::top::Arguments),
    /// Try what fbuf needs of this machine, and say what works and what to do about the rest
    #[command(after_help = help::DOCTOR)]
    Doctor,
    /// Write man pages, or completions for shells, into a folder: what a package installs
    #[command(hide = true)]
    Generate(generate::Arguments),
}

fn main() -> ExitCode {
    // A log, or what is received, may go to a file that must not grow further.
    fbuf_core::process::sys::ignore_file_size_signal();
    let Arguments { place, command } = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return standard::explain(&error),
    };
    let result = place.reject_unused(&command).and_then(|()| hear_signals(&command)).and_then(|()| match command {
        Command::Broker(arguments) => broker::run(arguments, &place),
        Command::Send(arguments) => pipes::send(&arguments, &place),
        Command::Recv(arguments) => pipes::receive(&arguments, &place),
        Command::Demo(arguments) => demo::run(&arguments),
        #[cfg(feature = "bench")]
        Command::Bench(arguments) => bench(&arguments),
        Command::Ls(arguments) => watch::ls::run(&arguments, &place),
        Command::Top(arguments) => watch::top::run(&arguments, &place),
        Command::Doctor => doctor::run(&place),
        Command::Generate(arguments) => generate::run(&arguments, crate::Arguments::command()),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => standard::end(failure),
    }
}

/// As the first process of a container, a command ends by signals as it would elsewhere. Two have their own ways.
fn hear_signals(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Broker(_) | Command::Top(_) => Ok(()),
        _ if signals::is_first_process() => signals::before_the_end(|| {}),
        _ => Ok(()),
    }
}

#[cfg(feature = "bench")]
fn bench(arguments: &fbuf_bench::Arguments) -> Result<(), Failure> {
    let mut output = standard::Output::standard()?;
    let result = fbuf_bench::run(arguments, &mut output);
    // An output that failed is the reason of whatever failed then.
    output.finish()?;
    result.map_err(|error| Failure::new(error.to_string()))
}

/// Which broker to speak to.
#[derive(Debug, Default, clap::Args)]
struct Place {
    /// Where the broker listens [default: $FBUF_BROKER, $XDG_RUNTIME_DIR/fbuf.sock, /run/fbuf/broker.sock]
    #[arg(long, global = true, value_name = "PATH", value_parser = OsStringValueParser::new().try_map(address))]
    socket: Option<Address>,
    /// Accept a broker that this user runs, besides one of root or of one's own
    #[arg(long, global = true, value_name = "USER", value_parser = user)]
    broker_user: Option<u32>,
}

fn address(text: OsString) -> Result<Address, &'static str> {
    if text.is_empty() { Err("it is empty: give a path, or @ and a name") } else { Ok(Address::new(text)) }
}

/// A user, by name or number.
fn user(text: &str) -> Result<u32, String> {
    match (text.parse(), User::from_name(text)) {
        (Ok(number), _) => Ok(number),
        (_, Ok(Some(user))) => Ok(user.uid.as_raw()),
        (_, Ok(None)) => Err("there is no user of that name: correct it, or give a number".into()),
        (_, Err(error)) => Err(format!("users cannot be looked up ({error}): give a number")),
    }
}

impl Place {
    fn address(&self) -> Address {
        self.socket.clone().unwrap_or_else(Address::default_for_user)
    }

    fn connect(&self) -> Result<Client, ConnectError> {
        let builder = self.socket.iter().fold(Client::builder(), ClientBuilder::address);
        self.broker_user.into_iter().fold(builder, ClientBuilder::broker_user).connect()
    }

    /// An option that says nothing to a command is an error.
    fn reject_unused(&self, command: &Command) -> Result<(), Failure> {
        let (socket, user) = (self.socket.is_some(), self.broker_user.is_some());
        let has_own_broker = match command {
            Command::Demo(_) | Command::Generate(_) => true,
            #[cfg(feature = "bench")]
            Command::Bench(_) => true,
            _ => false,
        };
        match command {
            _ if has_own_broker && (socket || user) => {
                Err(Failure::usage("--socket and --broker-user are for commands that speak to a broker which is there"))
            }
            Command::Broker(_) | Command::Doctor if user => {
                Err(Failure::usage("--broker-user is for commands that connect to a broker"))
            }
            _ => Ok(()),
        }
    }
}

/// What to do while there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WaitArgument {
    /// Look again and again
    Spin,
    /// Look for a while, then sleep
    Adaptive,
    /// Sleep at once
    Block,
}

impl From<WaitArgument> for Wait {
    fn from(wait: WaitArgument) -> Self {
        match wait {
            WaitArgument::Spin => Self::Spin,
            WaitArgument::Adaptive => Self::Adaptive,
            WaitArgument::Block => Self::Block,
        }
    }
}
