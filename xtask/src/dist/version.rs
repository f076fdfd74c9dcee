//! One version everywhere: in Cargo.toml, as the newest heading of the changelog, in the chart and in the manifests.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::host;

const UNRELEASED: &str = "Unreleased";

/// Whether every file that names the version names this one; a draft may have changes that are not released.
pub fn check(version: &str, draft: bool) -> Result<()> {
    let read = |name: &str| {
        let path = host::workspace().join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    changelog(&read("docs/CHANGELOG.md")?, version, draft)?;
    let named = [
        ("deploy/helm/fairlead/Chart.yaml", format!("\nversion: {version}\n")),
        ("deploy/helm/fairlead/Chart.yaml", format!("\nappVersion: {version}\n")),
        ("deploy/base/daemonset.yaml", format!("image: fairlead:{version}\n")),
        ("deploy/Dockerfile", format!("image.version=\"{version}\"")),
    ];
    for (file, text) in named {
        let there = read(file)?.contains(&text);
        ensure!(there, "Cargo.toml says version {version}, and {file} has no `{}`", text.trim());
    }
    Ok(())
}

fn changelog(text: &str, version: &str, draft: bool) -> Result<()> {
    let newest = newest(text).context("docs/CHANGELOG.md has no heading `## VERSION`")?;
    ensure!(
        newest == version || (draft && newest == UNRELEASED),
        "Cargo.toml says version {version}, and docs/CHANGELOG.md begins with {newest}: write `## {version} (DATE)` \
         above what changed, or make a draft with --draft"
    );
    Ok(())
}

/// The newest heading, without its date: `## 0.1.0 (2026-01-31)`.
fn newest(changelog: &str) -> Option<&str> {
    let heading = changelog.lines().find_map(|line| line.strip_prefix("## "))?;
    heading.split_whitespace().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGELOG: &str =
        "# Changelog\n\nText.\n\n## 0.2.0 (2026-01-31)\n\n- This.\n\n## 0.1.0\n\n- That.\n";

    #[test]
    fn the_newest_heading_is_the_version() {
        assert_eq!(newest(CHANGELOG), Some("0.2.0"));
        assert_eq!(newest("# Changelog\n\n## Unreleased\n\n- This.\n"), Some(UNRELEASED));
        assert_eq!(newest("# Changelog\n### 0.1.0\n"), None);
        changelog(CHANGELOG, "0.2.0", false).unwrap();
    }

    #[test]
    fn another_version_is_one_clear_line() {
        let refused = changelog(CHANGELOG, "0.3.0", true).unwrap_err().to_string();
        assert_eq!(
            refused,
            "Cargo.toml says version 0.3.0, and docs/CHANGELOG.md begins with 0.2.0: write `## 0.3.0 (DATE)` above \
             what changed, or make a draft with --draft"
        );
        let unreleased = "## Unreleased\n\n- This.\n";
        assert!(changelog(unreleased, "0.2.0", false).is_err());
        changelog(unreleased, "0.2.0", true).unwrap();
        assert!(changelog("# Changelog\n", "0.2.0", true).is_err());
    }

    #[test]
    fn this_repository_has_one_version() {
        check(env!("CARGO_PKG_VERSION"), true).unwrap();
        let refused = check("99.0.0", true).unwrap_err().to_string();
        assert!(refused.starts_with("Cargo.toml says version 99.0.0, and "), "{refused}");
    }
}
