//! An image as the OCI image layout (v1.1) has it, in a tar archive that `docker load` reads as well.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::arch::Arch;
use super::stamp::Stamp;
use super::tree::{Tree, gzip};

/// As the manifests in `deploy/` call it.
pub const NAME: &str = "fairlead";
/// What the image runs; the DaemonSet names only the arguments.
pub const PROGRAM: &str = "/usr/local/bin/fairlead";
/// For `kubectl exec daemonset/fairlead -- fairlead status`.
pub const ENV: &str = "PATH=/usr/local/bin";
/// Capabilities belong to root, and so does what is pinned.
pub const USER: &str = "0:0";
/// Where it begins.
pub const DIRECTORY: &str = "/";

/// What the image says about itself (`org.opencontainers.image.…`).
pub fn labels(stamp: &Stamp) -> Result<BTreeMap<&'static str, String>> {
    let mut labels = BTreeMap::from([
        ("org.opencontainers.image.title", "Fairlead".to_owned()),
        (
            "org.opencontainers.image.description",
            "A Service load balancer for Kubernetes nodes, on eBPF, in place of kube-proxy".to_owned(),
        ),
        ("org.opencontainers.image.licenses", env!("CARGO_PKG_LICENSE").to_owned()),
        ("org.opencontainers.image.version", stamp.version.to_owned()),
        ("org.opencontainers.image.created", stamp.date()?),
    ]);
    if let Some(revision) = &stamp.revision {
        labels.insert("org.opencontainers.image.revision", revision.clone());
    }
    Ok(labels)
}

/// The archive of an image with these files.
pub fn archive(files: &Tree, arch: Arch, stamp: &Stamp) -> Result<Vec<u8>> {
    let layer = files.tar(stamp.time)?;
    let mut layout = Layout::default();
    let created = stamp.date()?;
    let config = layout.json(
        "application/vnd.oci.image.config.v1+json",
        &json!({
            "created": created,
            "architecture": arch.name(),
            "os": "linux",
            "config": {
                "User": USER,
                "Env": [ENV],
                "Entrypoint": [PROGRAM],
                "WorkingDir": DIRECTORY,
                "Labels": labels(stamp)?,
            },
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
            "history": [{ "created": created, "created_by": "cargo xtask image" }],
        }),
    );
    let layer = layout.blob("application/vnd.oci.image.layer.v1.tar+gzip", gzip(&layer)?);
    let tag = format!("{NAME}:{}", stamp.version);
    // What `docker save` writes, and all that `docker load` of older versions reads.
    let docker = json!([{ "Config": path_of(&config), "RepoTags": [tag], "Layers": [path_of(&layer)] }]);
    let mut manifest = layout.json(
        "application/vnd.oci.image.manifest.v1+json",
        &json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": [layer],
        }),
    );
    manifest["platform"] = json!({ "architecture": arch.name(), "os": "linux" });
    manifest["annotations"] = json!({
        // The name that the kubelet asks containerd for when a pod says `fairlead:0.1.0`.
        "io.containerd.image.name": format!("docker.io/library/{tag}"),
        "org.opencontainers.image.ref.name": stamp.version,
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    layout.0.file("index.json", index.to_string());
    layout.0.file("oci-layout", json!({ "imageLayoutVersion": "1.0.0" }).to_string());
    layout.0.file("manifest.json", docker.to_string());
    layout.0.tar(stamp.time)
}

/// Files by their contents.
#[derive(Default)]
struct Layout(Tree);

impl Layout {
    /// Takes a file in; its descriptor.
    fn blob(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let descriptor = json!({ "mediaType": media_type, "digest": digest(&bytes), "size": bytes.len() });
        self.0.file(path_of(&descriptor), bytes);
        descriptor
    }

    fn json(&mut self, media_type: &str, value: &Value) -> Value {
        self.blob(media_type, value.to_string().into_bytes())
    }
}

/// Where the layout has what this descriptor describes.
fn path_of(descriptor: &Value) -> String {
    let digest = descriptor["digest"].as_str().unwrap_or_default();
    format!("blobs/{}", digest.replace(':', "/"))
}

/// `sha256:…`
fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256(bytes))
}

