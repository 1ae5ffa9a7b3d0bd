//! What is generated into the repository: the page of metrics and the dashboards. That they are up to date, unit tests
//! check; that Grafana understands the dashboards, its own published model of them does.

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
    let text =
        cmd!(observer::build()?, "metrics").read().context("observer does not write its page of metrics")?;
    fs::write(&page, text + "\n").with_context(|| format!("cannot write {}", page.display()))
}

/// Reads the dashboards with Grafana's model and finds fault with whatever that does not know.
pub(crate) fn check() -> Result<()> {
    let model = DASHBOARD_MODEL.install()?;
    let script = root().join("xtask/src/dashboards/check.py");
    let check = cmd!(PYTHON, script, root().join("dashboards")).env("PYTHONPATH", &model);
    quietly("reading the dashboards", &check)
}
