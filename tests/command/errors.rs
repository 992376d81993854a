//! What is said when something is wrong: in one line, which names options of the command.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use crate::{
    Place,
    support::{Process, Run, fbuf, until},
    text,
};

/// What is wrong is said in one line.
fn assert_said(output: &Output, status: i32, wanted: &[&str]) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    assert!(said.starts_with("fbuf: ") && said.lines().count() == 1, "{said}");
    assert!(wanted.iter().all(|wanted| said.contains(wanted)), "{said} where {wanted:?} was expected");
}

fn is_listed(place: &Place, what: &str) -> bool {
    text(&place.command(&["ls"]).run().stdout).contains(what)
}

#[test]
fn errors_name_options_and_not_calls() {
    let place = Place::new();
    let mut send = Process::start(place.command(&["send", "c", "-"]).stdin(Stdio::piped()).stderr(Stdio::null()));
    until("there is a sender", || is_listed(&place, "sender"));
    let output = place.command(&["recv", "c", "--require", "sealed"]).run();
    assert_said(&output, 1, &["have it send with `--protection sealed`", "`--require volatile`"]);
    send.kill();
    let _receive = Process::start(place.command(&["recv", "d", "--require", "sealed"]).stdout(Stdio::null()));
    until("there is a receiver", || is_listed(&place, "receiver"));
    assert_said(&place.command(&["send", "d", "-"]).run(), 1, &["send with `--protection sealed`"]);
    for (words, wanted) in [
        (["--slot-size", "0"], "--slot-size can be 1B to 1GiB"),
        (["--slot-size", "2GiB"], "--slot-size can be 1B to 1GiB"),
        (["--slots", "0"], "--slots can be 1 to 1048576"),
        (["--slots", "99999999"], "--slots can be 1 to 1048576"),
    ] {
        assert_said(&place.command(&["send", "e", "-"]).args(words).run(), 1, &[wanted]);
    }
    let mut large = place.command(&["send", "e", "-", "--slot-size", "1GiB", "--slots", "100000"]);
    assert_said(&large.run(), 1, &["give fewer --slots or a smaller --slot-size"]);
}

/// The literals of a text.
fn literals(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let begin = &rest[rest.find('"')? + 1..];
        let quote = begin.match_indices('"').find(|(at, _)| !begin[..*at].ends_with('\\'));
        let (literal, after) = begin.split_at(quote?.0);
        rest = &after[1..];
        Some(literal)
    })
}

/// A name in an error that only programs know: one with an underscore, one that is called, or one with a path. Parameters
/// of the kernel have dots, pages of the manual a number.
fn call_in(error: &str) -> Option<&str> {
    // What a policy says in its rules.
    let known = ["trusted_pool"];
    let is_call = |word: &&str| {
        let name = word.trim_matches(|letter: char| !letter.is_alphanumeric() && letter != '_');
        let is_called = |at: usize| at > 0 && !word[at + 1..].starts_with(|letter: char| letter.is_ascii_digit());
        let is_lower = name.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_');
        let is_name = is_lower && name.contains('_') && !known.contains(&name) && !word.contains('{');
        is_name || word.contains("::") || word.find('(').is_some_and(is_called)
    };
    error.split_whitespace().find(is_call)
}

/// Each error of the library: the file, the attribute that has its text, and what comes behind that.
fn errors_of_the_library() -> Vec<(PathBuf, String, String)> {
    let mut errors = Vec::new();
    for package in ["fbuf-core", "fbuf-protocol", "fbuf-client", "fbuf-broker"] {
        let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(package).join("src")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if entry.is_dir() {
                    folders.push(entry);
                    continue;
                }
                let source = fs::read_to_string(&entry).unwrap();
                for error in source.split("#[error(").skip(1) {
                    let (attribute, behind) = error.split_once(")]\n").unwrap();
                    let behind = behind.split("\n}\n").next().unwrap();
                    errors.push((entry.clone(), attribute.to_owned(), behind.to_owned()));
                }
            }
        }
    }
    assert!(errors.len() > 100, "only {} errors were found", errors.len());
    errors
}

