//! Which columns there is room for, and how wide each is.

/// To leave a column of numbers out is better than to cut its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Column {
    pub(super) head: &'static str,
    /// The least important one is left out first; the name of what a line is about never is.
    pub(super) importance: u8,
}

/// A name takes so much before another column is left out for it, and more only if there is room.
const NAME: usize = 16;

/// Which columns are shown in so many characters, and the width of each, two spaces apart. The first column is the
/// name. One in which nothing stands is not shown.
pub(super) fn fit(columns: &[Column], rows: &[Vec<String>], room: usize) -> Vec<(usize, usize)> {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.max().unwrap_or(0).max(columns[column].head.chars().count())
    };
    let name = width(0);
    let is_empty = |column: usize| {
        let mut cells = rows.iter().filter_map(|row| row.get(column)).peekable();
        cells.peek().is_some() && cells.all(String::is_empty)
    };
    let worth = (0..columns.len()).filter(|&column| column == 0 || !is_empty(column));
    let mut shown: Vec<_> = worth.map(|column| (column, width(column))).collect();
    let others = |shown: &[(usize, usize)]| shown[1..].iter().map(|(_, width)| width + 2).sum::<usize>();
    while shown.len() > 1 && name.min(NAME) + others(&shown) > room {
        let least = (1..shown.len()).min_by_key(|&index| columns[shown[index].0].importance);
        least.map(|index| shown.remove(index));
    }
    shown[0].1 = name.min(room.saturating_sub(others(&shown)));
    shown
}

/// One line of cells under those columns. What stands behind the last cell (a note) is not cut.
pub(super) fn line(shown: &[(usize, usize)], cells: &[impl AsRef<str>]) -> String {
    let mut text = String::new();
    for (place, &(column, width)) in shown.iter().enumerate() {
        let cell = cells.get(column).map_or("", AsRef::as_ref);
        if place > 0 {
            text.push_str("  ");
        }
        text.push_str(&format!("{:<width$}", shortened(cell, width)));
    }
    text.truncate(text.trim_end().len());
    text
}

/// As much of it as there is room for.
fn shortened(text: &str, room: usize) -> String {
    if text.chars().count() <= room {
        return text.to_owned();
    }
    text.chars().take(room.saturating_sub(1)).chain(['…']).collect()
}

/// Broken between words into lines of so many characters.
pub(super) fn wrapped(text: &str, room: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.last_mut().map_or(0, |line| line.chars().count());
        if last > 0 && last + 1 + word.chars().count() > room {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: [Column; 3] = [
        Column { head: "channel", importance: 9 },
        Column { head: "waits", importance: 1 },
        Column { head: "messages", importance: 5 },
    ];

    fn shown(name: &str, room: usize) -> Vec<String> {
        let rows = vec![vec![name.to_owned(), "1".to_owned(), "1234567.8".to_owned()]];
        let shown = fit(&COLUMNS, &rows, room);
        rows.iter().map(|row| line(&shown, row)).collect()
    }

    #[test]
    fn columns_are_left_out_whole_the_least_important_first() {
        assert_eq!(shown("a", 80), ["a        1      1234567.8"]);
        assert_eq!(shown("a", 20), ["a        1234567.8"]);
        assert_eq!(shown("a", 10), ["a"]);
    }

    #[test]
    fn a_name_is_whole_where_there_is_room_for_it() {
        let name = "x".repeat(40);
        assert_eq!(shown(&name, 80), [format!("{name}  1      1234567.8")]);
        assert_eq!(shown(&name, 40), [format!("{}…  1      1234567.8", "x".repeat(21))]);
        assert_eq!(shown(&name, 31), [format!("{}…  1234567.8", "x".repeat(19))]);
        assert_eq!(shown(&name, 20), [format!("{}…", "x".repeat(19))]);
    }

    #[test]
    fn a_column_in_which_nothing_stands_is_left_out() {
        let row = |waits: &str| ["a", waits, "2"].map(str::to_owned).to_vec();
        let heads = |rows: &[Vec<String>]| line(&fit(&COLUMNS, rows, 80), &COLUMNS.map(|column| column.head));
        assert_eq!(heads(&[row(""), vec!["b".to_owned()]]), "channel  messages");
        assert_eq!(heads(&[row(""), row("1")]), "channel  waits  messages");
        assert_eq!(heads(&[vec!["b".to_owned()]]), "channel  waits  messages");
    }

    #[test]
    fn text_is_broken_between_words() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("one", 1), ["one"]);
    }
}
