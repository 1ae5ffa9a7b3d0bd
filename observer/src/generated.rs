//! Files of the repository that unit tests generate and check, because nothing in the released program needs what generates
//! them.

use std::{env, fs, path::Path};

/// Asserts that a file in `docs/` has this content. `cargo xtask docs` sets a variable with which the file is written first.
#[track_caller]
pub(crate) fn assert_current(file: &str, content: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file);
    if env::var_os("OBSERVER_WRITE_DOCS").is_some() {
        fs::write(&path, content).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == content, "docs/{file} is out of date: run `cargo xtask docs`");
}
