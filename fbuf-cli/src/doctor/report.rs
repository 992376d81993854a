//! The findings as text: aligned columns, nothing wider than [`WIDTH`], no colours.

use super::finding::{Consequence, Finding, Outcome, Section, TOGETHER};

/// No line is longer, in characters.
const WIDTH: usize = 100;
/// Where the names of the probes begin, and where what they saw begins.
const NAME_AT: usize = 6;
const SEEN_AT: usize = 34;

/// Where the consequences of a failure begin: further left, so that commands stay on one line.
const CONSEQUENCE_AT: usize = 8;

const LEGEND: &str = "\
fbuf doctor: what fbuf needs of this machine, each thing tried just now.

  ok  works
  no  does not work, and fbuf does without it
  NO  does not work, and fbuf needs it
  ?   could not be tried
      (without a mark: a fact)
";

/// What is required, and does not work or could not be tried.
pub fn missing(sections: &[Section]) -> Vec<&Finding> {
    let findings = sections.iter().flat_map(|section| &section.findings);
    findings.filter(|finding| finding.is_missing()).collect()
}

/// The whole report; its last line is the verdict.
pub fn text(sections: &[Section]) -> String {
    let mut text = String::new();
    text.push_str(LEGEND);
    for section in sections {
        text.push_str(&format!("\n{}\n", section.title));
        let mut findings = section.findings.iter().peekable();
        while let Some(finding) = findings.next() {
            describe(&mut text, finding);
            let consequence = finding.consequence();
            // What several in a row have in common is said once, after the last of them.
            if findings.peek().is_none_or(|next| next.consequence() != consequence) {
                consequence.into_iter().for_each(|consequence| explain(&mut text, consequence));
            }
        }
    }
    text.push('\n');
    verdict(&mut text, sections);
    text.replace(TOGETHER, " ")
}

/// The last line, alone in a paragraph or behind the names of what is missing.
fn verdict(text: &mut String, sections: &[Section]) {
    let missing = missing(sections);
    let (untried, lacking): (Vec<&Finding>, Vec<&Finding>) =
        missing.into_iter().partition(|finding| matches!(finding.outcome, Outcome::Untried));
    for (head, findings) in [("Lacking: ", &lacking), ("Not tried: ", &untried)] {
        if !findings.is_empty() {
            wrap(text, head, &findings.iter().map(|finding| finding.name).collect::<Vec<_>>().join(", "));
        }
    }
    text.push_str(match (lacking.is_empty(), untried.is_empty()) {
        (true, true) => "fbuf works here: all that its basic (volatile) level needs was tried, and works.\n",
        (true, false) => "fbuf may not work here: not all that its basic (volatile) level needs could be tried.\n",
        (false, _) => "fbuf does not work here: its basic (volatile) level lacks what is named above.\n",
    });
}

fn describe(text: &mut String, finding: &Finding) {
    let mark = match (&finding.outcome, finding.required) {
        (Outcome::Works, _) => "ok",
        (Outcome::WorksNot(_), true) => "NO",
        (Outcome::WorksNot(_), false) => "no",
        (Outcome::Untried, _) => "?",
        (Outcome::Fact, _) => "",
    };
    let gap = SEEN_AT - NAME_AT;
    wrap(text, &format!("  {mark:<4}{:<gap$}", finding.name), &finding.seen);
}

fn explain(text: &mut String, consequence: &Consequence) {
    wrap(text, &format!("{:CONSEQUENCE_AT$}so: ", ""), consequence.follows);
    wrap(text, &format!("{:CONSEQUENCE_AT$}do: ", ""), consequence.remedy);
}

/// Appends `words` behind `head`, broken into lines that all begin where the first one does.
fn wrap(text: &mut String, head: &str, words: &str) {
    let indent = head.chars().count();
    let mut line = head.to_owned();
    let mut length = indent;
    let mut empty = true;
    for word in words.split_ascii_whitespace() {
        let more = word.chars().count() + usize::from(!empty);
        if !empty && length + more > WIDTH {
            text.push_str(&line);
            text.push('\n');
            line = " ".repeat(indent);
            (length, empty) = (indent, true);
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        length += word.chars().count() + usize::from(!empty);
        empty = false;
    }
    text.push_str(line.trim_end());
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Setback, *};

    fn report(required: bool, result: Result<String, Setback>) -> String {
        let otherwise = Consequence { follows: "nothing goes.", remedy: "mend it." };
        let finding = Finding { required, ..Finding::tried("a thing", result, otherwise) };
        text(&[Section { title: "Things", findings: vec![finding] }])
    }

    #[test]
    fn a_failure_says_what_follows_and_what_to_do() {
        let text = report(true, Err(Setback::WorksNot("broken".into())));
        assert!(text.contains("  NO  a thing"), "{text}");
        assert!(text.contains("so: nothing goes.") && text.contains("do: mend it."), "{text}");
        assert!(text.contains("\nLacking: a thing\nfbuf does not work here: "), "{text}");
    }

    #[test]
    fn what_several_failures_have_in_common_is_said_once() {
        let otherwise = Consequence { follows: "nothing goes.", remedy: "mend it." };
        let other = Consequence { follows: "little goes.", remedy: "mend that." };
        let broken = |otherwise| Finding::tried("a thing", Err(Setback::WorksNot("broken".into())), otherwise);
        let findings = vec![broken(otherwise), broken(otherwise), broken(other)];
        let text = text(&[Section { title: "Things", findings }]);
        assert_eq!(text.matches("mend it.").count(), 1, "{text}");
        assert_eq!(text.matches("mend that.").count(), 1, "{text}");
    }

    #[test]
    fn only_what_is_required_decides() {
        let text = report(false, Err(Setback::WorksNot("broken".into())));
        assert!(text.contains("  no  a thing"), "{text}");
        assert!(text.lines().last().unwrap().starts_with("fbuf works here"), "{text}");
        let text = report(true, Err(Setback::Untried("no memfd".into())));
        assert!(text.contains("  ?   a thing") && text.contains("\nNot tried: a thing\nfbuf may not"), "{text}");
    }

    #[test]
    fn long_findings_are_broken_and_aligned() {
        let text = report(false, Ok("word ".repeat(60)));
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        let lines: Vec<_> = text.lines().filter(|line| line.contains("word word")).collect();
        assert!(lines.len() > 3);
        assert!(lines.iter().all(|line| line.find("word") == Some(SEEN_AT)), "{text}");
    }
}
