//! Finds the registers of a thread inside a system call on its kernel stack.

use aya_ebpf::{macros::raw_tracepoint, programs::RawTracePointContext};

use crate::state::system_call;

/// Finds the offset of the registers on a kernel stack. Never attached: user space runs it with the number and the
/// first argument of the system call that runs it.
#[raw_tracepoint(tracepoint = "sys_enter")]
fn find_registers(ctx: RawTracePointContext) -> i32 {
    system_call::find_registers(ctx.arg(0), ctx.arg(1));
    0
}
