//! Threads: their IDs, why they leave their CPU, and the system call that they are in.

use aya_ebpf::{helpers::bpf_get_current_task, programs::BtfTracePointContext};
use observer_common::layout::ABSENT;

use super::access::{LAYOUT, load, offset, probe};

/// `__TASK_STOPPED` and `__TASK_TRACED`.
const STOPPED: u64 = 4 | 8;

/// A `struct task_struct` passed to a BTF tracepoint.
pub(crate) struct Task(*const u8);

impl Task {
    #[inline(always)]
    pub(crate) fn argument(ctx: &BtfTracePointContext, n: usize) -> Self {
        Self(ctx.arg(n))
    }

    #[inline(always)]
    pub(crate) fn tid(&self) -> u32 {
        // SAFETY: typed pointer, offset of this field.
        unsafe { load(self.0, offset(&LAYOUT.task_pid)) }
    }

    #[inline(always)]
    pub(crate) fn tgid(&self) -> u32 {
        // SAFETY: as above.
        unsafe { load(self.0, offset(&LAYOUT.task_tgid)) }
    }

    /// Number of threads of the process that have not begun to exit.
    #[inline(always)]
    pub(crate) fn live_threads(&self) -> u32 {
        // SAFETY: as above; `signal` is a typed pointer as well.
        unsafe {
            let signal: *const u8 = load(self.0, offset(&LAYOUT.task_signal));
            load(signal, offset(&LAYOUT.signal_live))
        }
    }
}

/// Why `sched_switch` takes a thread off its CPU.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OffCpuReason {
    /// It is still runnable.
    Preempted,
    /// It waits for something.
    Blocked,
    /// It has been stopped, whatever it was doing.
    Stopped,
}

#[inline(always)]
pub(crate) fn off_cpu_reason(ctx: &BtfTracePointContext) -> OffCpuReason {
    let preempted: u8 = ctx.arg(0);
    if preempted != 0 {
        return OffCpuReason::Preempted;
    }
    let state = if offset(&LAYOUT.switch_has_state) != 0 {
        // A wake-up may already have changed the field. The argument is what the scheduler decided on.
        let state: u32 = ctx.arg(3);
        u64::from(state)
    } else {
        let previous: *const u8 = ctx.arg(1);
        // SAFETY: typed pointer, offset of this field.
        unsafe { load(previous, offset(&LAYOUT.task_state)) }
    };
    match state {
        0 => OffCpuReason::Preempted,
        state if state & STOPPED != 0 => OffCpuReason::Stopped,
        _ => OffCpuReason::Blocked,
    }
}

/// A system call in progress, read from the registers that the kernel has saved of its caller.
pub(crate) struct CallInProgress(*const u8);

impl CallInProgress {
    /// The call of the current thread, whose `struct task_struct` is argument `n` of a BTF tracepoint. `at` is the
    /// offset of the saved registers on every kernel stack.
    #[inline(always)]
    pub(crate) fn of_current(ctx: &BtfTracePointContext, n: usize, at: u32) -> Self {
        let task: *const u8 = ctx.arg(n);
        // SAFETY: typed pointer, offset of this field.
        let stack: *const u8 = unsafe { load(task, offset(&LAYOUT.task_stack)) };
        Self(stack.wrapping_add(at as usize))
    }

    /// The call of the current thread, for programs that are not passed its `struct task_struct`.
    #[inline(always)]
    pub(crate) fn current(at: u32) -> Option<Self> {
        // SAFETY: has no preconditions.
        let task = unsafe { bpf_get_current_task() } as *const u8;
        let stack: *const u8 = probe(task, offset(&LAYOUT.task_stack))?;
        Some(Self(stack.wrapping_add(at as usize)))
    }

    /// Number of the call; `None` outside of any call, that is, while a fault is handled.
    #[inline(always)]
    pub(crate) fn number(&self) -> Option<u32> {
        u32::try_from(self.word(&LAYOUT.registers_call)?.cast_signed()).ok()
    }

    #[inline(always)]
    pub(crate) fn first(&self) -> Option<u64> {
        self.word(&LAYOUT.registers_first)
    }

    #[inline(always)]
    pub(crate) fn second(&self) -> Option<u64> {
        self.word(&LAYOUT.registers_second)
    }

    #[inline(always)]
    pub(crate) fn third(&self) -> Option<u64> {
        self.word(&LAYOUT.registers_third)
    }

    /// The caller's frame pointer.
    #[inline(always)]
    pub(crate) fn frame_pointer(&self) -> Option<u64> {
        self.word(&LAYOUT.registers_frame)
    }

    #[inline(always)]
    fn word(&self, field: &'static u32) -> Option<u64> {
        if offset(field) == ABSENT as usize { None } else { probe(self.0, offset(field)) }
    }
}

/// Smallest size of a kernel stack, in bytes. Other sizes are this times a power of two.
const STACK_MIN: usize = 8192;
/// Number of stack sizes that are tried.
const STACK_SIZES: usize = 4;
/// Maximum distance of the saved registers from the end of a stack, in words.
const REGISTERS_WORDS: usize = 64;

/// Finds the offset of the saved registers on the kernel stack of the current thread, which is inside a system call
/// with this number and first argument. `None` if they are not found.
#[inline(always)]
pub(crate) fn find_registers_offset(number: u64, first: u64) -> Option<u32> {
    // SAFETY: has no preconditions.
    let task = unsafe { bpf_get_current_task() } as *const u8;
    let stack: *const u8 = probe(task, offset(&LAYOUT.task_stack))?;
    for n in 0..STACK_SIZES * REGISTERS_WORDS {
        let at = (STACK_MIN << (n / REGISTERS_WORDS)) - 8 * (1 + n % REGISTERS_WORDS);
        let call = CallInProgress(stack.wrapping_add(at));
        if call.word(&LAYOUT.registers_call) == Some(number) && call.first() == Some(first) {
            return u32::try_from(at).ok();
        }
    }
    None
}
