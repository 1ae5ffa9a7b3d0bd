//! Takes raw figures out of the kernel.

mod batch;
pub(crate) mod capacity;
pub(crate) mod entries;
mod id_filter;
mod targets;
pub(crate) mod reactors;
pub(crate) mod maps;
