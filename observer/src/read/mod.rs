//! Takes raw figures out of the kernel.

mod batch;
pub(crate) mod capacity;
pub(crate) mod maps;
mod presence;
pub(crate) mod reactors;
mod targets;
