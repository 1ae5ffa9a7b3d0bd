//! Pinned Python packages that xtask and the tests use, each set in a folder of its own.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;
use duct::cmd;

use crate::pins;
use crate::shell::run_quietly;
use crate::workspace::target_path;

/// Debian's Python: one that a version manager installed may be too old.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// File in the folder of a set that lists the installed requirements.
const RECORD: &str = "installed";

/// A set of packages that are installed together.
pub(crate) struct Packages {
    /// Name of the folder that they are installed to.
    pub(crate) folder: &'static str,
    /// Modules whose import is tested after installation; may be empty.
    pub(crate) modules: &'static str,
    /// The packages with all their dependencies.
    pub(crate) requirements: &'static [&'static str],
}

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
    /// Installs the packages unless these versions are installed already. Returns their folder.
    pub(crate) fn install(&self) -> Result<PathBuf> {
        let folder = target_path("tools").join(self.folder);
        let record = folder.join(RECORD);
        let list = self.requirements.join(" ");
        if fs::read_to_string(&record).is_ok_and(|installed| installed == list) {
            return Ok(folder);
        }
        eprintln!("setup: fetching {list}");
        let scratch = tempfile::tempdir_in(target_path("tools"))?;
        let args = ["-m", "pip", "install", "--quiet", "--no-deps", "--target"];
        let args = args.map(Into::into).into_iter().chain([scratch.path().as_os_str().to_owned()]);
        run_quietly("pip install", &cmd(PYTHON, args.chain(self.requirements.iter().map(Into::into))))?;
        if !self.modules.is_empty() {
            let import = cmd!(PYTHON, "-c", format!("import {}", self.modules));
            let import = import.env("PYTHONPATH", scratch.path());
            run_quietly("importing what pip installed", &import)?;
        }
        fs::write(scratch.path().join(RECORD), list)?;
        // Rename last, so that the folder is always complete: other clones share it.
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::rename(scratch.keep(), &folder)?;
        Ok(folder)
    }
}