#[test]
fn errors_of_the_library_name_no_calls() {
    let named =
        ["open with keep_waiting()", "`wait_for_receivers`", "protection({required:?})", "ask for Protection::Leased"];
    assert!(named.iter().all(|error| call_in(error).is_some()), "the search finds nothing");
    for (file, attribute, _) in errors_of_the_library() {
        for error in literals(&attribute) {
            assert_eq!(call_in(error), None, "{}: {error}", file.display());
        }
    }
}

/// A report of an error and its sources would say the cause of such an error twice.
#[test]
fn errors_of_the_library_say_their_cause_themselves_or_have_a_source() {
    let has_source = |behind: &str| ["#[from]", "#[source]", " source:"].iter().any(|mark| behind.contains(mark));
    assert!(has_source("    Memory(#[from] MemoryError),") && !has_source("    Lost,"));
    for (file, attribute, behind) in errors_of_the_library() {
        assert!(attribute == "transparent" || !has_source(&behind), "{}: {attribute}", file.display());
    }
}

#[test]
fn a_size_that_cannot_be_read_says_what_can() {
    let place = Place::new();
    let commands: [&[&str]; 5] = [
        &["send", "c", "-", "--slot-size"],
        &["demo", "--bytes"],
        &["demo", "--message"],
        &["bench", "latency", "--size"],
        &["bench", "instructions", "--size"],
    ];
    for words in commands {
        for size in ["many", "1x", "", "1 1"] {
            let output = place.command(words).arg(size).run();
            assert_said(&output, 2, if size.is_empty() { &[] } else { &["64KiB", "MB"] });
        }
    }
    for number in ["0", "-1", "nan", "inf", "x"] {
        let seconds = format!("--seconds={number}");
        assert_said(&fbuf(["bench", "latency", &seconds]).run(), 2, &["more than zero"]);
        let every = format!("--every={number}");
        assert_said(&fbuf(["top", &every]).run(), 2, &["0.1 to 86400"]);
    }
}

#[test]
fn users_are_given_by_name_or_number() {
    for option in ["--allow", "--trust"] {
        let output = fbuf(["broker", option, "no-such-user"]).run();
        assert_said(&output, 2, &["there is no user of that name", "give a number"]);
    }
    let place = Place::new();
    for user in ["root", "0"] {
        assert!(place.command(&["ls", "--broker-user", user]).run().status.success());
    }
}

#[test]
fn help_of_each_command_says_its_exit_statuses() {
    for command in ["broker", "send", "recv", "demo", "bench", "ls", "top", "doctor"] {
        for help in ["-h", "--help"] {
            let help = text(&fbuf([command, help]).run().stdout);
            let (_, statuses) = help.split_once("Exit status:\n").unwrap_or_else(|| panic!("{help}"));
            let expected: &[&str] = if command == "recv" { &["0", "1", "2", "3"] } else { &["0", "1", "2"] };
            let found = statuses.lines().map_while(|line| line.strip_prefix("  ")?.split_once("  "));
            // A line that goes on with the one above has none.
            let found = found.map(|(status, _)| status).filter(|status| !status.is_empty());
            assert_eq!(found.collect::<Vec<_>>(), expected, "{help}");
        }
    }
}

#[test]
fn a_log_filter_that_is_not_understood_is_said() {
    let place = Place::new();
    let socket = place.path("broker");
    let mut command = fbuf(["broker", "--socket"]);
    let broker = command.arg(&socket).env("RUST_LOG", "fbuf=loud").stderr(Stdio::piped()).spawn().unwrap();
    until("it listens", || socket.exists());
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(broker.id() as i32), nix::sys::signal::Signal::SIGTERM).unwrap();
    let output = Process(broker).output();
    assert!(text(&output.stderr).contains("RUST_LOG is not understood"), "{output:?}");
}
