//! Generates docs/metrics.md and the dashboards. Unit tests check that they are up to date. This module also checks the
//! dashboards against Grafana's published model.

use std::fs;

use anyhow::{Context, Result};
use duct::cmd;

use crate::python::{DASHBOARD_MODEL, PYTHON};
use crate::shell::quietly;
use crate::workspace::root;
use crate::{dashboards, observer};

/// `xtask docs`.
pub(crate) fn write() -> Result<()> {
    dashboards::write()?;
    let page = root().join("docs/metrics.md");
    let text = cmd!(observer::build()?, "metrics").read().context("`observer metrics` failed")?;
    fs::write(&page, text + "\n").with_context(|| format!("cannot write {}", page.display()))
}

/// Fails if a dashboard has a field that Grafana's model does not define.
pub(crate) fn check() -> Result<()> {
    let model = DASHBOARD_MODEL.install()?;
    let script = root().join("xtask/src/dashboards/check.py");
    let check = cmd!(PYTHON, script, root().join("dashboards")).env("PYTHONPATH", &model);
    quietly("reading the dashboards", &check)
}
