//! Validates the manifests in `deploy/kubernetes` against the schemas of Kubernetes. Tests of observer run a pod made
//! from them.

use anyhow::Result;
use duct::cmd;

use crate::python::{PYTHON, SCHEMAS};
use crate::shell::run_quietly;
use crate::workspace::root;

/// Oldest supported release of Kubernetes, the first with all fields used, and the newest release with a schema.
const RELEASES: [&str; 2] = ["1.30", "1.37"];

/// Fails if a manifest does not match the schema of one of these releases.
pub(crate) fn check() -> Result<()> {
    let schemas = SCHEMAS.install()?;
    let script = root().join("xtask/src/manifests/check.py");
    let [first, latest] = RELEASES;
    let check = cmd!(PYTHON, script, root().join("deploy/kubernetes"), first, latest);
    run_quietly("reading the manifests", &check.env("PYTHONPATH", schemas))
}
