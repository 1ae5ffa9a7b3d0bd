//! What the programs know: one file for the maps of each subject, and all that reads or changes them.

pub(crate) mod id_filter;
pub(crate) mod targets;
pub(crate) mod system_call;
pub(crate) mod pools;
pub(crate) mod accept_queue;
pub(crate) mod listeners;
pub(crate) mod reactors;
pub(crate) mod gc;
pub(crate) mod work;
pub(crate) mod requests;
pub(crate) mod tasks;
