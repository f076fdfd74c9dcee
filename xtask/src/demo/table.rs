//! The table: one row per call, printed when it is made, with what came back and which way it went.

use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::Duration;

use anyhow::{Result, bail};

/// Widths of the columns but the last.
const WIDTHS: [usize; 3] = [24, 34, 50];

/// A table that is being printed.
pub(super) struct Table {
    rows: u32,
    surprises: u32,
    color: bool,
}

/// One row.
pub(super) struct Row {
    pub(super) who: String,
    pub(super) calls: String,
    pub(super) came_back: String,
    pub(super) way: String,
    /// What was expected, if it was not this.
    pub(super) surprise: Option<String>,
}

impl Table {
    pub(super) fn begin() -> Self {
        Self { rows: 0, surprises: 0, color: std::io::stdout().is_terminal() }
    }

    /// A heading for the rows that follow.
    pub(super) fn chapter(&self, title: &str) {
        println!("\n{}", self.paint("1", title));
        if self.rows == 0 {
            let head = line(["who", "calls", "what came back"], "translated at (node, edge: hooks)");
            println!("     {}", self.paint("2", &head));
        }
    }

    pub(super) fn row(&mut self, row: &Row) {
        self.rows += 1;
        let text = line([&row.who, &row.calls, &row.came_back], &row.way);
        match &row.surprise {
            None => println!("{} {text}", self.paint("32", "ok  ")),
            Some(expected) => {
                self.surprises += 1;
                println!("{} {text}", self.paint("31", "FAIL"));
                self.note(&format!("expected: {expected}"));
            }
        }
    }

    /// A line below a row.
    pub(super) fn note(&self, text: &str) {
        println!("     {}", self.paint("33", text));
    }

    /// The last line; an error if a row was not as expected.
    pub(super) fn end(self, took: Duration) -> Result<()> {
        let Self { rows, surprises, .. } = self;
        println!();
        if surprises > 0 {
            bail!("{surprises} of {rows} rows are not as expected");
        }
        println!("{rows} rows, all as expected, in {:.1} s", took.as_secs_f32());
        Ok(())
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A cell that is wider than its column pushes the others to the right.
fn line(cells: [&str; 3], last: &str) -> String {
    let mut text = String::new();
    for (cell, width) in cells.into_iter().zip(WIDTHS) {
        // Writing to a String cannot fail.
        let _ = write!(text, "{cell:width$} ");
    }
    text + last
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(surprise: Option<&str>) -> Row {
        let text = || "text".to_owned();
        Row {
            who: text(),
            calls: text(),
            came_back: text(),
            way: text(),
            surprise: surprise.map(str::to_owned),
        }
    }

    #[test]
    fn one_surprise_fails_the_table() {
        let mut table = Table::begin();
        table.row(&row(None));
        table.row(&row(Some("refused")));
        assert_eq!(table.end(Duration::ZERO).unwrap_err().to_string(), "1 of 2 rows are not as expected");
        let mut table = Table::begin();
        table.row(&row(None));
        assert!(table.end(Duration::ZERO).is_ok());
    }
}
