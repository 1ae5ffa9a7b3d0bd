//! User-space access to the maps of the eBPF programs.

mod batch;
pub(crate) mod capacity;
pub(crate) mod entries;
mod id_filter;
mod targets;
mod slots;
pub(crate) mod reactors;
pub(crate) mod maps;
