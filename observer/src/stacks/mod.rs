//! Reads the stack of a stalled thread as named frames: native frames from registers and stack memory, frames of an
//! interpreter from the process's memory. It only reads; the observed process is never stopped.

pub(crate) mod elf;
pub(crate) mod instructions;
pub(crate) mod mappings;
pub(crate) mod image;
pub(crate) mod memory;
pub(crate) mod code;
pub(crate) mod naming;
mod raw_frames;
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
pub(crate) mod reader;
pub(crate) mod variable;
pub(crate) mod watch;
