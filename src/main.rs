//! The fbuf command.

#![forbid(unsafe_code)]

mod broker;
mod demo;
mod doctor;
mod generate;
mod pipes;
mod watch;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use fbuf_client::{Address, Client, ClientBuilder, ConnectError, Wait};

/// Shared-buffer IPC: processes exchange buffers without copying them.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the broker that introduces processes to each other
    Broker(broker::Arguments),
    /// Send a file, or standard input, to whoever receives on a channel
    Send(pipes::SendArguments),
    /// Receive what somebody sends on a channel into a file, or to standard output
    ///
    /// Exits with 0 when the sender has ended its stream and all of it was written, with 3 when the
    /// sender died before that, and with 1 for any other failure.
    Recv(pipes::RecvArguments),
    /// Stream a file through fbufs, a pipe and a Unix socket, and compare
    Demo(demo::Arguments),
    /// Measure what fbuf costs, beside other ways between two processes
    Bench(fbuf_bench::Arguments),
    /// List every endpoint, channel or client, and what it does
    Ls(watch::ls::Arguments),
    /// Watch endpoints, channels and clients in the terminal
    Top(watch::top::Arguments),
    /// Try what fbuf needs of this machine, and say what works and what to do about the rest
    Doctor,
    /// Write man pages, or completions for shells, into a folder: what a package installs
    #[command(hide = true)]
    Generate(generate::Arguments),
}

/// Something went wrong: what to say, and the exit status.
#[derive(Debug)]
struct Failure {
    text: String,
    status: u8,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { text: error.to_string(), status: 1 }
    }
}

impl Failure {
    fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), status: 1 }
    }

    fn with_status(self, status: u8) -> Self {
        Self { status, ..self }
    }
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Broker(arguments) => broker::run(arguments),
        Command::Send(arguments) => pipes::send(&arguments),
        Command::Recv(arguments) => pipes::receive(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Bench(arguments) => fbuf_bench::run(&arguments).map_err(|error| Failure::new(error.to_string())),
        Command::Ls(arguments) => watch::ls::run(&arguments),
        Command::Top(arguments) => watch::top::run(&arguments),
        Command::Doctor => return doctor::run(),
        Command::Generate(arguments) => generate::run(&arguments, crate::Arguments::command()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { text, status }) => {
            eprintln!("fbuf: {text}");
            ExitCode::from(status)
        }
    }
}

/// Which broker to speak to.
#[derive(Debug, clap::Args)]
struct Place {
    /// Where the broker listens [default: $FBUF_BROKER, $XDG_RUNTIME_DIR/fbuf.sock, /run/fbuf/broker.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<std::ffi::OsString>,
    /// Accept a broker that this user runs, by number, besides one of root or of one's own
    #[arg(long, value_name = "UID")]
    broker_user: Option<u32>,
}

impl Place {
    fn connect(&self) -> Result<Client, ConnectError> {
        let mut builder = Client::builder();
        if let Some(socket) = &self.socket {
            builder = builder.address(&Address::new(socket));
        }
        self.broker_user.into_iter().fold(builder, ClientBuilder::broker_user).connect()
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
