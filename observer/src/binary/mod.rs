//! Files and memory of observed processes: ELF files and their symbols, mappings, and reading memory. Apart from `stacks`,
//! because attaching reads them as well.

pub(crate) mod elf;
pub(crate) mod mappings;
pub(crate) mod image;
pub(crate) mod memory;
pub(crate) mod untrusted_elf;
#[cfg(test)]
pub(crate) mod testing;
