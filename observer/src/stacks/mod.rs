//! Reads the stack of a stalled thread as named frames: native frames from registers and stack memory, frames of an
//! interpreter from the process's memory. It only reads; the observed process is never stopped.

pub(crate) mod naming;
mod raw_frames;
pub(crate) mod unwind;
pub(crate) mod python;
pub(crate) mod ruby;
pub(crate) mod interpreter;
mod perf_map;
mod sampler;
pub(crate) mod symbols;
pub(crate) mod task_names;
mod readiness;
pub(crate) mod reader;
pub(crate) mod watch;
