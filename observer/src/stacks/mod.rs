//! What a stalled thread was doing, as frames people can read: native ones from registers and stack memory, and
//! those of interpreters from the process's own data. Only reads; the observed process is never stopped.

pub(crate) mod code;
pub(crate) mod elf;
mod harmless;
pub(crate) mod image;
pub(crate) mod instructions;
pub(crate) mod interpreter;
pub(crate) mod mappings;
pub(crate) mod memory;
pub(crate) mod naming;
pub(crate) mod now;
mod perf_map;
pub(crate) mod python;
pub(crate) mod ruby;
mod sampler;
mod snapshot;
pub(crate) mod symbols;
#[cfg(test)]
mod testing;
pub(crate) mod unwind;
pub(crate) mod variable;
pub(crate) mod watch;
