//! `fbuf generate`: man pages and completions, from the same words as `--help`. Part of every build, since it
//! takes two small crates, and whoever has the command can then have both.

use std::{fs, io, path::PathBuf};

use clap::{Command, ValueEnum};
use clap_complete::Shell;

use crate::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to write
    #[arg(value_enum)]
    what: What,
    /// Where; the folder is made if it is not there
    folder: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// A page for the command, and one for each subcommand
    Man,
    /// A file for each shell
    Completions,
}

pub(crate) fn run(arguments: &Arguments, command: Command) -> Result<(), Failure> {
    let Arguments { what, folder } = arguments;
    let written = fs::create_dir_all(folder).and_then(|()| match what {
        What::Man => clap_mangen::generate_to(command, folder),
        What::Completions => completions(command, folder),
    });
    written.map_err(|error| Failure::new(format!("{}: {error}", folder.display())))
}

fn completions(mut command: Command, folder: &PathBuf) -> io::Result<()> {
    let name = command.get_name().to_owned();
    Shell::value_variants()
        .iter()
        .try_for_each(|&shell| clap_complete::generate_to(shell, &mut command, &name, folder).map(drop))
}
