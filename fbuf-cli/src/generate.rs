//! `fbuf generate`: man pages and completions, from the same words as `--help`. Part of every build, since it
//! takes two small crates, and whoever has the command can then have both.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::{Command, ValueEnum};
use clap_complete::Shell;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

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
        What::Man => {
            let mut command = command.disable_help_subcommand(true);
            command.build();
            pages(&command, "", &[], &[], folder)
        }
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

/// Writes the page of a command, and those of the commands below it. What `--help` says behind the options is said of them
/// too, if they say nothing themselves.
fn pages(command: &Command, help: &str, above: &[&str], beside: &[&str], folder: &Path) -> io::Result<()> {
    let own = command.get_after_help().map(ToString::to_string);
    let help = own.as_deref().unwrap_or(help);
    let below: Vec<_> = command.get_subcommands().filter(|below| !below.is_hide_set()).collect();
    let names: Vec<_> = below.iter().map(|below| title(below)).collect();
    page(command, help, &[above, beside, &names].concat(), folder)?;
    let above = [above, &[title(command)]].concat();
    below.into_iter().try_for_each(|below| {
        let beside: Vec<_> = names.iter().copied().filter(|&name| name != title(below)).collect();
        pages(below, help, &above, &beside, folder)
    })
}

/// What the page of a command is called.
fn title(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

fn page(command: &Command, help: &str, others: &[&str], folder: &Path) -> io::Result<()> {
    // Its version is at the foot of the page.
    let source = format!("fbuf {}", command.get_version().unwrap_or_default());
    let options = command.clone().after_help(None::<&str>).version(None::<&str>);
    let man = Man::new(options).source(source);
    let mut file = File::create(folder.join(man.get_filename()))?;
    man.render(&mut file)?;
    file.write_all(sections(help, others).to_roff().as_bytes())
}

/// The sections of a help, and the pages of other commands.
fn sections(help: &str, others: &[&str]) -> Roff {
    let mut roff = Roff::new();
    let mut lines = help.lines().filter(|line| !line.is_empty()).peekable();
    while let Some(line) = lines.next() {
        let text = line.trim_start();
        match (line.len() - text.len(), text.split_once("  ")) {
            (0, _) => {
                roff.control("SH", [&*text.trim_end_matches(':').to_uppercase()]);
            }
            (2, Some((item, meaning))) => {
                roff.control("TP", []).text([bold(item)]).text([roman(meaning.trim_start())]);
            }
            (2, None) if lines.peek().is_some_and(|next| next.starts_with("   ")) => {
                roff.control("TP", []).text([bold(text)]);
            }
            (2, None) => {
                roff.control("PP", []).text([roman(text)]);
            }
            _ => {
                roff.text([roman(text)]);
            }
        }
    }
    roff.control("SH", ["SEE ALSO"]);
    for (at, other) in others.iter().enumerate() {
        let comma = if at + 1 < others.len() { "," } else { "" };
        roff.text([bold(*other), roman(format!("(1){comma}"))]);
    }
    roff
}
