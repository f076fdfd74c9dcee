//! Which kernel this is.

use std::fs;

/// Major and minor version; `None` where it cannot be told.
pub fn release() -> Option<(u32, u32)> {
    parse(&release_text()?)
}

/// As `uname -r` has it.
pub fn release_text() -> Option<String> {
    Some(fs::read_to_string("/proc/sys/kernel/osrelease").ok()?.trim().to_owned())
}

fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_are_read() {
        assert_eq!(parse("6.1.0-18-amd64\n"), Some((6, 1)));
        assert_eq!(parse("5.10-rc1"), Some((5, 10)));
        assert_eq!(parse("unknown"), None);
    }
}
