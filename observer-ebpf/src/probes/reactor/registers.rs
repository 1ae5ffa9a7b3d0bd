//! Where the kernel keeps the registers of a thread inside a system call.

use aya_ebpf::{macros::raw_tracepoint, programs::RawTracePointContext};

use crate::state::system_call;

/// Finds out where registers are. Never attached, but run on demand with the number and the first argument of the very
/// system call that runs it.
#[raw_tracepoint(tracepoint = "sys_enter")]
fn find_registers(ctx: RawTracePointContext) -> i32 {
    system_call::find_registers(ctx.arg(0), ctx.arg(1));
    0
}
