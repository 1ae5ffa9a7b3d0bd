//! Brings snapshots out: to Prometheus, to OpenTelemetry collectors, to people (once or live), to programs.

pub(crate) mod endpoint;
pub(crate) mod flame;
mod gzip;
pub(crate) mod json;
pub(crate) mod live;
pub(crate) mod otlp;
pub(crate) mod plain;
pub(crate) mod prometheus;
pub(crate) mod reference;
pub(crate) mod series;
pub(crate) mod text;
mod words;
