//! The only folder that knows fields of kernel structures. Their offsets come from the running kernel (see
//! `observer_common::layout`); the verifier sees them as constants, because the global is frozen when it looks.
//!
//! Two ways to read: arguments of BTF tracepoints are typed pointers, loaded directly and checked by the
//! verifier; everything reached from a plain tracepoint goes through `bpf_probe_read_kernel`.

mod access;
mod file;
mod ring;
mod task;

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_get_current_pid_tgid, bpf_get_current_task, bpf_probe_read_user},
    programs::{ProbeContext, TracePointContext},
};
use observer_common::layout::ABSENT;

use access::{LAYOUT, offset, probe};

pub(crate) use file::{AF_UNIX, OpenFile, Sock, Socket, Waiting, iterated};
pub(crate) use ring::{RingAcceptRequest, RingCompletion, RingWakeup};
pub(crate) use task::{CallInProgress, OffCpuReason, Task, off, registers_place};

/// Process and thread id of whoever runs now, as the initial pid namespace has them.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "two 32-bit ids packed in 64 bits")]
pub(crate) fn current() -> (u32, u32) {
    let both = bpf_get_current_pid_tgid();
    ((both >> 32) as u32, both as u32)
}

/// Return value of a system call, in its exit tracepoint.
#[inline(always)]
pub(crate) fn returned(ctx: &TracePointContext) -> Option<i64> {
    if offset(&LAYOUT.exit_ret) == USUAL_PLACE {
        return Some(usual_word(ctx, 0).cast_signed());
    }
    // SAFETY: the helper checks the address.
    unsafe { ctx.read_at(offset(&LAYOUT.exit_ret)) }.ok()
}

/// Where what a system call's tracepoint passes begins, in bytes, but for kernels that put more in front. A word there is
/// read directly, which is all that the verifier lets pass: an offset that it is told of is no constant to the compiler.
const USUAL_PLACE: usize = 16;

#[inline(always)]
fn usual_word(ctx: &TracePointContext, n: usize) -> u64 {
    // SAFETY: inside the program's own context, as whoever calls this has made sure.
    unsafe { ctx.as_ptr().cast::<u64>().add(USUAL_PLACE / 8 + n).read_volatile() }
}

/// The first argument of `accept`, `accept4`, `connect` or `listen`, in its entry tracepoint.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the upper half of an `int` argument is anything")]
pub(crate) fn fd_argument(ctx: &TracePointContext) -> Option<u32> {
    arguments(ctx).map(|[fd]| fd as u32)
}

/// The first `N` arguments of a system call, in its entry tracepoint.
#[inline(always)]
pub(crate) fn arguments<const N: usize>(ctx: &TracePointContext) -> Option<[u64; N]> {
    if offset(&LAYOUT.enter_arguments) == USUAL_PLACE {
        return Some(core::array::from_fn(|n| usual_word(ctx, n)));
    }
    // SAFETY: the helper checks the address.
    unsafe { ctx.read_at(offset(&LAYOUT.enter_arguments)) }.ok()
}

/// Address of the instruction that a uprobe stands at, in the process.
#[inline(always)]
pub(crate) fn instruction(ctx: &ProbeContext) -> u64 {
    // SAFETY: the registers are the program's own context.
    unsafe { (*ctx.regs).rip }
}

/// Reads one register of the context. Each read is an instruction of its own: the compiler would fold the reads into
/// one at a computed place, which the verifier does not let pass.
macro_rules! read {
    ($ctx:ident, $field:ident) => {{
        #[cfg(target_arch = "bpf")]
        {
            let value: u64;
            // SAFETY: a field of the program's own context.
            unsafe {
                core::arch::asm!(
                    "{} = *(u64 *)({} + {})",
                    out(reg) value,
                    in(reg) $ctx.regs,
                    const core::mem::offset_of!(aya_ebpf::bindings::pt_regs, $field),
                    options(nostack, readonly)
                );
            }
            value
        }
        // Where this is only linted, never run.
        #[cfg(not(target_arch = "bpf"))]
        // SAFETY: as above.
        unsafe {
            (*$ctx.regs).$field
        }
    }};
}

/// A register of the thread that has come to a uprobe, by its number in `observer_common::deferred`.
#[inline(always)]
pub(crate) fn register(ctx: &ProbeContext, number: u64) -> u64 {
    match number {
        0 => read!(ctx, rdi),
        1 => read!(ctx, rsi),
        2 => read!(ctx, rdx),
        3 => read!(ctx, rcx),
        4 => read!(ctx, r8),
        5 => read!(ctx, r9),
        6 => read!(ctx, rax),
        7 => read!(ctx, rbx),
        8 => read!(ctx, rbp),
        9 => read!(ctx, rsp),
        10 => read!(ctx, r10),
        11 => read!(ctx, r11),
        12 => read!(ctx, r12),
        13 => read!(ctx, r13),
        14 => read!(ctx, r14),
        _ => read!(ctx, r15),
    }
}

/// Where the current thread has its variables; `None` where the kernel does not say.
#[inline(always)]
pub(crate) fn thread_pointer() -> Option<u64> {
    let field = offset(&LAYOUT.task_thread_pointer);
    if field == ABSENT as usize {
        return None;
    }
    // SAFETY: has no preconditions.
    let task = unsafe { bpf_get_current_task() } as *const u8;
    probe(task, field)
}

/// Reads what an argument of a system call points to in the caller's memory; `None` if it is not there now.
#[inline(always)]
pub(crate) fn read_user<T>(argument: u64) -> Option<T> {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_user(argument as *const T) }.ok()
}
