//! `fbuf generate`: man pages and completions, from the same words as `--help`. Part of every build, since it
//! takes two small crates, and the command can then write both. Pages about no command are written by hand.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, Command, ValueEnum};
use clap_complete::Shell;
use clap_mangen::{
    Man,
    roff::{Roff, bold, italic, roman},
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
    /// A page for the command, one for each subcommand, and those about concepts and policies
    Man,
    /// A file for each shell
    Completions,
}

/// The pages about no command, by the names of their files.
const OTHERS: [(&str, &str); 2] =
    [("fbuf.7", include_str!("pages/fbuf.7")), ("fbuf-policy.5", include_str!("pages/fbuf-policy.5"))];

pub(crate) fn run(arguments: &Arguments, command: Command) -> Result<(), Failure> {
    let Arguments { what, folder } = arguments;
    let written = fs::create_dir_all(folder).and_then(|()| match what {
        What::Man => {
            let mut command = command.disable_help_subcommand(true);
            command.build();
            let source = source(&command);
            let mut others = OTHERS.iter().map(|(name, page)| (folder.join(name), page.replace("@SOURCE@", &source)));
            others.try_for_each(|(path, page)| fs::write(path, page))?;
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

/// What stands at the foot of a page.
fn source(command: &Command) -> String {
    format!("fbuf {}", command.get_version().unwrap_or_default())
}

fn page(command: &Command, help: &str, others: &[&str], folder: &Path) -> io::Result<()> {
    let options = command.clone().after_help(None::<&str>).version(None::<&str>);
    let man = Man::new(options).source(source(command));
    let mut file = File::create(folder.join(man.get_filename()))?;
    man.render_title(&mut file)?;
    man.render_name_section(&mut file)?;
    file.write_all(synopsis(command).to_roff().as_bytes())?;
    man.render_description_section(&mut file)?;
    man.render_options_section(&mut file)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut file)?;
    }
    let policy = title(command) == "fbuf-broker";
    file.write_all(sections(help, others, policy).to_roff().as_bytes())
}

/// How the command is called: its options with their values, then its arguments.
fn synopsis(command: &Command) -> Roff {
    let shown = || command.get_arguments().filter(|argument| !argument.is_hide_set());
    let mut roff = Roff::new();
    roff.control("SH", ["SYNOPSIS"]);
    let mut line = vec![bold(command.get_bin_name().unwrap_or_else(|| command.get_name()))];
    for argument in shown().filter(|argument| !argument.is_positional()).chain(command.get_positionals()) {
        let [before, behind] = if argument.is_required_set() { [" ", ""] } else { [" [", "]"] };
        line.push(roman(before));
        match (argument.get_long(), argument.get_short()) {
            (Some(long), _) => line.push(bold(format!("--{long}"))),
            (None, Some(short)) => line.push(bold(format!("-{short}"))),
            (None, None) => {}
        }
        if let Some(value) = value(argument) {
            line.extend((!argument.is_positional()).then(|| roman(" ")));
            line.push(italic(value));
        }
        line.push(roman(behind));
        line.extend(matches!(argument.get_action(), ArgAction::Append).then(|| roman(" ...")));
    }
    if command.has_subcommands() {
        line.extend([roman(" "), italic("command")]);
    }
    roff.text(line);
    roff
}

/// What stands for the value of an argument, if it takes one.
fn value(argument: &Arg) -> Option<String> {
    let takes_values = argument.get_action().takes_values();
    takes_values.then(|| match argument.get_value_names() {
        Some(names) => names.join(" "),
        None => argument.get_id().to_string().to_uppercase(),
    })
}

/// The sections of a help, and the other pages.
fn sections(help: &str, others: &[&str], policy: bool) -> Roff {
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
    let commands = others.iter().map(|&other| (other, 1));
    for (page, section) in commands.chain(policy.then_some(("fbuf-policy", 5))) {
        roff.text([bold(page), roman(format!("({section}),"))]);
    }
    roff.text([bold("fbuf"), roman("(7)")]);
    roff
}
