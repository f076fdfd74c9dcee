//! Links from page to page lead somewhere: to a file, and to a heading of it. So do paths of the repository in the text.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Result, ensure};
use xtask::host;

/// Directories without pages of ours.
const PASSED_BY: [&str; 2] = ["target", "corpus"];

/// A page, without what is code in it.
struct Page {
    prose: String,
}

impl Page {
    fn read(path: &Path) -> Result<Self> {
        let mut prose = String::new();
        let mut in_code = false;
        for line in fs::read_to_string(path)?.lines() {
            if line.trim_start().starts_with("```") {
                in_code = !in_code;
            } else if !in_code {
                prose += line;
                prose.push('\n');
            }
        }
        Ok(Self { prose })
    }

    /// Where it links to, as written: `](target)`, outside of `code`.
    fn links(&self) -> impl Iterator<Item = &str> {
        let parts = self.prose.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        parts.filter(|target| !target.contains(['`', ' ', '\n']))
    }

    /// What GitHub calls its headings.
    fn anchors(&self) -> BTreeSet<String> {
        let mut anchors = BTreeSet::new();
        let headings = self.prose.lines().filter(|line| line.starts_with('#'));
        for heading in headings {
            let text = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = text.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            let slug: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
            let again = (1..).map(|n| format!("{slug}-{n}"));
            let free = std::iter::once(slug.clone()).chain(again).find(|slug| !anchors.contains(slug));
            anchors.extend(free);
        }
        anchors
    }
}

/// Every page of the repository.
fn pages() -> Result<BTreeMap<PathBuf, Page>> {
    let mut pages = BTreeMap::new();
    let mut dirs = vec![host::workspace().to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() && !name.starts_with('.') && !PASSED_BY.contains(&&*name) {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                let page = Page::read(&path)?;
                pages.insert(path, page);
            }
        }
    }
    Ok(pages)
}

/// The path without `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        if part == Component::ParentDir {
            plain.pop();
        } else {
            plain.push(part);
        }
    }
    plain
}

#[test]
fn every_link_leads_somewhere() -> Result<()> {
    let pages = pages()?;
    let mut broken = Vec::new();
    let mut seen = 0;
    for (path, page) in &pages {
        for link in page.links().filter(|link| !link.contains("://") && !link.starts_with("mailto:")) {
            seen += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => plain(&path.with_file_name(file)),
            };
            let known =
                anchor.is_empty() || pages.get(&target).is_some_and(|page| page.anchors().contains(anchor));
            if !target.exists() || !known {
                broken.push(format!("{}: {link}", path.display()));
            }
        }
    }
    ensure!(broken.is_empty(), "{} links lead nowhere:\n{}", broken.len(), broken.join("\n"));
    ensure!(seen > 50, "only {seen} links in {} pages", pages.len());
    Ok(())
}

#[test]
fn every_page_and_picture_is_linked() -> Result<()> {
    let pages = pages()?;
    let linked: BTreeSet<PathBuf> = pages
        .iter()
        .flat_map(|(path, page)| page.links().map(move |link| (path, link)))
        .map(|(path, link)| plain(&path.with_file_name(link.split('#').next().unwrap_or_default())))
        .collect();
    let docs = host::workspace().join("docs");
    let mut lost = Vec::new();
    let mut dirs = vec![docs];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.is_dir() {
                // A link to a directory shows its README.md; one without has pictures, which pages show.
                let readme = path.join("README.md");
                if readme.exists() && !linked.contains(&path) && !linked.contains(&readme) {
                    lost.push(path.display().to_string());
                }
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md" || extension == "svg")
                && path.file_name().is_some_and(|name| name != "README.md")
                && !linked.contains(&path)
            {
                lost.push(path.display().to_string());
            }
        }
    }
    ensure!(lost.is_empty(), "no page leads to {lost:?}");
    Ok(())
}

/// Directories of the repository that pages name files of.
const OURS: [&str; 5] = ["deploy/", "lb-common/", "lb-ebpf/", "lb-userspace/", "xtask/"];

#[test]
fn paths_in_the_text_exist() -> Result<()> {
    let mut gone = Vec::new();
    let mut seen = 0;
    for (path, page) in pages()?.iter().filter(|(path, _)| !path.ends_with("CHANGELOG.md")) {
        let named =
            page.prose.split('`').skip(1).step_by(2).map(|name| name.split("::").next().unwrap_or(name));
        for name in named.filter(|name| OURS.iter().any(|dir| name.starts_with(dir)) && !name.contains(' ')) {
            seen += 1;
            if !host::workspace().join(name).exists() {
                gone.push(format!("{}: {name}", path.display()));
            }
        }
    }
    ensure!(gone.is_empty(), "{} paths lead nowhere:\n{}", gone.len(), gone.join("\n"));
    ensure!(seen > 50, "only {seen} paths");
    Ok(())
}

/// Paragraphs that begin with `Code:` name functions, and behind them the file that they are in.
#[test]
fn functions_that_pages_name_exist() -> Result<()> {
    let mut gone = Vec::new();
    let mut seen = 0;
    for (path, page) in pages()? {
        for paragraph in page.prose.split("\n\n").filter(|paragraph| paragraph.starts_with("Code:")) {
            let mut functions = Vec::new();
            for name in paragraph.split('`').skip(1).step_by(2) {
                if !name.contains('/') {
                    functions.push(name);
                    continue;
                }
                let code = fs::read_to_string(host::workspace().join(name)).unwrap_or_default();
                seen += functions.len();
                let there = |function: &&str| {
                    ["(", "<"].iter().any(|end| code.contains(&format!("fn {function}{end}")))
                };
                let missing = functions.drain(..).filter(|function| !there(function));
                gone.extend(missing.map(|function| format!("{}: {function} in {name}", path.display())));
            }
        }
    }
    ensure!(gone.is_empty(), "these are not there:\n{}", gone.join("\n"));
    ensure!(seen > 10, "only {seen} functions");
    Ok(())
}
