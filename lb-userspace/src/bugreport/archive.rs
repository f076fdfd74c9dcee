//! The parts as a compressed archive, for its owner only.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use tar::{Builder, Header};

use super::Part;

/// The directory in the archive.
const DIR: &str = "fairlead-bugreport";
/// Standard output, for `kubectl exec`: nothing can be written in the agent's container.
const STDOUT: &str = "-";

/// Writes the report to a new file, or to standard output if it is called `-`.
pub fn write(parts: &[Part], output: &Path) -> Result<()> {
    if output == Path::new(STDOUT) {
        return archive(parts, io::stdout().lock()).context("cannot write to standard output");
    }
    let new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(output);
    let file = new.with_context(|| format!("cannot make {}", output.display()))?;
    archive(parts, file).with_context(|| format!("cannot write {}", output.display()))
}

fn archive(parts: &[Part], out: impl Write) -> io::Result<()> {
    let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or_default();
    let mut archive = Builder::new(GzEncoder::new(out, Compression::default()));
    for part in parts {
        let mut header = Header::new_gnu();
        header.set_mode(0o600);
        header.set_mtime(now);
        header.set_size(part.text.len() as u64);
        archive.append_data(&mut header, Path::new(DIR).join(part.name), part.text.as_bytes())?;
    }
    archive.into_inner()?.finish()?.flush()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::PermissionsExt as _;

    use flate2::read::GzDecoder;

    use super::*;

    #[test]
    fn a_report_is_a_new_file_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.tar.gz");
        let parts = [Part { name: "a.txt", text: "text".into() }];
        write(&parts, &path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let refused = write(&parts, &path).unwrap_err();
        assert!(format!("{refused:#}").contains("exists"), "{refused:#}");
        let mut archive = tar::Archive::new(GzDecoder::new(std::fs::File::open(&path).unwrap()));
        let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(entry.path().unwrap(), Path::new("fairlead-bugreport/a.txt"));
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
    }
}
