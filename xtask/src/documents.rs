//! `xtask docs`: generates `docs/metrics.md`. A unit test of observer checks that the page is up to date.

use std::fs;

use anyhow::{Context, Result};
use duct::cmd;

use crate::observer;
use crate::workspace::root;

/// Writes the page.
pub(crate) fn write() -> Result<()> {
    let page = root().join("docs/metrics.md");
    let text = cmd!(observer::build()?, "metrics").read().context("`observer metrics` failed")?;
    fs::write(&page, text + "\n").with_context(|| format!("cannot write {}", page.display()))
}
