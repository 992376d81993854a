//! The benchmark, for a moment: every peer and workload, every message checked, every line complete.
//! What it measures here, beside other tests, means nothing.

use std::process::{Command, Output};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fbuf")).arg("bench").args(arguments).output().unwrap()
}

/// Runs it once, shortly, and parses what it prints.
fn lines(arguments: &[&str]) -> Vec<Value> {
    let moment = ["--json", "--runs", "1", "--seconds", "0.02"];
    let output = bench(&[arguments, &moment].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn assert_has(line: &Value, fields: &[&str]) {
    for field in fields {
        assert!(line[field].is_number() || line[field].is_string(), "{field} is missing in {line}");
    }
}

const RUN: [&str; 8] = ["peer", "workload", "size", "mode", "wait", "run", "messages", "cpu_s"];
const LATENCY: [&str; 4] = ["p50_ns", "p99_ns", "p999_ns", "max_ns"];
const STREAM: [&str; 2] = ["messages_per_s", "gb_per_s"];

fn peers(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["peer"].as_str().unwrap()).collect()
}

#[test]
fn latency_is_measured_for_every_peer() {
    let lines = lines(&["latency", "--size", "64,64KiB"]);
    for line in &lines {
        assert_has(line, &RUN);
        assert_has(line, &LATENCY);
        assert!(line["messages"].as_u64().unwrap() > 0 && line["p50_ns"].as_u64() <= line["max_ns"].as_u64());
    }
    let one = ["fbuf", "limit", "pipe", "uds", "tcp", "shared-memory"];
    assert_eq!(peers(&lines)[..6], one);
    assert_eq!(lines.iter().filter(|line| line["size"] == 65536).count(), one.len());
}

#[test]
fn streams_are_measured_in_every_mode_and_way_of_waiting() {
    let modes = ["untouched", "paged", "written", "touched"];
    for wait in ["spin", "adaptive", "block"] {
        let lines = lines(&["stream", "--size", "4KiB", "--mode", &modes.join(","), "--wait", wait, "--slots", "8"]);
        for line in &lines {
            assert_has(line, &RUN);
            assert_has(line, &STREAM);
            assert_eq!(line["wait"], wait);
        }
        for mode in modes {
            let of_mode: Vec<_> = lines.iter().filter(|line| line["mode"] == mode).cloned().collect();
            assert!(["fbuf", "pipe", "uds", "tcp"].iter().all(|peer| peers(&of_mode).contains(peer)), "{of_mode:?}");
        }
    }
}

#[test]
fn wakeups_depths_and_fans_are_measured() {
    let wakeups = lines(&["wakeup", "--rate", "200"]);
    assert_eq!(peers(&wakeups), ["fbuf", "fbuf", "futex", "eventfd", "tokio-fbuf", "tokio-eventfd"]);
    assert!(wakeups.iter().all(|line| line["rate_per_s"] == 200.0));
    let depths = lines(&["depth", "--size", "4KiB", "--slots", "2,64"]);
    assert_eq!(depths.iter().map(|line| line["slots"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 2, 64, 64]);
    let fans = lines(&["fan", "--count", "1,3"]);
    let kinds: Vec<_> = fans.iter().map(|line| line["workload"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["stream", "fan-out", "fan-in", "fan-in"]);
    assert_eq!(fans[3]["others"], 3);
    for line in wakeups.iter().chain(&depths).chain(&fans) {
        assert_has(line, &RUN);
    }
}

#[test]
fn what_protection_costs_is_measured() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().to_str().unwrap();
    let lines = lines(&["protection", "--size", "4KiB,2MiB", "--out", folder]);
    for line in &lines {
        assert_has(line, &RUN);
        assert_has(line, &LATENCY);
        let mode = if line["peer"] == "memcpy" { "touched" } else { "paged" };
        assert_eq!((&line["workload"], &line["mode"]), (&"protection".into(), &mode.into()));
    }
    for size in [4096, 2 << 20] {
        let of_size: Vec<_> = lines.iter().filter(|line| line["size"] == size).collect();
        let means: Vec<_> = of_size.iter().filter_map(|line| line["means"].as_str()).collect();
        for wanted in ["guarded", "copy", "lease", "one-shot", "copy-on-write"] {
            assert!(means.contains(&wanted), "{wanted} is missing in {means:?}");
        }
        for peer in ["pipe", "memcpy"] {
            assert!(of_size.iter().any(|line| line["peer"] == peer), "{peer} is missing");
        }
    }
    let page = std::fs::read_to_string(out.path().join("fbuf-protection.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("Table 1 of SOSP 1993"));
}

#[test]
fn what_it_costs_when_there_are_many_is_measured() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().to_str().unwrap();
    let lines = lines(&["scale", "--clients", "5", "--out", folder]);
    for line in &lines {
        assert_has(line, &["subject", "what", "beside", "count", "unit", "median", "least", "most", "values"]);
        assert_eq!(line["workload"], "scale");
        assert!(line["least"].as_f64() <= line["median"].as_f64() && line["median"].as_f64() <= line["most"].as_f64());
    }
    let of = |subject| lines.iter().filter(move |line| line["subject"] == subject);
    for (subject, counts) in [("attach", [1, 5]), ("fan-out", [1, 5]), ("fan-in", [1, 5]), ("idle", [0, 5])] {
        for count in counts {
            let mut found = of(subject).filter(|line| line["count"] == count).peekable();
            assert!(found.peek().is_some(), "{subject} with {count}");
            assert!(found.all(|line| line["median"].as_f64().unwrap() > 0.0), "{subject} with {count}");
        }
    }
    for holder in ["the broker", "the client's process"] {
        for what in ["memory", "shared memory", "descriptors", "threads"] {
            let all = of("room").filter(|line| line["what"] == format!("{holder}: {what}"));
            assert_eq!(all.count(), 3, "{holder}: {what}");
        }
    }
    for neighbour in ["nobody", "spins", "asks, the same user", "opens, the same user"] {
        assert_eq!(of("neighbour").filter(|line| line["what"] == neighbour).count(), 4, "{neighbour}");
    }
    for beside in ["no other", "5 lanes, refilled", "5 lanes, bells"] {
        assert_eq!(of("hostile-links").filter(|line| line["beside"] == beside).count(), 3, "{beside}");
    }
    let page = std::fs::read_to_string(out.path().join("fbuf-scale.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("another user") == nix::unistd::geteuid().is_root());
}

#[test]
fn what_is_paid_once_is_measured() {
    let steps = lines(&["once"]);
    assert_eq!(steps.len(), 7);
    for line in steps {
        assert_has(&line, &["step", "median_ns", "least_ns", "most_ns"]);
        assert!(line["median_ns"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn what_cannot_be_measured_is_said() {
    for (arguments, words) in [
        (&["latency", "--size", "7"][..], "must be a multiple of 8"),
        (&["latency", "--peer", "futex", "--wait", "spin"], "it does not do that"),
        (&["stream", "--peer", "limit", "--slots", "3"], "wants a power of two"),
        (&["stream", "--peer", "fbuf", "--size", "4GiB"], "no slot can have 4294967296 bytes"),
        (&["wakeup", "--rate", "0"], "more than zero"),
    ] {
        let output = bench(arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(words), "{arguments:?}: {text}");
    }
}
