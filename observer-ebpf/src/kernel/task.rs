//! Threads: who one is, why it goes off its CPU, and the system call that it is in.

use aya_ebpf::{helpers::bpf_get_current_task, programs::BtfTracePointContext};
use observer_common::layout::ABSENT;

use super::access::{LAYOUT, load, offset, probe};

/// `__TASK_STOPPED` and `__TASK_TRACED`.
const STOPPED: u64 = 4 | 8;

/// A `struct task_struct` handed to a BTF tracepoint.
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

    /// Threads of its process that have not begun to exit.
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
    /// It would go on if it could.
    Preempted,
    /// It waits for something.
    Blocked,
    /// Somebody has stopped it, wherever it was.
    Stopped,
}

#[inline(always)]
pub(crate) fn off(ctx: &BtfTracePointContext) -> OffCpuReason {
    let preempted: u8 = ctx.arg(0);
    if preempted != 0 {
        return OffCpuReason::Preempted;
    }
    let state = if offset(&LAYOUT.switch_has_state) != 0 {
        // A wake-up may already have changed the field; the argument is what the scheduler decided on.
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

/// A system call in progress, by the registers that the kernel keeps of its caller.
pub(crate) struct CallInProgress(*const u8);

impl CallInProgress {
    /// Of the current thread, whose `struct task_struct` a BTF tracepoint was handed as argument `n`. `place` is where
    /// on every kernel stack the registers are.
    #[inline(always)]
    pub(crate) fn of_current(ctx: &BtfTracePointContext, n: usize, place: u32) -> Self {
        let task: *const u8 = ctx.arg(n);
        // SAFETY: typed pointer, offset of this field.
        let stack: *const u8 = unsafe { load(task, offset(&LAYOUT.task_stack)) };
        Self(stack.wrapping_add(place as usize))
    }

    /// Of the current thread, where no program is handed its `struct task_struct`.
    #[inline(always)]
    pub(crate) fn current(place: u32) -> Option<Self> {
        // SAFETY: has no preconditions.
        let task = unsafe { bpf_get_current_task() } as *const u8;
        let stack: *const u8 = probe(task, offset(&LAYOUT.task_stack))?;
        Some(Self(stack.wrapping_add(place as usize)))
    }

    /// Its number; `None` outside of any call, that is in the handling of a fault.
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
        // What this kernel does not have is past the end of all stacks, and cannot be read.
        if offset(field) == ABSENT as usize { None } else { probe(self.0, offset(field)) }
    }
}

/// Smallest kernel stack there is; others are a power of two times as large. In bytes.
const STACK_MIN: usize = 8192;
/// How many sizes of stacks are tried.
const STACK_SIZES: usize = 4;
/// How far from the end of a stack a caller's registers may begin, in words.
const REGISTERS_WORDS: usize = 64;

/// Where on its kernel stack the registers of the current thread are, which is inside a system call with this number
/// and first argument; 0 if they are not found.
#[inline(always)]
pub(crate) fn registers_place(number: u64, first: u64) -> Option<u32> {
    // SAFETY: has no preconditions.
    let task = unsafe { bpf_get_current_task() } as *const u8;
    let stack: *const u8 = probe(task, offset(&LAYOUT.task_stack))?;
    for n in 0..STACK_SIZES * REGISTERS_WORDS {
        let place = (STACK_MIN << (n / REGISTERS_WORDS)) - 8 * (1 + n % REGISTERS_WORDS);
        let call = CallInProgress(stack.wrapping_add(place));
        if call.word(&LAYOUT.registers_call) == Some(number) && call.first() == Some(first) {
            return u32::try_from(place).ok();
        }
    }
    None
}
