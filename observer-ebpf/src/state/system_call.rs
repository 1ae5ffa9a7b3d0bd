//! What a blocked thread waits for, by the system call that it is in. The call is read from the registers that the
//! kernel saves on the thread's stack. Their offset is found by a system call of the loader.

use aya_ebpf::{macros::map, maps::Array, programs::BtfTracePointContext};
use observer_common::{
    block::{Block, CALLS, NO_CALL, SyscallClass},
    waiter::NO_SET,
};

use crate::kernel::{self, CallInProgress, OpenFile};

/// A [`SyscallClass`] for each system call, by number; filled in by the loader.
// SAFETY: the symbol name, by which the loader finds the variable, is unique.
#[unsafe(no_mangle)]
static SYSCALL_CLASSES: [u8; CALLS] = [0; CALLS];

/// Offset of the saved registers on a kernel stack, in bytes; 0 while it is unknown.
#[map]
static REGISTERS: Array<u32> = Array::with_max_entries(1, 0);

/// Finds the offset of the saved registers, by the number and the first argument of the system call that the current
/// thread is in.
#[inline(always)]
pub(crate) fn find_registers(number: u64, argument: u64) {
    if let Some(offset) = kernel::find_registers_offset(number, argument)
        && let Some(entry) = REGISTERS.get_ptr_mut(0)
    {
        // SAFETY: a live map value that nothing else writes.
        unsafe { *entry = offset };
    }
}

/// The call that the current thread is in, or returns from.
#[inline(always)]
pub(crate) fn call_in_progress() -> Option<CallInProgress> {
    CallInProgress::current(*REGISTERS.get(0).filter(|&&offset| offset != 0)?)
}

/// The place where a thread blocks, and what it waits for.
#[derive(Clone, Copy)]
pub(crate) struct Blocked {
    /// The system call; [`NO_CALL`] outside of any.
    pub(crate) call: u32,
    /// Index of the [`Block`] that the thread waits for.
    pub(crate) block: u32,
    /// Frame pointer of the thread in user space; 0 if unknown.
    pub(crate) frame_pointer: u64,
    /// The descriptor that the thread polls or selects, if it is the only one; otherwise [`NO_SET`].
    pub(crate) polled: u32,
}

impl Blocked {
    /// Unknown.
    pub(crate) const UNKNOWN: Self =
        Self { call: NO_CALL, block: Block::Other as u32, frame_pointer: 0, polled: NO_SET };

    /// The current thread, when `sched_switch` takes it off its CPU.
    #[inline(always)]
    pub(crate) fn current(ctx: &BtfTracePointContext) -> Self {
        let Some(&offset) = REGISTERS.get(0).filter(|&&offset| offset != 0) else { return Self::UNKNOWN };
        let registers = CallInProgress::of_current(ctx, 1, offset);
        let frame_pointer = registers.frame_pointer().unwrap_or(0);
        match registers.number() {
            // Outside of system calls, a thread blocks only on its own memory.
            None => Self { block: Block::PageFault as u32, frame_pointer, ..Self::UNKNOWN },
            Some(call) => {
                let mut blocked = Self { call, frame_pointer, ..Self::UNKNOWN };
                if let Some(block) = blocked.block_of(&registers, class_of(call)) {
                    blocked.block = block;
                }
                blocked
            }
        }
    }

    /// What a call of this class waits for. Notes the descriptor that it polls.
    #[inline(always)]
    fn block_of(&mut self, call: &CallInProgress, class: u8) -> Option<u32> {
        let descriptor = if class == SyscallClass::File as u8 {
            low_half(call.first()?)
        } else if class == SyscallClass::Poll as u8 {
            let count = low_half(call.second()?);
            if count == 0 {
                return Some(Block::Sleep as u32);
            }
            let descriptor = kernel::read_user::<u32>(call.first()?)?;
            if count == 1 {
                self.polled = descriptor;
            }
            let file = OpenFile::of(descriptor)?;
            if file.is_anonymous()? {
                return Some(if is_timeout(call.third()?) { Block::Sleep } else { Block::Lock } as u32);
            }
            return Some(file.block()? as u32);
        } else if class == SyscallClass::Select as u8 {
            let limit = low_half(call.first()?);
            if limit == 0 {
                return Some(Block::Sleep as u32);
            }
            let lowest = lowest_descriptor(call.second()?, call.third()?)?;
            if lowest + 1 == limit {
                self.polled = lowest;
            }
            lowest
        } else {
            return Some(class.into());
        };
        Some(OpenFile::of(descriptor)?.block()? as u32)
    }
}

#[inline(always)]
fn class_of(number: u32) -> u8 {
    if number as usize >= CALLS {
        return SyscallClass::Other as u8;
    }
    // SAFETY: in range; only the loader writes the array, before any program runs.
    unsafe { (&raw const SYSCALL_CLASSES).cast::<u8>().add(number as usize).read_volatile() }
}

/// Whether a timeout argument, in milliseconds or as a pointer, is a timeout: neither negative nor null.
#[inline(always)]
const fn is_timeout(argument: u64) -> bool {
    argument != 0 && low_half(argument) != u32::MAX
}

/// An `int` argument: the upper half of its register is undefined.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "drops the upper half on purpose")]
const fn low_half(argument: u64) -> u32 {
    argument as u32
}

/// The lowest descriptor in two sets, among the first 64 descriptors.
#[inline(always)]
fn lowest_descriptor(first: u64, second: u64) -> Option<u32> {
    let set = |address: u64| if address == 0 { None } else { kernel::read_user::<u64>(address) };
    let members = set(first).unwrap_or(0) | set(second).unwrap_or(0);
    if members == 0 { None } else { Some(members.trailing_zeros()) }
}