/// As `sha256sum` prints it.
pub fn sha256(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::GzDecoder;

    use super::*;

    fn stamp() -> Stamp {
        Stamp { version: "1.2.3", time: 1_700_000_000, revision: Some("0123abcd".to_owned()) }
    }

    fn example() -> Vec<u8> {
        let mut files = Tree::default();
        files.program(PROGRAM, *b"the program");
        files.file("/usr/share/doc/fairlead/LICENSE-MIT", *b"the licence");
        archive(&files, Arch::Arm64, &stamp()).unwrap()
    }

    fn unpacked(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (entry.path().unwrap().to_string_lossy().into_owned(), bytes)
        });
        entries.collect()
    }

    fn json(files: &BTreeMap<String, Vec<u8>>, path: &str) -> Value {
        serde_json::from_slice(&files[path]).unwrap()
    }

    /// What a descriptor describes is there, with the digest and the size that it says.
    fn followed<'a>(files: &'a BTreeMap<String, Vec<u8>>, descriptor: &Value) -> &'a [u8] {
        let bytes = &files[&path_of(descriptor)];
        assert_eq!(descriptor["digest"], digest(bytes));
        assert_eq!(descriptor["size"], bytes.len());
        bytes
    }

    #[test]
    fn an_image_is_the_same_bytes_each_time() {
        assert_eq!(sha256(&example()), sha256(&example()));
    }

    #[test]
    fn everything_is_where_its_descriptor_says() {
        let files = unpacked(&example());
        assert_eq!(json(&files, "oci-layout")["imageLayoutVersion"], "1.0.0");
        let index = json(&files, "index.json");
        let [described] = index["manifests"].as_array().unwrap().as_slice() else { panic!("{index}") };
        assert_eq!(described["platform"]["architecture"], "arm64");
        assert_eq!(described["annotations"]["io.containerd.image.name"], "docker.io/library/fairlead:1.2.3");
        let manifest: Value = serde_json::from_slice(followed(&files, described)).unwrap();
        assert_eq!(manifest["mediaType"], described["mediaType"]);
        let config: Value = serde_json::from_slice(followed(&files, &manifest["config"])).unwrap();
        assert_eq!(config["architecture"], "arm64");
        assert_eq!(config["config"]["Entrypoint"], json!([PROGRAM]));
        let mut layer = Vec::new();
        GzDecoder::new(followed(&files, &manifest["layers"][0])).read_to_end(&mut layer).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"], json!([digest(&layer)]));
        assert_eq!(unpacked(&layer)["usr/local/bin/fairlead"], b"the program");
    }

    #[test]
    fn docker_finds_the_same_in_its_own_list() {
        let files = unpacked(&example());
        let manifest = &json(&files, "index.json")["manifests"][0];
        let manifest: Value = serde_json::from_slice(followed(&files, manifest)).unwrap();
        let docker = json(&files, "manifest.json");
        assert_eq!(docker[0]["RepoTags"], json!(["fairlead:1.2.3"]));
        assert_eq!(docker[0]["Config"], path_of(&manifest["config"]));
        assert_eq!(docker[0]["Layers"], json!([path_of(&manifest["layers"][0])]));
    }

    #[test]
    fn labels_say_what_it_is_made_of_and_when() {
        let labels = labels(&stamp()).unwrap();
        assert_eq!(labels["org.opencontainers.image.licenses"], "MIT OR GPL-2.0-only");
        assert_eq!(labels["org.opencontainers.image.created"], "2023-11-14T22:13:20Z");
        assert_eq!(labels["org.opencontainers.image.revision"], "0123abcd");
        assert_eq!(super::labels(&Stamp { revision: None, ..stamp() }).unwrap().len(), labels.len() - 1);
    }
}
