//! Packages of the Python registry that xtask and the tests use: pinned, and kept in a folder of their own each.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use duct::cmd;

use crate::pins;
use crate::shell::quietly;
use crate::workspace::kept;

/// Debian's own: a version manager's may be too old.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// The file in a folder of packages that lists what was installed.
const RECORD: &str = "installed";

/// Packages that are installed together.
pub(crate) struct Packages {
    /// Their folder's name.
    pub(crate) folder: &'static str,
    /// What can be imported when they are there, if anything can.
    pub(crate) modules: &'static str,
    /// Them and all that they need.
    pub(crate) requirements: &'static [&'static str],
}

pub(crate) const DASHBOARD_MODEL: Packages = Packages {
    folder: "grafana-foundation-sdk",
    modules: "grafana_foundation_sdk",
    requirements: pins::DASHBOARD_MODEL,
};

pub(crate) const SCHEMAS: Packages =
    Packages { folder: "kubernetes", modules: "kubernetes_validate, yaml", requirements: pins::SCHEMAS };

pub(crate) const COLLECTOR: Packages = Packages {
    folder: "otlp",
    modules: "rotel, grpc, google.rpc.status_pb2, opentelemetry.proto.metrics.v1.metrics_pb2",
    requirements: pins::COLLECTOR,
};

pub(crate) const TRACER: Packages =
    Packages { folder: "ddtrace", modules: "ddtrace.internal.native", requirements: pins::TRACER };

impl Packages {
    /// Installs them if they are not there in these versions; returns their folder.
    pub(crate) fn install(&self) -> Result<PathBuf> {
        let folder = kept("tools").join(self.folder);
        let record = folder.join(RECORD);
        let list = self.requirements.join(" ");
        if fs::read_to_string(&record).is_ok_and(|installed| installed == list) {
            return Ok(folder);
        }
        eprintln!("setup: fetching {list}");
        let scratch = tempfile::tempdir_in(kept("tools"))?;
        let args = ["-m", "pip", "install", "--quiet", "--no-deps", "--target"];
        let args = args.map(Into::into).into_iter().chain([scratch.path().as_os_str().to_owned()]);
        quietly("pip install", &cmd(PYTHON, args.chain(self.requirements.iter().map(Into::into))))?;
        if !self.modules.is_empty() {
            let import = cmd!(PYTHON, "-c", format!("import {}", self.modules));
            let import = import.env("PYTHONPATH", scratch.path());
            quietly("importing what pip installed", &import)?;
        }
        fs::write(scratch.path().join(RECORD), list)?;
        // Last and at once, so that what is there is whole: other clones have the same folder.
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::rename(scratch.keep(), &folder)?;
        Ok(folder)
    }
}
