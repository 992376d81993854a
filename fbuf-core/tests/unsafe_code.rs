//! The list of files with unsafe code that the crate states, against its sources.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The files that `lib.rs` lists: items of its documentation that begin with the name of a file.
fn listed(lib: &str) -> BTreeSet<String> {
    let items = lib.lines().filter_map(|line| line.strip_prefix("//! * `"));
    items.filter_map(|item| item.split_once('`')).map(|(name, _)| name.to_owned()).collect()
}

/// The code that is compiled but for models, without comments.
fn code(source: &str) -> impl Iterator<Item = &str> {
    let compiled = source.split("#[cfg(all(test, loom))]\nmod model {").next().unwrap_or_default();
    compiled.lines().map(|line| line.split("//").next().unwrap_or_default())
}

/// Whether there is unsafe code, or leave for it.
fn is_unsafe(source: &str) -> bool {
    let mut words = code(source).flat_map(|line| line.split(|c: char| !c.is_alphanumeric() && c != '_'));
    words.any(|word| word == "unsafe" || word == "unsafe_code")
}

/// All files, by the names that the list has.
fn files(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(sources()).unwrap().to_str().unwrap().to_owned();
            found.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
}

fn all() -> Vec<(String, String)> {
    let mut found = Vec::new();
    files(&sources(), &mut found);
    // Only models and tests are made of these.
    found.retain(|(name, _)| {
        !["model.rs", "tests.rs"].iter().any(|end| name.ends_with(end)) && !name.starts_with("tests/")
    });
    found
}

#[test]
fn the_list_of_files_with_unsafe_code_is_that_of_the_sources() {
    let stated = listed(&fs::read_to_string(sources().join("lib.rs")).unwrap());
    let found: BTreeSet<_> = all().into_iter().filter(|(_, source)| is_unsafe(source)).map(|(name, _)| name).collect();
    assert!(!found.is_empty(), "nothing was read");
    assert_eq!(stated, found, "left: what lib.rs states, right: what the sources have");
}

#[test]
fn every_argument_for_unsafe_code_is_one_of_its_own() {
    for (name, source) in all() {
        for (number, line) in source.lines().enumerate() {
            let argument = line.trim_start().strip_prefix("// SAFETY: ").unwrap_or_default();
            let refers =
                ["as above", "as in", "as for", "as before", "the same"].iter().any(|word| argument.starts_with(word));
            assert!(!refers, "{name}:{}: {argument}", number + 1);
        }
    }
}

/// What the two above look for is found where it is, and only there.
#[test]
fn unsafe_code_is_recognised() {
    for code in ["unsafe { f() }", "    unsafe impl Send for X {}", "#![allow(unsafe_code)]", "let x = unsafe{*p};"] {
        assert!(is_unsafe(code), "{code}");
    }
    for code in ["// unsafe { f() }", "/// As `unsafe` code.", "is_unsafe(x)", "let unsafely = 1;"] {
        assert!(!is_unsafe(code), "{code}");
    }
    assert!(!is_unsafe("fn f() {}\n#[cfg(all(test, loom))]\nmod model {\n    unsafe { f() }\n}"));
    assert_eq!(listed("//! text `no.rs`\n//! * `a/b.rs`: that\n//! * other\n"), BTreeSet::from(["a/b.rs".to_owned()]));
}
