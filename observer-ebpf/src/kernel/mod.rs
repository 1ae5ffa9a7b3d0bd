//! Access to fields of kernel structures, which no other folder has. The offsets come from the running kernel (see
//! `observer_common::layout`). The verifier sees them as constants, because the global is frozen before verification.
//!
//! There are two ways to read. Arguments of BTF tracepoints are typed pointers, which are loaded directly and checked
//! by the verifier. Everything reached from a plain tracepoint goes through `bpf_probe_read_kernel`.

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

pub(crate) use file::{AF_UNIX, OpenFile, QueueEntry, Sock, Socket, iterated};
pub(crate) use ring::{RingAcceptRequest, RingCompletion, RingWakeup};
pub(crate) use task::{CallInProgress, OffCpuReason, Task, find_registers_offset, off_cpu_reason};

/// Process and thread ID of the current thread, in the initial PID namespace.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "two 32-bit ids packed in 64 bits")]
pub(crate) fn current() -> (u32, u32) {
    let both = bpf_get_current_pid_tgid();
    ((both >> 32) as u32, both as u32)
}

/// Return value of a system call, in its exit tracepoint.
#[inline(always)]
pub(crate) fn return_value(ctx: &TracePointContext) -> Option<i64> {
    if offset(&LAYOUT.exit_ret) == DEFAULT_OFFSET {
        return Some(word_at_default_offset(ctx, 0).cast_signed());
    }
    // SAFETY: the helper checks the address.
    unsafe { ctx.read_at(offset(&LAYOUT.exit_ret)) }.ok()
}

/// Offset of the arguments in the record of a system call's tracepoint, in bytes, except on kernels that put more
/// fields in front. A word at this offset is loaded directly. The verifier allows that only for offsets that are
/// constants to the compiler, which an offset from [`LAYOUT`] is not.
const DEFAULT_OFFSET: usize = 16;

#[inline(always)]
fn word_at_default_offset(ctx: &TracePointContext, n: usize) -> u64 {
    // SAFETY: inside the program's own context, as the caller has checked.
    unsafe { ctx.as_ptr().cast::<u64>().add(DEFAULT_OFFSET / 8 + n).read_volatile() }
}

/// The first argument of `accept`, `accept4`, `connect` or `listen`, in its entry tracepoint.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the upper half of an `int` argument is undefined")]
pub(crate) fn fd_argument(ctx: &TracePointContext) -> Option<u32> {
    arguments(ctx).map(|[fd]| fd as u32)
}

/// The first `N` arguments of a system call, in its entry tracepoint.
#[inline(always)]
pub(crate) fn arguments<const N: usize>(ctx: &TracePointContext) -> Option<[u64; N]> {
    if offset(&LAYOUT.enter_arguments) == DEFAULT_OFFSET {
        return Some(core::array::from_fn(|n| word_at_default_offset(ctx, n)));
    }
    // SAFETY: the helper checks the address.
    unsafe { ctx.read_at(offset(&LAYOUT.enter_arguments)) }.ok()
}

/// Address in the process of the instruction that a uprobe is attached to.
#[inline(always)]
pub(crate) fn instruction(ctx: &ProbeContext) -> u64 {
    // SAFETY: the registers are the program's own context.
    unsafe { (*ctx.regs).rip }
}

/// Reads one register of the context. Each read is a separate instruction in assembly: the compiler would merge the
/// reads into one at a computed offset, which the verifier rejects.
macro_rules! read_register {
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
        // This variant is only linted, never run.
        #[cfg(not(target_arch = "bpf"))]
        // SAFETY: as above.
        unsafe {
            (*$ctx.regs).$field
        }
    }};
}

/// A register of the thread that has reached a uprobe, by its number in `observer_common::deferred`.
#[inline(always)]
pub(crate) fn register(ctx: &ProbeContext, number: u64) -> u64 {
    match number {
        0 => read_register!(ctx, rdi),
        1 => read_register!(ctx, rsi),
        2 => read_register!(ctx, rdx),
        3 => read_register!(ctx, rcx),
        4 => read_register!(ctx, r8),
        5 => read_register!(ctx, r9),
        6 => read_register!(ctx, rax),
        7 => read_register!(ctx, rbx),
        8 => read_register!(ctx, rbp),
        9 => read_register!(ctx, rsp),
        10 => read_register!(ctx, r10),
        11 => read_register!(ctx, r11),
        12 => read_register!(ctx, r12),
        13 => read_register!(ctx, r13),
        14 => read_register!(ctx, r14),
        _ => read_register!(ctx, r15),
    }
}

/// The thread pointer of the current thread, the base of its local storage; `None` if the kernel's offset of it is
/// unknown.
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

/// Reads the memory of the current process, for instance what an argument of a system call points to; `None` if it
/// cannot be read now.
#[inline(always)]
pub(crate) fn read_user<T>(address: u64) -> Option<T> {
    // SAFETY: the helper checks the address.
    unsafe { bpf_probe_read_user(address as *const T) }.ok()
}
