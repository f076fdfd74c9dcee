//! The table of maps on docs/architecture.md is that of lb-common.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use lb_common::maps::{MAPS, MapKind, MapSpec};
use xtask::host;

/// What is between back-quotes.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// The numbers that stand by themselves.
fn sizes(cell: &str) -> Vec<u32> {
    cell.split([' ', ',']).filter_map(|word| word.parse().ok()).collect()
}

/// Sizes of the maps of one row, each once.
fn sizes_of(specs: &[&MapSpec], size: impl Fn(&MapSpec) -> u32) -> Vec<u32> {
    let mut sizes: Vec<_> = specs.iter().map(|spec| size(spec)).collect();
    sizes.dedup();
    sizes
}

#[test]
fn every_map_has_its_row() -> Result<()> {
    let page = fs::read_to_string(host::workspace().join("docs/architecture.md"))?;
    let abi = fs::read_to_string(host::workspace().join("lb-common/src/abi.rs"))?;
    let known: BTreeMap<_, _> = MAPS.iter().map(|spec| (spec.name, spec)).collect();
    let mut seen = Vec::new();
    let rows = page.lines().filter(|line| {
        quoted(line).first().is_some_and(|name| known.contains_key(name)) && line.starts_with("| `")
    });
    for row in rows {
        let cells: Vec<_> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [names, kind, key, value, writer, _] = cells.as_slice() else {
            anyhow::bail!("six columns: {row}");
        };
        let specs = quoted(names)
            .into_iter()
            .map(|name| known.get(name).copied().with_context(|| format!("there is no map {name}")))
            .collect::<Result<Vec<_>>>()?;
        seen.extend(specs.iter().map(|spec| spec.name));
        for spec in &specs {
            let (its_kind, its_writer) = match spec.kind {
                MapKind::Hash => ("hash", "agent"),
                MapKind::Array => ("array", "agent"),
                MapKind::LpmTrie => ("prefix trie", "agent"),
                MapKind::LruHash => ("LRU hash", "programs"),
                MapKind::PerCpuArray => ("array for each CPU", "programs"),
                MapKind::PerCpuHash => ("hash for each CPU", "programs"),
                MapKind::RingBuf => ("ring buffer", "programs"),
            };
            ensure!((*kind, *writer) == (its_kind, its_writer), "{}: {its_kind}, {its_writer}", spec.name);
        }
        ensure!(sizes(key) == sizes_of(&specs, |spec| spec.key_size), "sizes of keys: {row}");
        ensure!(sizes(value) == sizes_of(&specs, |spec| spec.value_size), "sizes of values: {row}");
        for name in
            quoted(key).into_iter().chain(quoted(value)).filter(|name| !matches!(*name, "u32" | "u64"))
        {
            let declared = ["<", " {"].iter().any(|end| abi.contains(&format!("pub struct {name}{end}")));
            ensure!(declared, "abi.rs has no {name}: {row}");
        }
    }
    seen.sort_unstable();
    let all: Vec<_> = known.into_keys().collect();
    ensure!(seen == all, "rows for {seen:?}, but the maps are {all:?}");
    Ok(())
}
