//! What is linked into the agent: a software bill of materials, as CycloneDX 1.6 has it.
//!
//! Which packages are linked cargo's own resolver says (`cargo tree`); macros and build scripts are not among them.
//! What they are is in `cargo metadata`, and in Cargo.lock what their archives must hash to.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::stamp::Stamp;
use crate::toolchain::TARGET;
use crate::{host, process};

/// The agent, and the kernel programs that it embeds.
const ROOTS: [&str; 2] = ["lb-userspace", "lb-ebpf"];

/// Name and version.
type Package = (String, String);

/// The document, for the agent that is built for `target`.
pub fn document(target: &str, stamp: &Stamp) -> Result<String> {
    let mut linked = BTreeSet::new();
    for (root, target) in ROOTS.into_iter().zip([target, TARGET]) {
        linked.extend(packages_in(&tree(root, target)?));
    }
    let metadata = process::output(host::cargo()?.args(["metadata", "--format-version=1", "--locked"]))?;
    let metadata = serde_json::from_str(&metadata).context("cargo metadata is no JSON")?;
    let lock = host::workspace().join("Cargo.lock");
    let lock = std::fs::read_to_string(&lock).with_context(|| format!("cannot read {}", lock.display()))?;
    let document = compose(&linked, &metadata, &checksums(&lock), stamp)?;
    serde_json::to_string_pretty(&document)
        .map(|text| text + "\n")
        .context("cannot write the bill of materials")
}

/// What cargo links into a package.
fn tree(package: &str, target: &str) -> Result<String> {
    let edges = "normal,no-proc-macro";
    let args = ["tree", "--locked", "--package", package, "--target", target, "--edges", edges];
    process::output(host::cargo()?.args(args).args(["--prefix", "none", "--format", "{p}"]))
}

/// Lines are `name vVERSION`, and more behind it.
fn packages_in(tree: &str) -> BTreeSet<Package> {
    let package = |line: &str| {
        let (name, rest) = line.split_once(" v")?;
        Some((name.to_owned(), rest.split_whitespace().next()?.to_owned()))
    };
    tree.lines().filter_map(package).collect()
}

/// Of each package in Cargo.lock that has one.
fn checksums(lock: &str) -> BTreeMap<Package, String> {
    let field = |block: &str, name: &str| {
        let value = block.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \""))?;
        Some(value.trim_end_matches('"').to_owned())
    };
    let blocks = lock.split("[[package]]").filter_map(|block| {
        Some(((field(block, "name")?, field(block, "version")?), field(block, "checksum")?))
    });
    blocks.collect()
}

fn compose(
    linked: &BTreeSet<Package>,
    metadata: &Value,
    checksums: &BTreeMap<Package, String>,
    stamp: &Stamp,
) -> Result<Value> {
    let all = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let mut known: BTreeMap<Package, &Value> = BTreeMap::new();
    let mut names: BTreeMap<&str, Package> = BTreeMap::new();
    for package in all {
        let text = |field: &str| package[field].as_str().unwrap_or_default();
        let key = (text("name").to_owned(), text("version").to_owned());
        names.insert(text("id"), key.clone());
        known.insert(key, package);
    }
    let unknown: Vec<&Package> = linked.iter().filter(|package| !known.contains_key(*package)).collect();
    ensure!(unknown.is_empty(), "cargo metadata does not have {unknown:?}");
    let components: Vec<Value> =
        linked.iter().map(|package| component(package, known[package], checksums.get(package))).collect();
    let nodes = metadata["resolve"]["nodes"].as_array().context("cargo metadata has no dependencies")?;
    let mut dependencies: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in nodes {
        let Some(package) = node["id"].as_str().and_then(|id| names.get(id)) else { continue };
        if linked.contains(package) {
            let of = node["dependencies"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let of = of.filter_map(|id| names.get(id)).filter(|package| linked.contains(*package));
            dependencies.insert(reference(package), of.map(reference).collect());
        }
    }
    let top = format!("pkg:generic/fairlead@{}", stamp.version);
    let version = |name: &str| linked.iter().find(|package| package.0 == name).map(reference);
    dependencies.insert(top.clone(), ROOTS.into_iter().filter_map(version).collect());
    let dependencies: Vec<Value> =
        dependencies.iter().map(|(of, on)| json!({ "ref": of, "dependsOn": on })).collect();
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": stamp.date()?,
            "component": {
                "type": "application",
                "bom-ref": top,
                "name": "fairlead",
                "version": stamp.version,
                "purl": top,
                "licenses": [{ "expression": env!("CARGO_PKG_LICENSE") }],
            },
        },
        "components": components,
        "dependencies": dependencies,
    }))
}

