//! Brings snapshots out: to Prometheus, to OpenTelemetry collectors, to people (once or live), to programs.

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
