//! The manifests in `deploy/kubernetes`. That a pod made of them works, observer's own tests show; that an API server takes
//! them, the schemas of Kubernetes do.

use anyhow::Result;
use duct::cmd;

use crate::python::{PYTHON, SCHEMAS};
use crate::shell::quietly;
use crate::workspace::root;

/// The first release that has all fields, and the latest that the schemas are of.
const RELEASES: [&str; 2] = ["1.30", "1.37"];

/// Finds fault with whatever these releases do not know.
pub(crate) fn check() -> Result<()> {
    let schemas = SCHEMAS.install()?;
    let script = root().join("xtask/src/manifests/check.py");
    let [first, latest] = RELEASES;
    let check = cmd!(PYTHON, script, root().join("deploy/kubernetes"), first, latest);
    quietly("reading the manifests", &check.env("PYTHONPATH", schemas))
}
