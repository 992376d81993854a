//! The order of folders that the crate states, against what its sources import.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The names in the paragraph of `lib.rs` that says in which order imports point, in groups: those that are joined by "and"
/// do not know each other.
fn stated(lib: &str) -> Vec<Vec<String>> {
    let doc: Vec<_> = lib.lines().filter_map(|line| line.strip_prefix("//!")).collect();
    let text = doc.join(" ");
    let begin = text.find("Imports point one way").expect("the order is stated");
    let list = text[begin..].split(". A test").next().unwrap();
    let list = list.split("no other.").nth(1).unwrap();
    let name = |text: &str| text.trim().trim_matches('`').to_owned();
    list.split(',').map(|group| group.split(" and ").map(name).collect()).collect()
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        match path.is_dir() {
            true => files(&path, found),
            false => found.push(path),
        }
    }
}

/// The code of a file that is compiled into the library, without comments.
fn code(source: &str) -> String {
    let mut code = String::new();
    let (mut skips, mut is_test) = (false, false);
    for line in source.lines() {
        let is_attribute = line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test");
        // A module of tests ends with the first brace at the beginning of a line.
        is_test = is_attribute || (is_test && line.starts_with("#["));
        if skips {
            skips = line != "}";
        } else if line.contains("mod ") && line.ends_with('{') && !line.starts_with(' ') && code.ends_with("TEST\n") {
            skips = true;
        } else if is_test {
            code.push_str("TEST\n");
        } else {
            code.push_str(line.split("//").next().unwrap());
            code.push('\n');
        }
    }
    code
}

/// What comes first in each path that begins with `crate`.
fn imported(code: &str) -> BTreeSet<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = BTreeSet::new();
    for (place, _) in code.match_indices("crate::") {
        let after = &code[place + "crate::".len()..];
        let Some(tree) = after.strip_prefix('{') else {
            found.insert(word(after));
            continue;
        };
        let (mut depth, mut is_first) = (0, true);
        for (index, letter) in tree.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => is_first = true,
                letter if is_first && letter.is_alphabetic() => {
                    found.insert(word(&tree[index..]));
                    is_first = false;
                }
                _ => {}
            }
        }
    }
    found
}

#[test]
fn imports_point_one_way() {
    let order = stated(&fs::read_to_string(sources().join("lib.rs")).unwrap());
    let rank = |name: &str| order.iter().position(|group| group.iter().any(|other| other == name));
    let mut all = Vec::new();
    files(&sources(), &mut all);
    let (mut known, mut count) = (BTreeSet::new(), 0);
    for path in all {
        let relative = path.strip_prefix(sources()).unwrap().to_str().unwrap().to_owned();
        let room = relative.split('/').next().unwrap().trim_end_matches(".rs").to_owned();
        // The root, and what is compiled for tests and models only.
        if ["lib", "tests"].contains(&room.as_str())
            || ["model.rs", "tests.rs"].iter().any(|end| relative.ends_with(end))
        {
            continue;
        }
        let own = rank(&room).unwrap_or_else(|| panic!("the order says nothing of {room}"));
        known.insert(room.clone());
        for other in imported(&code(&fs::read_to_string(&path).unwrap())) {
            if other == room {
                continue;
            }
            let its =
                rank(&other).unwrap_or_else(|| panic!("{relative} imports {other}, of which the order says nothing"));
            assert!(its < own, "{relative} imports {other}, which comes later");
            count += 1;
        }
    }
    assert!(count > 50, "{count} imports were found");
    assert_eq!(known, order.into_iter().flatten().collect(), "left: what there is, right: what the order states");
}

#[test]
fn an_import_is_found_wherever_it_stands() {
    let source = "use crate::{\n    a::{b, c::D},\n    e,\n};\nuse crate::f::G; // crate::no\nlet x = crate::h::I;\n\
                  #[cfg(test)]\nmod tests {\n    use crate::hidden;\n}\n#[cfg(all(test, loom))]\nmod model {\n    use crate::hidden;\n}\n";
    let found: Vec<_> = imported(&code(source)).into_iter().collect();
    assert_eq!(found, ["a", "e", "f", "h"]);
}
