//! Brings snapshots out: to Prometheus, to people, to programs.

pub(crate) mod flame;
pub(crate) mod json;
pub(crate) mod prometheus;
pub(crate) mod text;
