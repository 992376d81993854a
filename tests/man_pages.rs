//! The man pages: they are well made, and what they say of policies is what a policy can say.

mod support;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use fbuf_broker::{Policy, Quota, size};
use fbuf_protocol::Resource;
use support::{Run, fbuf, not_tested};

fn generated() -> (tempfile::TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    assert!(fbuf(["generate", "man"]).arg(folder.path()).run_to_its_end().success());
    let pages = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    (folder, pages)
}

/// What a formatter of pages complains of.
fn complaints(page: &Path) -> String {
    let output = Command::new("groff").args(["-ww", "-man", "-Tutf8", "-z"]).arg(page).run();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn no_page_has_anything_that_its_formatter_complains_of() {
    if Command::new("groff").arg("--version").output().is_err() {
        return not_tested("man pages are formatted, and there is no groff");
    }
    let (folder, pages) = generated();
    assert!(pages.len() > 10, "{pages:?}");
    for page in pages {
        assert_eq!(complaints(&page), "", "{}", page.display());
    }
    let wrong = folder.path().join("wrong.1");
    fs::write(&wrong, ".TH wrong 1\n.SH NAME\n.NOSUCHTHING\n").unwrap();
    assert!(!complaints(&wrong).is_empty(), "a page that is wrong has no complaint");
}

#[test]
fn a_synopsis_shows_options_with_their_values() {
    let (folder, _) = generated();
    let synopsis = |name: &str| {
        let page = fs::read_to_string(folder.path().join(name)).unwrap().replace("\\-", "-");
        let (_, page) = page.split_once(".SH SYNOPSIS\n").unwrap();
        let line = page.lines().next().unwrap();
        ["\\fB", "\\fI", "\\fR"].iter().fold(line.to_owned(), |line, font| line.replace(font, ""))
    };
    let broker = synopsis("fbuf-broker.1");
    assert!(broker.starts_with("fbuf broker ") && broker.contains(" [--policy FILE] "), "{broker}");
    assert!(broker.contains(" [--allow USER] ..."), "{broker}");
    let send = synopsis("fbuf-send.1");
    assert!(send.contains(" [--label TEXT]") && send.ends_with(" CHANNEL [FILE]"), "{send}");
    assert!(synopsis("fbuf.1").ends_with(" command"));
}

/// The keys that a table of a policy may have, as the broker knows them: it names them when there is another.
fn known(table: &str) -> BTreeSet<String> {
    let error = Policy::parse(&format!("{table}\nnonsense = 1\n")).unwrap_err().to_string();
    let (_, expected) = error.split_once("expected ").unwrap_or_else(|| panic!("{error}"));
    expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The keys in a section of the page, and what is said of each.
fn documented(page: &str, table: &str) -> Vec<(String, String)> {
    let (_, section) = page.split_once(&format!(".SS {table}\n")).unwrap_or_else(|| panic!("no section {table}"));
    let section = section.split("\n.S").next().unwrap();
    let items = section.split(".TP\n.BI ").skip(1);
    items
        .map(|item| {
            let (key, said) = item.split_once(' ').unwrap();
            (key.to_owned(), said.to_owned())
        })
        .collect()
}

#[test]
fn the_page_of_policies_has_each_key_that_the_broker_knows_and_no_other() {
    let (folder, _) = generated();
    let page = fs::read_to_string(folder.path().join("fbuf-policy.5")).unwrap();
    assert_eq!(known(""), ["channel", "rule"].map(str::to_owned).into());
    for table in ["[[rule]]", "[rule.quota]", "[[channel]]"] {
        // The table above it has to be there.
        let text = if table == "[rule.quota]" { "[[rule]]\nusers = [0]\n[rule.quota]" } else { table };
        let documented = documented(&page, table);
        let keys: BTreeSet<_> = documented.iter().map(|(key, _)| key.clone()).collect();
        assert_eq!(keys, known(text), "{table}");
        let has_default = |said: &str| said.contains("Default: ") || said.contains("Has to be given.");
        assert!(documented.iter().all(|(key, said)| has_default(said) || key == "quota"), "{documented:#?}");
    }
    let quota = Quota::default();
    for (key, said) in documented(&page, "[rule.quota]") {
        let default =
            said.split_once("Default: ").unwrap().1.split(".\n").next().unwrap().trim_end_matches(['.', '\n']);
        let resource = Resource::ALL.iter().copied().find(|resource| resource.name() == key);
        let is = resource.map_or(quota.requests_per_second.into(), |resource| quota.of(resource));
        assert_eq!(size(default).unwrap().as_u64(), is, "{key}");
    }
}

#[test]
fn the_examples_of_the_page_of_policies_are_policies() {
    let (folder, _) = generated();
    let page = fs::read_to_string(folder.path().join("fbuf-policy.5")).unwrap();
    let examples = page.split(".EX\n").skip(1).map(|example| example.split(".EE").next().unwrap());
    let examples: Vec<_> = examples.map(|example| Policy::parse(example).unwrap().to_string()).collect();
    assert!(examples.len() == 3 && examples[0].contains("\"camera/*\""), "{examples:?}");
    // As the page says, the two cannot be given together.
    let both = fbuf(["broker", "--policy", "/dev/null", "--allow", "0"]).run();
    assert_eq!(both.status.code(), Some(2), "{both:?}");
}
