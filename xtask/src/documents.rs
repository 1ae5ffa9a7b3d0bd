//! What is generated into the repository: the page of metrics and the dashboards. That they are up to date, unit tests
//! check; that Grafana understands the dashboards, its own published model of them does.

use std::fs;

use anyhow::{Context, Result};
use duct::cmd;

use crate::shell::{ask, quietly};
use crate::workspace::{kept, root};
use crate::{dashboards, observer};

/// Grafana's model of dashboards, as its release 11.6 has it.
const MODEL: &str = "grafana-foundation-sdk==1769699379!11.6.0";

/// Debian's own: a version manager's may be too old.
const PYTHON: &str = "/usr/bin/python3";

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
    let model = kept("tools/grafana-foundation-sdk");
    let has_model = cmd!(PYTHON, "-c", "import grafana_foundation_sdk").env("PYTHONPATH", &model);
    if ask(&has_model).is_none() {
        eprintln!("setup: fetching {MODEL}");
        let pip = cmd!(PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--target", &model, MODEL);
        quietly("pip install", &pip)?;
    }
    let script = root().join("xtask/src/dashboards/check.py");
    let check = cmd!(PYTHON, script, root().join("dashboards")).env("PYTHONPATH", &model);
    quietly("reading the dashboards", &check)
}
