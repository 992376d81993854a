//! Both halves of a link in one process, with peers that are honest, hostile, or granted little.

#[cfg(not(miri))]
mod at_fork;
pub(crate) mod exchange;
pub(crate) mod hostile;
mod scarce;

/// Whether this is a process with this one test. If it is none, one has run, and the test was passed there.
#[cfg(not(miri))]
pub(crate) fn is_alone(test: &str) -> bool {
    const ALONE: &str = "FBUF_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
    let output = alone.args([test, "--exact"]).env(ALONE, "").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
    false
}
