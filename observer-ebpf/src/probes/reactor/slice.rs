//! Slices of threads that wait for events, and of their loops: their start and end, and how their time is divided.

use aya_ebpf::{bindings::BPF_RB_NO_WAKEUP, macros::map, maps::RingBuf};
use observer_common::{
    block::{Block, NO_CALL},
    loss::Loss,
    origin::Origin,
    reactor::{Evidence, Gap, Reactor, Stall},
    waiter::{PARTS, Phase, RunState, Waiter},
};

use crate::{
    emit::{add, count_loss},
    state::{
        gc,
        reactors::{self, close_gap, record_duration},
        requests, tasks, waiters, work,
    },
    words,
};

/// Slices that reached the stall threshold.
#[map]
static STALLS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// The stall threshold in nanoseconds; set by the loader.
// SAFETY: the symbol name, by which the loader finds the variable, is unique.
#[unsafe(no_mangle)]
static STALL_NS: u64 = 0;

/// Ends the slice of the current thread, which looks for events now. Returns the length of the loop's slice that ends as
/// well, with the evidence at its end; `None` if other threads of the loop wait.
///
/// # Safety
/// `waiter` points to the live map value of the current thread.
#[inline(always)]
pub(crate) unsafe fn end_slice(
    waiter: *mut Waiter,
    tid: u32,
    now: u64,
    evidence: impl FnOnce(u64) -> Evidence,
) -> Option<(u64, Evidence)> {
    // SAFETY: by contract.
    unsafe {
        gc::on_slice_end(waiter, now);
        if (*waiter).has_work != 0 {
            tasks::clear_work(tid, now);
        }
        let since_ns = (*waiter).phase_since_ns;
        let reactor = reactors::of(waiter)?;
        reactors::enter(reactor, waiter);
        let gap = if (*waiter).is_shared == 0 {
            Gap { since_ns, waiter: (*waiter).slot, reserved: 0 }
        } else {
            close_gap(reactor)?
        };
        let length = now.saturating_sub(gap.since_ns);
        let evidence = evidence(length);
        end_gap(reactor, gap, now, evidence);
        Some((length, evidence))
    }
}

/// Begins a wait of a thread that is not in a slice. If a wait seems to be in progress, its end was not seen.
///
/// # Safety
/// `waiter` points to the live map value of the current thread.
#[inline(always)]
pub(crate) unsafe fn begin_wait(waiter: *mut Waiter, now: u64) {
    // SAFETY: by contract.
    unsafe {
        let waited = now.saturating_sub((*waiter).phase_since_ns);
        (*waiter).phase = Phase::Waiting as u32;
        (*waiter).phase_since_ns = now;
        (*waiter).run = RunState::Cpu as u32;
        (*waiter).run_since_ns = now;
        let Some(reactor) = reactors::of(waiter) else { return };
        let was_inside = (*waiter).is_inside != 0;
        reactors::enter(reactor, waiter);
        if was_inside && (*waiter).is_shared == 0 {
            (*reactor).wait_ns += waited;
        }
        if (*waiter).is_shared != 0
            && let Some(gap) = close_gap(reactor)
        {
            end_gap(reactor, gap, now, Evidence::Unknown);
        }
    }
}

/// Counts a slice of a loop that ends at `now`. It began with the slice of the thread `first`, and is its first part, or
/// all of it. In a shared loop that may be another thread than the current one, and still be running.
///
/// # Safety
/// `reactor` points to a live map value.
#[inline(always)]
unsafe fn end_gap(reactor: *const Reactor, gap: Gap, now: u64, evidence: Evidence) {
    // SAFETY: by contract.
    let slot = unsafe { (*reactor).slot };
    global_end_gap(slot, gap.waiter, gap.since_ns, now, evidence as u32);
}

// SAFETY: no other symbol has this name.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn global_end_gap(reactor: u32, first: u32, since_ns: u64, now: u64, evidence: u32) -> u32 {
    if let Some(reactor) = reactors::in_slot(reactor)
        && let Some(first) = waiters::in_slot(first)
    {
        // SAFETY: live map values.
        unsafe { record_gap(reactor, first, since_ns, now, evidence) };
    }
    0
}

