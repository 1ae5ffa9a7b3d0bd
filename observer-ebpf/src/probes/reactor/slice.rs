//! Slices of event loops: their start and end, and how their time is divided.

use aya_ebpf::{bindings::BPF_RB_NO_WAKEUP, macros::map, maps::RingBuf};
use observer_common::{
    block::NO_CALL,
    loss::Loss,
    origin::Origin,
    reactor::{Evidence, PARTS, Part, Phase, Reactor, RunState, Stall},
};

use crate::{
    emit::count_loss,
    state::{
        gc,
        reactors::{record_duration, update_longest_work},
        requests, tasks, work,
    },
};

/// Slices that reached the stall threshold.
#[map]
static STALLS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// The stall threshold in nanoseconds; set by the loader.
// SAFETY: the symbol name, by which the loader finds the variable, is unique.
#[unsafe(no_mangle)]
static STALL_NS: u64 = 0;

/// Ends the slice of the current thread.
///
/// # Safety
/// `reactor` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn end_slice(reactor: *mut Reactor, tid: u32, now: u64, evidence: Evidence) {
    // SAFETY: by contract.
    unsafe {
        gc::on_slice_end(reactor, now);
        if (*reactor).has_work != 0 {
            tasks::clear_work(tid, now);
        }
        let length = now.saturating_sub((*reactor).phase_since_ns);
        record_duration(reactor, |durations| &raw mut (*durations).slice, length);
        if length >= core::ptr::read_volatile(&raw const STALL_NS) {
            emit_stall(reactor, tid, length, evidence);
        }
    }
}

/// Begins a slice of a thread that is on a CPU.
///
/// # Safety
/// `reactor` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn begin_slice(reactor: *mut Reactor, since_ns: u64) {
    // SAFETY: by contract.
    unsafe {
        (*reactor).phase = Phase::Slice as u32;
        (*reactor).is_in_wait = 0;
        (*reactor).phase_since_ns = since_ns;
        (*reactor).run = RunState::Cpu as u32;
        (*reactor).run_since_ns = since_ns;
        let on_cpu = &raw mut (*reactor).parts[RunState::Cpu as usize];
        (*on_cpu).before_ns = (*on_cpu).ns;
        // Most slices never leave their CPU and have no known work, so there is nothing to reset.
        if (*reactor).was_off_cpu != 0 {
            (*reactor).was_off_cpu = 0;
            for part in &mut (*reactor).parts {
                part.before_ns = part.ns;
            }
            (*reactor).gc.before_ns = (*reactor).gc.ns;
            (*reactor).longest_block_ns = 0;
            (*reactor).longest_block_call = NO_CALL;
            (*reactor).longest_queue_ns = 0;
            (*reactor).longest_queue_after = 0;
            (*reactor).longest_work_for = Origin::NONE;
            (*reactor).longest_work_ns = 0;
        }
    }
}

/// Sends the slice that has just ended to user space.
///
/// # Safety
/// `reactor` points to a live map value that nothing else writes at present.
#[inline(always)]
unsafe fn emit_stall(reactor: *mut Reactor, tid: u32, length_ns: u64, evidence: Evidence) {
    let Some(mut entry) = STALLS.reserve::<Stall>(0) else {
        count_loss(Loss::StallsFull);
        return;
    };
    // SAFETY: the reserved entry is exclusive until it is submitted, and large enough; `reactor` by contract.
    unsafe {
        // The time since the thread last switched to another task or origin counts as well, even if it has had neither
        // since.
        let last = work::current(tid);
        update_longest_work(reactor, &last.origin, last.since_ns, (*reactor).phase_since_ns + length_ns);
        requests::emit_stalled_request((*reactor).tgid, &(*reactor).longest_work_for);
        let stall = entry.as_mut_ptr();
        (*stall).tid = tid;
        (*stall).tgid = (*reactor).tgid;
        (*stall).start_ns = (*reactor).phase_since_ns;
        (*stall).length_ns = length_ns;
        for part in 0..PARTS {
            let Part { ns, before_ns } = (*reactor).parts[part];
            (*stall).parts_ns[part] = ns - before_ns;
        }
        (*stall).gc_ns = (*reactor).gc.ns - (*reactor).gc.before_ns;
        (*stall).longest_block_call = (*reactor).longest_block_call;
        (*stall).longest_queue_after = (*reactor).longest_queue_after;
        (*stall).request = (*reactor).longest_work_for.request;
        (*stall).evidence = evidence as u32;
        (*stall).reserved = 0;
    }
    // Stalls are rare, and user space reads the ring periodically: a wake-up would cost more than the rest of the
    // program.
    entry.submit(u64::from(BPF_RB_NO_WAKEUP));
}

/// Switches from one scheduler state to another. In a slice, the elapsed time is added to one part of the slice. In a
/// wait, only the delay of a wake-up is recorded.
///
/// # Safety
/// `reactor` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn switch_run_state(reactor: *mut Reactor, to: RunState, now: u64) {
    // SAFETY: by contract.
    unsafe {
        let from = (*reactor).run;
        let elapsed = now.saturating_sub((*reactor).run_since_ns);
        if (*reactor).phase == Phase::Slice as u32 {
            let part = (from + (*reactor).block) as usize;
            // Volatile for the reason given in `emit::bucket`.
            let part = core::ptr::read_volatile(&raw const part);
            if part < PARTS {
                (*reactor).was_off_cpu |= u16::from(from != RunState::Cpu as u32);
                let part = (&raw mut (*reactor).parts).cast::<Part>().add(part);
                (*part).ns += elapsed;
            }
            if from == RunState::Blocked as u32 {
                if elapsed > (*reactor).longest_block_ns {
                    (*reactor).longest_block_ns = elapsed;
                    (*reactor).longest_block_call = (*reactor).call;
                }
                (*reactor).block = 0;
            }
        } else if (*reactor).phase == Phase::Waiting as u32
            && from == RunState::Woken as u32
            && to as u32 == RunState::Cpu as u32
        {
            record_duration(reactor, |durations| &raw mut (*durations).wakeup, elapsed);
        }
        (*reactor).run = to as u32;
        (*reactor).run_since_ns = now;
    }
}
