//! `fbuf generate`: what a package installs beside the command.

mod support;

use std::{collections::BTreeSet, fs, process::Command};

use support::{Run, fbuf};

/// The subcommands that the help of a command names.
fn subcommands(words: &[&str]) -> Vec<String> {
    let output = fbuf(words).arg("--help").run();
    let help = String::from_utf8(output.stdout).unwrap();
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // What goes on in a second line is indented further.
    let names = lines
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next().filter(|_| !line.starts_with("   ")));
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

fn generated(what: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    // Into a folder that is not there yet.
    assert!(fbuf(["generate", what]).arg(folder.path().join("new")).run_to_its_end().success());
    folder
}

#[test]
fn each_subcommand_has_a_page_that_says_what_its_help_says() {
    let folder = generated("man");
    let mut expected = BTreeSet::from(["fbuf.1", "fbuf.7", "fbuf-policy.5"].map(str::to_owned));
    let top = subcommands(&[]);
    assert!(["broker", "send", "recv", "bench"].iter().all(|name| top.iter().any(|found| found == name)), "{top:?}");
    for name in top {
        expected.extend(subcommands(&[&name]).iter().map(|below| format!("fbuf-{name}-{below}.1")));
        expected.insert(format!("fbuf-{name}.1"));
    }
    let entries = fs::read_dir(folder.path().join("new")).unwrap();
    let found: BTreeSet<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(found, expected);
    let page = fs::read_to_string(folder.path().join("new/fbuf-broker.1")).unwrap();
    for word in [".TH fbuf-broker 1", "\\-\\-policy", "read again on SIGHUP"] {
        assert!(page.contains(word), "{word} is missing from {page}");
    }
}

/// The sections of a page, each with its words.
fn sections(page: &str) -> Vec<(String, String)> {
    let plain = |line: &str| {
        let line = ["\\fB", "\\fR", "\\&"].iter().fold(line.to_owned(), |line, font| line.replace(font, ""));
        line.replace("\\-", "-")
    };
    let mut sections = Vec::<(String, String)>::new();
    for line in page.lines() {
        match (line.strip_prefix(".SH "), sections.last_mut()) {
            (Some(title), _) => sections.push((title.trim_matches('"').to_owned(), String::new())),
            (None, Some((_, words))) if !line.starts_with('.') => *words += &format!("{}\n", plain(line)),
            _ => {}
        }
    }
    sections
}

/// Words with single blanks between them.
fn spaced(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn each_page_has_the_sections_of_its_help_and_names_the_other_pages() {
    let folder = generated("man");
    let page = |name: &str| {
        let page = fs::read_to_string(folder.path().join("new").join(format!("{name}.1"))).unwrap();
        sections(&page)
    };
    let title = |section: &(String, String)| section.0.clone();
    for name in subcommands(&[]).iter().map(String::as_str).chain([""]) {
        let words: &[&str] = if name.is_empty() { &[] } else { &[name] };
        let help = fbuf(words).arg("--help").run();
        let help = String::from_utf8(help.stdout).unwrap();
        let (_, help) = help.split_once("\nExit status:\n").unwrap();
        let sections = page(format!("fbuf-{name}").trim_end_matches('-'));
        let begin = sections.iter().position(|section| section.0 == "EXIT STATUS").unwrap();
        let own = &sections[begin..sections.len() - 1];
        let said: String = own.iter().map(|(title, words)| format!("{title}: {words} ")).collect();
        let titles = ["Metrics", "Environment", "Files", "Examples"];
        let upper = titles.iter().fold(format!("EXIT STATUS: {help}"), |help, title| {
            help.replace(&format!("\n{title}:\n"), &format!("\n{}:\n", title.to_uppercase()))
        });
        assert_eq!(spaced(&said), spaced(&upper), "{name}");
        let expected: &[&str] = match name {
            "demo" | "bench" => &["EXIT STATUS", "EXAMPLES"],
            "broker" => &["EXIT STATUS", "METRICS", "ENVIRONMENT", "FILES", "EXAMPLES"],
            _ => &["EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES"],
        };
        assert_eq!(own.iter().map(title).collect::<Vec<_>>(), expected, "{name}");
    }
    // One that says nothing of this itself has it from the command that it is part of.
    let of_bench = page("fbuf-bench-latency");
    assert!(of_bench.iter().any(|section| section.0 == "EXIT STATUS"), "{of_bench:?}");
    let see = spaced(&of_bench.last().unwrap().1);
    assert!(see.starts_with("fbuf(1), fbuf-bench(1), ") && see.contains("fbuf-bench-stream(1)"), "{see}");
    assert!(!see.contains("latency") && see.ends_with(", fbuf(7)"), "{see}");
    let first: Vec<_> = page("fbuf-send").iter().map(title).take(4).collect();
    assert_eq!(first, ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS"]);
}

#[test]
fn shells_complete_the_subcommands() {
    let folder = generated("completions");
    let read = |name: &str| fs::read_to_string(folder.path().join("new").join(name)).unwrap();
    for name in ["fbuf.bash", "_fbuf", "fbuf.fish"] {
        let text = read(name);
        assert!(subcommands(&[]).iter().all(|command| text.contains(command.as_str())), "{name}");
    }
    // As bash does when a user has typed `fbuf br` and presses the key.
    let script = r#". "$0"; COMP_WORDS=(fbuf br); COMP_CWORD=1; _fbuf fbuf br fbuf; echo "${COMPREPLY[@]}""#;
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-c", script]).arg(folder.path().join("new/fbuf.bash"));
    let output = bash.run();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "broker\n", "{output:?}");
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let output = fbuf(["generate", "man", "/dev/null/pages"]).run();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/dev/null/pages"), "{output:?}");
}