/// # Safety
/// `reactor` and `first` point to live map values.
#[inline(always)]
unsafe fn record_gap(reactor: *mut Reactor, first: *mut Waiter, since_ns: u64, now: u64, evidence: u32) {
    // SAFETY: by contract.
    unsafe {
        let is_shared = (*reactor).is_shared != 0;
        let length = now.saturating_sub(since_ns);
        record_duration((*reactor).slot, is_shared, |durations| &raw mut (*durations).slice, length);
        if is_shared {
            add(&raw mut (*reactor).gaps_ns, length);
            let parts = &raw mut (*reactor).parts_ns;
            for_each_part(reactor, first, since_ns, now, |part, ns| add(parts.cast::<u64>().add(part), ns));
            if is_first_part(reactor, first, since_ns) {
                add(&raw mut (*reactor).gc_ns, (*first).gc_ns.min(length));
            }
        } else {
            // The parts add up to the slice, which the current thread has just ended.
            (*reactor).parts_ns[RunState::Cpu as usize] += (*first).parts_ns[RunState::Cpu as usize];
            if (*first).was_off_cpu != 0 {
                for part in 1..PARTS {
                    (*reactor).parts_ns[part] += (*first).parts_ns[part];
                }
                (*reactor).gc_ns += (*first).gc_ns;
            }
        }
        if length >= core::ptr::read_volatile(&raw const STALL_NS) {
            emit_stall(reactor, first, since_ns, now, evidence);
        }
    }
}

/// Whether a slice began with the latest slice of this thread, which may just have ended as well. The thread may have
/// exited, or wait elsewhere, and another one have its slot.
///
/// # Safety
/// As for [`record_gap`].
#[inline(always)]
unsafe fn is_first_part(reactor: *const Reactor, first: *const Waiter, since_ns: u64) -> bool {
    // SAFETY: by contract.
    unsafe { (*first).reactor == (*reactor).slot && (*first).slice_since_ns == since_ns }
}

/// Divides the time of a slice into parts, whose sum is its length.
///
/// # Safety
/// As for [`record_gap`].
#[inline(always)]
unsafe fn for_each_part(
    reactor: *const Reactor,
    first: *const Waiter,
    since_ns: u64,
    now: u64,
    mut each: impl FnMut(usize, u64),
) {
    // SAFETY: by contract.
    unsafe {
        let mut rest = now.saturating_sub(since_ns);
        let present = ((*first).run + (*first).block) as usize;
        // After its end, nothing is added.
        let present_ns =
            if (*first).phase == Phase::Slice as u32 { now.saturating_sub((*first).run_since_ns) } else { 0 };
        if is_first_part(reactor, first, since_ns) {
            for part in 0..PARTS {
                let mut ns = (&raw const (*first).parts_ns).cast::<u64>().add(part).read_volatile();
                if part == present {
                    ns += present_ns;
                }
                let ns = ns.min(rest);
                rest -= ns;
                if ns != 0 {
                    each(part, ns);
                }
            }
        }
        if rest != 0 {
            each(RunState::Blocked as usize + Block::Other as usize, rest);
        }
    }
}

/// Begins a slice of a thread that is on a CPU.
///
/// # Safety
/// `waiter` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn begin_slice(waiter: *mut Waiter, since_ns: u64) {
    // SAFETY: by contract.
    unsafe {
        (*waiter).phase = Phase::Slice as u32;
        (*waiter).is_in_wait = 0;
        (*waiter).phase_since_ns = since_ns;
        (*waiter).slice_since_ns = since_ns;
        (*waiter).run = RunState::Cpu as u32;
        (*waiter).run_since_ns = since_ns;
        (*waiter).parts_ns[RunState::Cpu as usize] = 0;
        // Most slices never leave their CPU and have no known work, so there is nothing to reset.
        if (*waiter).was_off_cpu != 0 {
            (*waiter).was_off_cpu = 0;
            words::clear(&raw mut (*waiter).parts_ns);
            (*waiter).gc_ns = 0;
            (*waiter).longest_block_ns = 0;
            (*waiter).longest_block_call = NO_CALL;
            (*waiter).longest_queue_ns = 0;
            (*waiter).longest_queue_after = 0;
            words::clear(&raw mut (*waiter).longest_work_for);
            (*waiter).longest_work_ns = 0;
        }
    }
}

