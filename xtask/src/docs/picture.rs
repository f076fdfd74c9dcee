//! The way of a packet as text, from which its picture is drawn.
//!
//! ```text
//! # a comment
//! title What the picture shows, for those who do not see it
//! lane NAME | who or where | its address or device
//! part what happens in the following lines
//! send NAME NAME | from this address | to that one | a remark
//! at NAME | a hook
//!   what it looks up or does, a line each
//! ```
//!
//! Lanes stand from left to right, everything else from top to bottom. A `*` before an address says that it was
//! rewritten just before; the remark may be left out.

use std::str::FromStr;

use anyhow::{Context as _, Error, Result, bail};

/// A picture.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Picture {
    pub(super) title: String,
    pub(super) lanes: Vec<Lane>,
    pub(super) steps: Vec<Step>,
}

/// A place that packets come to.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Lane {
    name: String,
    pub(super) who: String,
    pub(super) what: String,
}

/// An address of a packet.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Address {
    pub(super) text: String,
    pub(super) is_new: bool,
}

/// What happens; places are indices of lanes.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Step {
    Part(String),
    Send { from: usize, to: usize, src: Address, dst: Address, remark: String },
    Hook { at: usize, name: String, lines: Vec<String> },
}

impl FromStr for Picture {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut picture = Self { title: String::new(), lanes: vec![], steps: vec![] };
        for (number, line) in text.lines().enumerate() {
            picture.read(line).with_context(|| format!("line {}: {line:?}", number + 1))?;
        }
        if picture.title.is_empty() || picture.lanes.len() < 2 {
            bail!("a picture needs a title and two lanes");
        }
        Ok(picture)
    }
}

impl Picture {
    fn read(&mut self, line: &str) -> Result<()> {
        if line.trim().is_empty() || line.starts_with('#') {
            return Ok(());
        }
        if let Some(line) = line.strip_prefix("  ") {
            let Some(Step::Hook { lines, .. }) = self.steps.last_mut() else {
                bail!("an indented line belongs to a hook");
            };
            lines.push(line.trim_end().to_owned());
            return Ok(());
        }
        let (word, rest) = line.split_once(' ').context("there is nothing behind the word")?;
        let mut cells = rest.split('|').map(str::trim);
        let first = cells.next().unwrap_or_default();
        let mut cell = |what| cells.next().with_context(|| format!("{what} is missing"));
        match word {
            "title" => rest.trim().clone_into(&mut self.title),
            "lane" => self.lanes.push(Lane {
                name: first.to_owned(),
                who: cell("who it is")?.to_owned(),
                what: cell("its address")?.to_owned(),
            }),
            "part" => self.steps.push(Step::Part(rest.trim().to_owned())),
            "send" => {
                let (from, to) = first.split_once(' ').context("two lanes are needed")?;
                let (from, to) = (self.lane(from)?, self.lane(to)?);
                if from == to {
                    bail!("nothing is sent to where it is");
                }
                let (src, dst) = (address(cell("the source")?), address(cell("the destination")?));
                let remark = cells.next().unwrap_or_default().to_owned();
                self.steps.push(Step::Send { from, to, src, dst, remark });
            }
            "at" => {
                let name = cell("the hook")?.to_owned();
                self.steps.push(Step::Hook { at: self.lane(first)?, name, lines: vec![] });
            }
            _ => bail!("no line begins with {word:?}"),
        }
        Ok(())
    }

    fn lane(&self, name: &str) -> Result<usize> {
        let found = self.lanes.iter().position(|lane| lane.name == name.trim());
        found.with_context(|| format!("there is no lane {name:?}"))
    }
}

fn address(text: &str) -> Address {
    let new = text.strip_prefix('*');
    Address { text: new.unwrap_or(text).to_owned(), is_new: new.is_some() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "title A\nlane a | A | 192.0.2.1\nlane b | B | 192.0.2.2\n";

    fn read(steps: &str) -> Result<Vec<Step>> {
        Ok(format!("{HEAD}{steps}").parse::<Picture>()?.steps)
    }

    #[test]
    fn steps_are_read() -> Result<()> {
        let steps = read("# none\n\npart one\nsend b a | 1:2 | *3:4 | r\nat b | tc\n  FLOWS4  no\n")?;
        let address = |text: &str, is_new| Address { text: text.to_owned(), is_new };
        let expected = [
            Step::Part("one".to_owned()),
            Step::Send {
                from: 1,
                to: 0,
                src: address("1:2", false),
                dst: address("3:4", true),
                remark: "r".to_owned(),
            },
            Step::Hook { at: 1, name: "tc".to_owned(), lines: vec!["FLOWS4  no".to_owned()] },
        ];
        assert_eq!(steps, expected);
        Ok(())
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (steps, expected) in [
            ("send a c | 1 | 2", "line 4: \"send a c | 1 | 2\": there is no lane \"c\""),
            ("send a b | 1", "line 4: \"send a b | 1\": the destination is missing"),
            ("  lost", "line 4: \"  lost\": an indented line belongs to a hook"),
            ("draw a b", "line 4: \"draw a b\": no line begins with \"draw\""),
        ] {
            let said = read(steps).map_err(|error| format!("{error:#}"));
            assert_eq!(said, Err(expected.to_owned()));
        }
    }
}
