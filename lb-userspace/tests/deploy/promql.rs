//! What a query asks for, for the PromQL that alerts and dashboard use. Anything else is refused.

use std::iter::Peekable;
use std::str::Chars;

const FUNCTIONS: [&str; 10] =
    ["absent", "changes", "count", "histogram_quantile", "increase", "max", "rate", "sum", "time", "topk"];
const OPERATORS: [&str; 1] = ["and"];
const GROUPINGS: [&str; 3] = ["by", "group_left", "on"];

#[derive(Debug, Default)]
pub struct Query {
    pub selectors: Vec<Selector>,
    /// Labels of `by` and `on`.
    pub grouped: Vec<String>,
}

#[derive(Debug)]
pub struct Selector {
    pub metric: String,
    /// Labels and the values they are compared with.
    pub matchers: Vec<(String, String)>,
}

impl Query {
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut query = Self::default();
        let mut rest = text.chars().peekable();
        let mut open = 0_usize;
        while let Some(&c) = rest.peek() {
            if c.is_ascii_alphabetic() {
                query.word(&name(&mut rest), &mut rest)?;
                continue;
            }
            rest.next();
            match c {
                '(' => open += 1,
                ')' => open = open.checked_sub(1).ok_or("a bracket that nothing opens")?,
                '[' => range(&mut rest)?,
                ' ' | ',' | '.' | '=' | '<' | '>' | '/' | '-' | '0'..='9' => {}
                c => return Err(format!("{c} is not expected")),
            }
        }
        if open > 0 { Err("a bracket that nothing closes".into()) } else { Ok(query) }
    }

    fn word(&mut self, word: &str, rest: &mut Peekable<Chars<'_>>) -> Result<(), String> {
        skip_spaces(rest);
        let bracket = rest.peek() == Some(&'(');
        if GROUPINGS.contains(&word) {
            if bracket {
                rest.next();
                self.grouped.extend(until(rest, ')')?.split(',').map(|label| label.trim().to_owned()));
            }
        } else if !FUNCTIONS.contains(&word) && !OPERATORS.contains(&word) {
            if bracket {
                return Err(format!("{word} is no function that is known here"));
            }
            let matchers = if rest.next_if_eq(&'{').is_some() { matchers(rest)? } else { vec![] };
            self.selectors.push(Selector { metric: word.to_owned(), matchers });
        }
        Ok(())
    }
}

fn matchers(rest: &mut Peekable<Chars<'_>>) -> Result<Vec<(String, String)>, String> {
    let mut matchers = Vec::new();
    loop {
        skip_spaces(rest);
        let label = name(rest);
        let operator = until(rest, '"')?;
        if label.is_empty() || !["=", "!=", "=~", "!~"].contains(&&*operator) {
            return Err(format!("{label}{operator} compares nothing"));
        }
        matchers.push((label, until(rest, '"')?));
        match rest.next() {
            Some(',') => {}
            Some('}') => return Ok(matchers),
            _ => return Err("a selector that does not end".into()),
        }
    }
}

/// As in `[5m]`.
fn range(rest: &mut Peekable<Chars<'_>>) -> Result<(), String> {
    let time = until(rest, ']')?;
    match time.strip_suffix(['s', 'm', 'h']).map(str::parse::<u32>) {
        Some(Ok(_)) => Ok(()),
        _ => Err(format!("{time} is no time")),
    }
}

fn name(rest: &mut Peekable<Chars<'_>>) -> String {
    let mut name = String::new();
    while let Some(c) = rest.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
        name.push(c);
    }
    name
}

fn until(rest: &mut Peekable<Chars<'_>>, end: char) -> Result<String, String> {
    let mut text = String::new();
    loop {
        match rest.next() {
            Some(c) if c == end => return Ok(text),
            Some(c) => text.push(c),
            None => return Err(format!("{text}: no {end} follows")),
        }
    }
}

fn skip_spaces(rest: &mut Peekable<Chars<'_>>) {
    while rest.next_if_eq(&' ').is_some() {}
}
