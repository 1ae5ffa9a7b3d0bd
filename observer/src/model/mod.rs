//! The data model: measurements in seconds and connections. It depends neither on their sources nor on the exporters.

pub(crate) mod histogram;
pub(crate) mod workload;
pub(crate) mod delivery;
pub(crate) mod frame;
mod culprit;
pub(crate) mod lag;
pub(crate) mod late;
pub(crate) mod busy;
pub(crate) mod request;
pub(crate) mod stall;
pub(crate) mod deferred;
pub(crate) mod trace;
pub(crate) mod snapshot;
pub(crate) mod workers;
pub(crate) mod subject;
pub(crate) mod family;
mod own;
pub(crate) mod catalog;
