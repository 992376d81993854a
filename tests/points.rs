//! What is tested is what ships: it has no points at which a test could have it die. Tests that need them
//! (`tests/kill_matrix`, parts of `tests/stopped.rs`) are run here in a build of their own.
#![cfg(not(feature = "points"))]

mod support;

use std::{env, fs, path::Path, process::Command};

use support::{Run, fbuf};

/// What stands in a program that has points, and not in this one.
fn mark() -> String {
    ["FBUF_DIE", "AT"].join("_")
}

fn has_points(program: &Path) -> bool {
    let (bytes, mark) = (fs::read(program).unwrap(), mark());
    bytes.windows(mark.len()).any(|window| window == mark.as_bytes())
}

#[test]
fn tests_that_need_points_pass_in_a_build_that_has_them_and_only_that_has_them() {
    let command = env!("CARGO_BIN_EXE_fbuf");
    assert!(
        !has_points(Path::new(command)) && !has_points(&env::current_exe().unwrap()),
        "a build that ships has points"
    );
    // It passes the first one.
    let listed = fbuf(["ls", "--socket", "/nowhere"]).env(mark(), "0 SIGKILL attach: asked").run();
    assert_eq!(listed.status.code(), Some(1), "{listed:?}");

    let own = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("points");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into()));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    cargo.args(["test", "--no-default-features", "--features", "points", "--test", "kill_matrix", "--test", "stopped"]);
    cargo.arg("--target-dir").arg(&own);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    // However long it takes to build.
    let output = cargo.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let wrong = format!("{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{wrong}");
    let passed = |line: &str| line.strip_prefix("test result: ok. ")?.split_once(' ')?.0.parse::<u32>().ok();
    let passed: Vec<_> = said.lines().filter_map(passed).collect();
    assert!(passed.len() == 2 && passed.iter().all(|&count| count >= 2), "few tests were run: {wrong}");
    // The control: it is found where it is.
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    assert!(has_points(&own.join(profile).join("fbuf")), "no points were found in the build that has them");
}
