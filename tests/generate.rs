//! `fbuf generate`: what a package installs beside the command.

mod support;

use std::{collections::BTreeSet, fs, process::Command};

use support::fbuf;

/// The subcommands that the help of a command names.
fn subcommands(words: &[&str]) -> Vec<String> {
    let output = fbuf(words).arg("--help").output().unwrap();
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
    assert!(fbuf(["generate", what]).arg(folder.path().join("new")).status().unwrap().success());
    folder
}

#[test]
fn each_subcommand_has_a_page_that_says_what_its_help_says() {
    let folder = generated("man");
    let mut expected = BTreeSet::from(["fbuf.1".to_owned()]);
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
    let output = bash.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "broker\n", "{output:?}");
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let output = fbuf(["generate", "man", "/dev/null/pages"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/dev/null/pages"), "{output:?}");
}
