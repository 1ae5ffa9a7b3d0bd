//! Takes raw figures out of the kernel.

pub(crate) mod maps;
