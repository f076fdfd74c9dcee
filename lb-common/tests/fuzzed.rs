//! What fuzzing has found, and what it has found worth keeping, for compilers without a fuzzer: every file of
//! `fuzz/fixtures` and `fuzz/corpus` is lived through again.

use std::fs;
use std::path::Path;

use lb_common::testing::conversation::{any_packet, history};

/// Runs a target on all that is kept for it; how many files that were.
fn replay(target: &str, run: fn(&[u8])) -> usize {
    let mut files = 0;
    for kind in ["fixtures", "corpus"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(kind).join(target);
        for entry in fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let file = entry.expect("a file").path();
            let data = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            let lived = std::panic::catch_unwind(|| run(&data));
            assert!(lived.is_ok(), "{}: see above", file.display());
            files += 1;
        }
    }
    files
}

#[test]
fn packets_that_fuzzing_found_keep_the_rules() {
    assert!(replay("parse", any_packet) > 50);
}

#[test]
fn histories_that_fuzzing_found_keep_the_rules() {
    assert!(replay("conversations", history) > 50);
}
