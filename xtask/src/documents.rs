//! `xtask docs`: generates files in `docs/`. Unit tests of observer check that they are up to date.

use std::fs;

use anyhow::{Context, Result};
use duct::cmd;

use crate::observer;
use crate::workspace::{cargo, root};

/// Makes the unit tests that check generated files write them first: `observer/src/generated.rs`.
const WRITE: &str = "OBSERVER_WRITE_DOCS";

/// Writes the page of metrics, the schema of reports and the picture of the live view.
pub(crate) fn write() -> Result<()> {
    let page = root().join("docs/metrics.md");
    let text = cmd!(observer::build()?, "metrics").read().context("`observer metrics` failed")?;
    fs::write(&page, text + "\n").with_context(|| format!("cannot write {}", page.display()))?;
    let tests = cargo("test", &["--package", "observer", "--lib", "--", "generated_"])?;
    tests.env(WRITE, "1").run().context("the schema and the picture were not written")?;
    Ok(())
}
