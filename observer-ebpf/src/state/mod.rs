//! State of the programs: one file for each subject, with its maps and the code that accesses them.

pub(crate) mod id_filter;
pub(crate) mod targets;
pub(crate) mod system_call;
pub(crate) mod waiters;
pub(crate) mod accept_queue;
pub(crate) mod listeners;
pub(crate) mod reactors;
pub(crate) mod gc;
pub(crate) mod work;
pub(crate) mod requests;
pub(crate) mod tasks;
