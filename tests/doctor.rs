//! `fbuf doctor` as a user meets it: a process with a text and an exit status.

use std::process::{Command, Output};

fn doctor() -> Output {
    Command::new(env!("CARGO_BIN_EXE_fbuf")).arg("doctor").output().expect("the command was just built")
}

fn assert_fits(text: &str) {
    for line in text.lines() {
        assert!(line.chars().count() <= 100, "too long: {line}");
    }
}

#[test]
fn the_report_fits_and_ends_with_a_verdict_that_the_status_repeats() {
    let output = doctor();
    // None here would mean a signal: the probes break a lease, and are not to die of it.
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert_fits(&text);
    assert!(text.lines().last().unwrap().starts_with("fbuf works here: "), "{text}");
}

#[test]
fn a_lack_of_descriptors_is_reported_and_not_fatal() {
    // One beside the three that are open: enough for the loader and a memfd, not for a socket pair.
    let script = r#"ulimit -n 4; exec "$0" doctor"#;
    let output = Command::new("sh").args(["-c", script, env!("CARGO_BIN_EXE_fbuf")]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(output.stderr.is_empty());
    assert_fits(&text);
    assert!(text.contains("  ok  SHRINK"), "{text}");
    assert!(text.contains("  NO  descriptor passing"), "{text}");
    assert!(text.contains("  ?   lease beside a writer"), "{text}");
    assert!(text.lines().last().unwrap().starts_with("fbuf does not work here: "), "{text}");
}
