//! Exports snapshots: metrics for Prometheus and OpenTelemetry, reports as text, JSON and flame graph, and the live
//! view. `run.rs` starts each of them; `Format` in `cli.rs` names the reports.

pub(crate) mod flame;
mod gzip;
pub(crate) mod json;
pub(crate) mod series;
pub(crate) mod otlp;
pub(crate) mod prometheus;
pub(crate) mod endpoint;
pub(crate) mod reference;
mod words;
pub(crate) mod live;
pub(crate) mod text;
