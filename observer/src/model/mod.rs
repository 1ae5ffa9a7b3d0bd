//! What was measured, in seconds and connections: knows neither where figures come from nor where they go.

pub(crate) mod catalog;
pub(crate) mod deferred;
pub(crate) mod delivery;
pub(crate) mod frame;
pub(crate) mod histogram;
pub(crate) mod lag;
mod own;
pub(crate) mod place;
pub(crate) mod request;
pub(crate) mod snapshot;
pub(crate) mod stall;
pub(crate) mod subject;
pub(crate) mod trace;
