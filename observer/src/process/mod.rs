//! Processes under observation, from `/proc`: identity, sockets, runtimes, hooks, and their selection.

pub(crate) mod container;
pub(crate) mod pod;
pub(crate) mod identity;
mod info;
pub(crate) mod criteria;
pub(crate) mod choice;
pub(crate) mod connections;
pub(crate) mod trace_context;
pub(crate) mod drops;
pub(crate) mod wait_call;
pub(crate) mod epoll_set;
pub(crate) mod runtime;
pub(crate) mod hooks;
pub(crate) mod check;

pub(crate) use info::{
    Process, ancestors, descendants, described, ensure_observable, environment, has_thread, is_there,
    network_namespace, socket_inode, start_ticks, thread_name,
};
