//! One word for one thing: those that ARCHITECTURE.md has, and none of those that stood for them before. Files are short, and
//! those that ARCHITECTURE.md names are there.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// What is not to be said, and what is.
const WORDS: [(&str, &str); 15] = [
    ("a fbuf", "an fbuf"),
    ("tenant", "leased slot"),
    ("lodging", "slot source"),
    ("the hand of", "cursor"),
    ("whose hand", "cursor"),
    ("sends_for_good", "sends one-shots"),
    ("farewell", "reason of a disconnect"),
    ("homeless", "stale slot"),
    ("post box", "queue of new links"),
    ("shelf", "unsent fbufs"),
    ("write_keep", "write_retained"),
    ("fbuf.resize", "fbuf.set_len"),
    (").stay()", ").keep_waiting()"),
    ("sender.granted()", "sender.protection_info()"),
    ("sender.departed()", "sender.next_departure()"),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        let path = entry.path();
        let name = entry.file_name();
        let name = name.to_str().unwrap();
        // A link leads to what is found anyway.
        if entry.file_type().unwrap().is_dir() && !name.starts_with('.') && !["target", "corpus"].contains(&name) {
            sources(&path, found);
        } else if path.is_file() && [".rs", ".md", ".toml", ".service"].iter().any(|end| name.ends_with(end)) {
            found.push(path);
        }
    }
}

/// The first word of these in a text, which stands there as a word.
fn forbidden(text: &str) -> Option<(&'static str, &'static str)> {
    let text = text.to_lowercase();
    let is_letter = |letter: Option<char>| letter.is_some_and(char::is_alphanumeric);
    WORDS.into_iter().find(|(word, _)| {
        text.match_indices(word).any(|(place, _)| {
            !is_letter(text[..place].chars().next_back()) && !is_letter(text[place + word.len()..].chars().next())
        })
    })
}

#[test]
fn one_word_stands_for_one_thing() {
    assert_eq!(forbidden("let the_tenant = 1;"), Some(("tenant", "leased slot")), "the search finds nothing");
    assert_eq!(forbidden("it lends a fbuf."), Some(("a fbuf", "an fbuf")));
    assert_eq!(forbidden("lieutenants lend an fbuf"), None);
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), &mut files);
    assert!(files.len() > 200, "{} files were found", files.len());
    // This one has them all, and the other says what was renamed.
    for file in files.iter().filter(|file| !file.ends_with("tests/words.rs") && !file.ends_with("CHANGELOG.md")) {
        for (number, line) in fs::read_to_string(file).unwrap().lines().enumerate() {
            if let Some((word, better)) = forbidden(line) {
                panic!("{}:{}: {word:?}, where the word is {better:?}: {line}", file.display(), number + 1);
            }
        }
    }
}

/// The most lines of a file. One that is longer wants to be two, each of one idea.
const MOST: usize = 600;

/// The subject of a sentence is a thing with a name.
#[test]
fn no_prose_says_who() {
    let mut files = Vec::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    sources(&root, &mut files);
    files.retain(|file| file.extension().is_some_and(|end| end == "md"));
    files.extend(["fbuf.7", "fbuf-policy.5"].map(|page| root.join("fbuf-cli/src/pages").join(page)));
    assert!(files.len() > 10, "{} files were found", files.len());
    for file in files {
        let text = fs::read_to_string(&file).unwrap().to_lowercase();
        let mut words = text.split(|letter: char| !letter.is_alphanumeric());
        let found = words.find(|word| ["who", "whom", "whose", "whoever"].contains(word));
        assert_eq!(found, None, "{}: name the thing", file.display());
    }
}

/// A newcomer sees code at once, and reads all of it.
#[test]
fn readme_and_architecture_are_short() {
    let read = |name| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)).unwrap();
    let (readme, architecture) = (read("README.md"), read("ARCHITECTURE.md"));
    let code = readme.lines().skip_while(|line| *line != "```rust").skip(1).take_while(|line| *line != "```").count();
    let before = readme.lines().take_while(|line| *line != "```rust").count();
    assert!(code > 5 && before + code <= 40, "{code} lines of code stand behind {before} others");
    let [readme, architecture] = [readme, architecture].map(|text| text.lines().count());
    assert!(readme <= 130 && architecture <= 250, "README.md: {readme} lines, ARCHITECTURE.md: {architecture}");
}

#[test]
fn no_file_is_long() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), &mut files);
    for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "rs")) {
        let lines = fs::read_to_string(file).unwrap().lines().count();
        assert!(lines <= MOST, "{}: {lines} lines, and {MOST} are enough", file.display());
    }
}

#[test]
fn files_that_architecture_names_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let files: Vec<_> = files.iter().map(|file| format!("/{}", file.strip_prefix(&root).unwrap().display())).collect();
    let is_there = |name: &str| {
        files.iter().any(|file| file.ends_with(&format!("/{name}")) || file.contains(&format!("/{name}/")))
    };
    let text = fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let is_of_name = |letter: char| letter.is_ascii_alphanumeric() || "/._-".contains(letter);
    let names = text.split(|letter| !is_of_name(letter)).map(|name| name.trim_matches(['.', '/', '-']));
    let named: Vec<_> = names.filter(|name| name.ends_with(".rs") || name.starts_with("tests/")).collect();
    assert!(named.len() > 100, "{} names were found", named.len());
    let missing: Vec<_> =
        named.into_iter().filter(|name| !is_there(name) && !is_there(&format!("{name}.rs"))).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md names what is not there: {missing:?}");
}