/// Sends a slice that ends at `now` to user space.
///
/// # Safety
/// As for [`record_gap`].
#[inline(always)]
unsafe fn emit_stall(reactor: *mut Reactor, first: *mut Waiter, since_ns: u64, now: u64, evidence: u32) {
    let Some(mut entry) = STALLS.reserve::<Stall>(0) else {
        count_loss(Loss::StallsFull);
        return;
    };
    // SAFETY: the reserved entry is exclusive until it is submitted, and large enough; the others by contract.
    unsafe {
        // The time since the thread last switched to another task or origin counts as well, even if it has had neither
        // since.
        let is_known = is_first_part(reactor, first, since_ns);
        let mut origin = Origin::NONE;
        if is_known {
            let last = work::current((*first).tid);
            let elapsed = now.saturating_sub(last.since_ns.max(since_ns));
            origin = if elapsed > (*first).longest_work_ns { last.origin } else { (*first).longest_work_for };
            requests::emit_stalled_request((*first).tgid, &origin);
        }
        let stall = entry.as_mut_ptr();
        (*stall).reactor = (*reactor).slot;
        (*stall).tgid = (*reactor).tgid;
        (*stall).created_ns = (*reactor).created_ns;
        (*stall).start_ns = since_ns;
        (*stall).length_ns = now.saturating_sub(since_ns);
        words::clear(&raw mut (*stall).parts_ns);
        let parts = &raw mut (*stall).parts_ns;
        for_each_part(reactor, first, since_ns, now, |part, ns| {
            *parts.cast::<u64>().add(part) += ns;
        });
        (*stall).request = origin.request;
        (*stall).evidence = evidence;
        (*stall).gc_ns = 0;
        (*stall).longest_block_call = NO_CALL;
        (*stall).longest_queue_after = 0;
        (*stall).tid = 0;
        if is_known {
            (*stall).gc_ns = (*first).gc_ns.min((*stall).length_ns);
            let is_longest = (*first).run == RunState::Blocked as u32
                && (*first).phase == Phase::Slice as u32
                && now.saturating_sub((*first).run_since_ns) > (*first).longest_block_ns;
            (*stall).longest_block_call =
                if is_longest { (*first).call } else { (*first).longest_block_call };
            (*stall).longest_queue_after = (*first).longest_queue_after;
            (*stall).tid = (*first).tid;
        }
    }
    // Stalls are rare, and user space reads the ring periodically: a wake-up would cost more than the rest of the
    // program.
    entry.submit(u64::from(BPF_RB_NO_WAKEUP));
}

/// Switches from one scheduler state to another. In a slice, the elapsed time is added to one part of the slice. In a
/// wait, only the delay of a wake-up is recorded.
///
/// # Safety
/// `waiter` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn switch_run_state(waiter: *mut Waiter, to: RunState, now: u64) {
    // SAFETY: by contract.
    unsafe {
        let from = (*waiter).run;
        let elapsed = now.saturating_sub((*waiter).run_since_ns);
        if (*waiter).phase == Phase::Slice as u32 {
            let part = (from + (*waiter).block) as usize;
            // Volatile for the reason given in `emit::bucket`.
            let part = core::ptr::read_volatile(&raw const part);
            if part < PARTS {
                (*waiter).was_off_cpu |= u16::from(from != RunState::Cpu as u32);
                *(&raw mut (*waiter).parts_ns).cast::<u64>().add(part) += elapsed;
            }
            if from == RunState::Blocked as u32 {
                if elapsed > (*waiter).longest_block_ns {
                    (*waiter).longest_block_ns = elapsed;
                    (*waiter).longest_block_call = (*waiter).call;
                }
                (*waiter).block = 0;
            }
        } else if (*waiter).phase == Phase::Waiting as u32
            && from == RunState::Woken as u32
            && to as u32 == RunState::Cpu as u32
        {
            let is_shared = (*waiter).is_shared != 0;
            record_duration((*waiter).reactor, is_shared, |durations| &raw mut (*durations).wakeup, elapsed);
        }
        (*waiter).run = to as u32;
        (*waiter).run_since_ns = now;
    }
}
