//! What a thread waits for when it blocks: the system call it is in tells, found in the registers that the kernel keeps
//! on the thread's stack. Where on a stack they are, the loader's own system call shows.

use aya_ebpf::{
    macros::{map, raw_tracepoint},
    maps::Array,
    programs::{BtfTracePointContext, RawTracePointContext},
};
use observer_common::block::{Block, CALLS, Clue, NO_CALL};

use crate::kernel::{self, CallInProgress, OpenFile};

/// A [`Clue`] for each system call, by number; filled in by the loader.
// SAFETY: a name of our own, for the loader to find.
#[unsafe(no_mangle)]
static CLUES: [u8; CALLS] = [0; CALLS];

/// Where on a kernel stack its thread's registers are, in bytes; 0 while that is not known.
#[map]
static REGISTERS: Array<u32> = Array::with_max_entries(1, 0);

/// Finds out where registers are. Never attached, but run on demand with the number and the first argument of the very
/// system call that runs it.
#[raw_tracepoint(tracepoint = "sys_enter")]
fn find_registers(ctx: RawTracePointContext) -> i32 {
    if let Some(place) = kernel::registers_place(ctx.arg(0), ctx.arg(1))
        && let Some(entry) = REGISTERS.get_ptr_mut(0)
    {
        // SAFETY: a live map value that nobody else writes.
        unsafe { *entry = place };
    }
    0
}

/// The call that the current thread is in, or returns from.
#[inline(always)]
pub(crate) fn call_in_progress() -> Option<CallInProgress> {
    CallInProgress::current(*REGISTERS.get(0).filter(|&&place| place != 0)?)
}

/// Where a thread blocks.
#[derive(Clone, Copy)]
pub(crate) struct Blocked {
    /// The system call; [`NO_CALL`] if there is none.
    pub(crate) call: u32,
    /// Index of the [`Block`] it waits for.
    pub(crate) block: u32,
    /// Its frame pointer in user space; 0 if that is not known.
    pub(crate) frame_pointer: u64,
}

impl Blocked {
    /// Nobody knows where.
    pub(crate) const SOMEWHERE: Self = Self { call: NO_CALL, block: Block::Other as u32, frame_pointer: 0 };

    /// The current thread, when `sched_switch` takes it off its CPU.
    #[inline(always)]
    pub(crate) fn current(ctx: &BtfTracePointContext) -> Self {
        let Some(&place) = REGISTERS.get(0).filter(|&&place| place != 0) else { return Self::SOMEWHERE };
        let registers = CallInProgress::of_current(ctx, 1, place);
        let frame_pointer = registers.frame_pointer().unwrap_or(0);
        match registers.number() {
            // Outside of any call a thread blocks only for its own memory.
            None => Self { call: NO_CALL, block: Block::PageFault as u32, frame_pointer },
            Some(call) => {
                let block = block_in(&registers, call).unwrap_or(Block::Other as u32);
                Self { call, block, frame_pointer }
            }
        }
    }
}

#[inline(always)]
fn block_in(call: &CallInProgress, number: u32) -> Option<u32> {
    if number as usize >= CALLS {
        return None;
    }
    // SAFETY: inside the array; only the loader ever writes there, before any program runs.
    let clue = unsafe { (&raw const CLUES).cast::<u8>().add(number as usize).read_volatile() };
    let descriptor = if clue == Clue::File as u8 {
        call.first()?
    } else if clue == Clue::Poll as u8 {
        if call.second()? == 0 {
            return Some(Block::Sleep as u32);
        }
        let file = OpenFile::of(kernel::pointed::<u32>(call.first()?)?)?;
        if file.is_anonymous()? {
            return Some(if has_end(call.third()?) { Block::Sleep } else { Block::Lock } as u32);
        }
        return Some(file.block()? as u32);
    } else if clue == Clue::Select as u8 {
        if call.first()? == 0 {
            return Some(Block::Sleep as u32);
        }
        lowest(call.second()?, call.third()?)?
    } else {
        return Some(clue.into());
    };
    Some(OpenFile::of(u32::try_from(descriptor).ok()?)?.block()? as u32)
}

/// Whether a timeout, in milliseconds or as a pointer, is one: neither negative nor null.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the upper half of an `int` argument is anything")]
const fn has_end(timeout: u64) -> bool {
    timeout != 0 && timeout as u32 != u32::MAX
}

/// The lowest descriptor in two sets, of the lowest 64.
#[inline(always)]
fn lowest(one: u64, other: u64) -> Option<u64> {
    let set = |at: u64| if at == 0 { None } else { kernel::pointed::<u64>(at) };
    let members = set(one).unwrap_or(0) | set(other).unwrap_or(0);
    if members == 0 { None } else { Some(members.trailing_zeros().into()) }
}
