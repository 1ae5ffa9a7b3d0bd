//! Packages of the Python registry that xtask and the tests use: pinned, and kept in a folder of their own each.

use std::path::PathBuf;

use anyhow::Result;
use duct::cmd;

use crate::shell::{ask, quietly};
use crate::workspace::kept;

/// Debian's own: a version manager's may be too old.
pub(crate) const PYTHON: &str = "/usr/bin/python3";

/// Packages that are installed together.
pub(crate) struct Packages {
    /// Their folder's name.
    pub(crate) folder: &'static str,
    /// What can be imported when they are there.
    pub(crate) modules: &'static str,
    /// Them and all that they need.
    pub(crate) requirements: &'static [&'static str],
}

/// Grafana's model of dashboards, as its release 11.6 has it.
pub(crate) const DASHBOARD_MODEL: Packages = Packages {
    folder: "grafana-foundation-sdk",
    modules: "grafana_foundation_sdk",
    requirements: &["grafana-foundation-sdk==1769699379!11.6.0"],
};

/// The schemas of Kubernetes, release by release.
pub(crate) const SCHEMAS: Packages = Packages {
    folder: "kubernetes",
    modules: "kubernetes_validate, yaml",
    requirements: &[
        "kubernetes-validate==1.37.0",
        "PyYAML==6.0.4",
        "attrs==26.1.0",
        "importlib-resources==7.1.0",
        "jsonschema==4.26.0",
        "jsonschema-specifications==2025.9.1",
        "packaging==26.4",
        "referencing==0.37.0",
        "rpds-py==2026.9.1",
        "typing-extensions==4.16.0",
    ],
};

/// A collector, and what the tests take OTLP with.
pub(crate) const COLLECTOR: Packages = Packages {
    folder: "otlp",
    modules: "rotel, grpc, google.rpc.status_pb2, opentelemetry.proto.metrics.v1.metrics_pb2",
    requirements: &[
        "rotel==0.0.1a15",
        "grpcio==1.85.3",
        "protobuf==7.36.2",
        "typing-extensions==4.16.0",
        "googleapis-common-protos==1.76.0",
        "opentelemetry-proto==1.45.2",
    ],
};

/// A tracer that publishes OpenTelemetry's thread context.
pub(crate) const TRACER: Packages = Packages {
    folder: "ddtrace",
    modules: "ddtrace.internal.native",
    requirements: &[
        "ddtrace==4.16.0",
        "ddtrace-internal==0.1.0",
        "bytecode==0.19.1",
        "envier==0.6.1",
        "opentelemetry-api==1.45.2",
        "typing-extensions==4.16.0",
        "wrapt==2.5.2",
    ],
};

impl Packages {
    /// Installs them if they are not there; returns their folder.
    pub(crate) fn install(&self) -> Result<PathBuf> {
        let folder = kept("tools").join(self.folder);
        let import = format!("import {}", self.modules);
        if ask(&cmd!(PYTHON, "-c", import).env("PYTHONPATH", &folder)).is_none() {
            let list = self.requirements.join(" ");
            eprintln!("setup: fetching {list}");
            let args = ["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"];
            let args = args.map(Into::into).into_iter().chain([folder.clone().into_os_string()]);
            quietly("pip install", &cmd(PYTHON, args.chain(self.requirements.iter().map(Into::into))))?;
        }
        Ok(folder)
    }
}
