//! Notes which commit is measured.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=../.git/HEAD");
    println!("cargo:rerun-if-changed=../.git/refs");
    let described = Command::new("git").args(["describe", "--always", "--dirty"]).output().ok();
    let commit = described.filter(|output| output.status.success());
    let commit = commit.map_or_else(|| "unknown".into(), |output| String::from_utf8_lossy(&output.stdout).into_owned());
    println!("cargo:rustc-env=FBUF_COMMIT={}", commit.trim());
}