fn component(package: &Package, described: &Value, checksum: Option<&String>) -> Value {
    let (name, version) = package;
    let reference = reference(package);
    let mut component = json!({
        "type": "library",
        "bom-ref": reference,
        "name": name,
        "version": version,
        "scope": "required",
        "purl": reference,
    });
    if let Some(license) = described["license"].as_str() {
        // Cargo's older way to write the same.
        component["licenses"] = json!([{ "expression": license.replace('/', " OR ") }]);
    }
    if let Some(checksum) = checksum {
        component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
    }
    if let Some(url) = described["repository"].as_str() {
        component["externalReferences"] = json!([{ "type": "vcs", "url": url }]);
    }
    component
}

/// A package URL, which is unique within the document, too.
fn reference((name, version): &Package) -> String {
    format!("pkg:cargo/{name}@{}", version.replace('+', "%2B"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str) -> Package {
        (name.to_owned(), version.to_owned())
    }

    #[test]
    fn linked_packages_are_read_from_cargos_tree() {
        let tree = "lb-userspace v0.1.0 (/src/lb-userspace)\nserde v1.0.228\nserde v1.0.228 (*)\n\nlibz v1.2.0+zlib.1\n";
        let expected = [("lb-userspace", "0.1.0"), ("libz", "1.2.0+zlib.1"), ("serde", "1.0.228")];
        assert_eq!(packages_in(tree), expected.map(|(name, version)| package(name, version)).into());
    }

    #[test]
    fn checksums_are_read_from_the_lock_file() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nchecksum = \"0a\"\n\
                    dependencies = [\n \"b\",\n]\n\n[[package]]\nname = \"b\"\nversion = \"2.0.0\"\n";
        assert_eq!(checksums(lock), BTreeMap::from([(package("a", "1.0.0"), "0a".to_owned())]));
    }

    /// The parts of the CycloneDX 1.6 schema that concern us.
    #[test]
    fn the_document_is_what_readers_of_cyclone_dx_expect() {
        let stamp = Stamp { version: "0.1.0", time: 1_700_000_000, revision: None };
        let document: Value =
            serde_json::from_str(&document("x86_64-unknown-linux-gnu", &stamp).unwrap()).unwrap();
        assert_eq!((&document["bomFormat"], &document["specVersion"]), (&json!("CycloneDX"), &json!("1.6")));
        assert_eq!(document["version"], 1);
        assert_eq!(document["metadata"]["timestamp"], "2023-11-14T22:13:20Z");
        let components = document["components"].as_array().unwrap();
        let mut references: BTreeSet<&str> =
            components.iter().map(|component| component["bom-ref"].as_str().unwrap()).collect();
        assert_eq!(references.len(), components.len(), "references are unique");
        for component in components {
            assert_eq!(component["type"], "library", "{component}");
            assert_eq!(component["purl"], component["bom-ref"]);
            assert!(component["version"].is_string() && component["licenses"][0]["expression"].is_string());
            let ours = component["name"].as_str().unwrap().starts_with("lb-");
            let hash = component["hashes"][0]["content"].as_str();
            assert!(ours || hash.is_some_and(|hash| hash.len() == 64), "{component}");
        }
        references.insert(document["metadata"]["component"]["bom-ref"].as_str().unwrap());
        for dependency in document["dependencies"].as_array().unwrap() {
            assert!(references.contains(dependency["ref"].as_str().unwrap()), "{dependency}");
            let on = dependency["dependsOn"].as_array().unwrap();
            assert!(on.iter().all(|on| references.contains(on.as_str().unwrap())), "{dependency}");
        }
        let has = |name: &str| components.iter().any(|component| component["name"] == name);
        assert!(has("aya") && has("aya-ebpf") && has("kube") && has("ring"), "what is linked is missing");
        assert!(!has("serde_derive") && !has("proptest") && !has("arbitrary"), "what is not linked is there");
    }
}
