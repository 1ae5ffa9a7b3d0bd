//! What a stalled thread was doing, as frames people can read: native ones from registers and stack memory, and
//! those of interpreters from the process's own data. Only reads; the observed process is never stopped.

pub(crate) mod elf;
pub(crate) mod instructions;
pub(crate) mod mappings;
pub(crate) mod image;
pub(crate) mod memory;
pub(crate) mod code;
pub(crate) mod naming;
mod snapshot;
#[cfg(test)]
mod testing;
pub(crate) mod unwind;
pub(crate) mod python;
pub(crate) mod ruby;
pub(crate) mod interpreter;
mod perf_map;
mod sampler;
mod untrusted_elf;
pub(crate) mod symbols;
pub(crate) mod task_names;
pub(crate) mod now;
pub(crate) mod variable;
pub(crate) mod watch;
