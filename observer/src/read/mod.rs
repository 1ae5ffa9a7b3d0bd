//! Takes raw figures out of the kernel.

mod batch;
pub(crate) mod board;
pub(crate) mod capacity;
mod counted;
pub(crate) mod maps;
