//! Waits of event loops: a thread enters a call that may be a wait, and returns from it.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use observer_common::{
    reactor::{ABANDONED_NS, Evidence},
    waiter::{Call, FOREVER, Phase, RunState, SetState, WaitPattern, Waiter},
};

use super::slice::{begin_slice, begin_wait, end_slice, switch_run_state};
use crate::{
    kernel::{self, OpenFile},
    state::{
        gc,
        reactors::{self, count, record_duration},
        targets,
        waiters::{claim, find_or_null},
    },
};

/// The current thread, if its process is a target.
pub(crate) struct Thread {
    pub(crate) tgid: u32,
    pub(crate) tid: u32,
    /// The thread's entry; null if it has none.
    pub(crate) existing: *mut Waiter,
}

impl Thread {
    #[inline(always)]
    pub(crate) fn current() -> Option<Self> {
        let (tgid, tid) = kernel::current();
        let existing = find_or_null(tid);
        if !existing.is_null() || targets::is_target(tgid) || targets::nominate_candidate(tgid) {
            Some(Self { tgid, tid, existing })
        } else {
            None
        }
    }

    /// The thread's entry, which is created if there is none.
    #[inline(always)]
    pub(crate) fn find_or_claim(&self) -> Option<*mut Waiter> {
        if self.existing.is_null() { claim(self.tid, self.tgid) } else { Some(self.existing) }
    }

    /// Enters a call, if it is one that may be a wait. If it is the wait of the thread's event loop and a slice is in
    /// progress, the slice ends as soon as the thread blocks in the call.
    #[inline(always)]
    pub(crate) fn enter(self, call: Option<Call>) {
        let Some(call) = call else { return };
        if self.existing.is_null() && call.is_single {
            return;
        }
        let Some(waiter) = self.find_or_claim() else { return };
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            let WaitPattern { kind, set, .. } = (*waiter).pattern;
            let since = (*waiter).phase_since_ns;
            if !(*waiter).pattern.is_wait(call, |pattern| set_state(pattern.set, since)) {
                return;
            }
            (*waiter).timeout_ns = call.timeout_ns;
            (*waiter).woken_ns = 0;
            // A descriptor that refers to another set than before is noticed only in these cases.
            let must_look = (*waiter).is_shared | (*waiter).is_stale != 0;
            if (kind, set) != (call.kind as u32, call.set) || (*waiter).reactor == 0 || must_look {
                self.change_loop(waiter, call);
            }
            if (*waiter).phase == Phase::Slice as u32 {
                (*waiter).is_in_wait = 1;
            } else {
                begin_wait(waiter, bpf_ktime_get_ns());
            }
        }
    }

    /// Moves the thread to the loop that it is about to wait in, unless it belongs to it already. Its slice ends then.
    ///
    /// # Safety
    /// `waiter` points to the live map value of the thread.
    #[inline(always)]
    unsafe fn change_loop(&self, waiter: *mut Waiter, call: Call) {
        // SAFETY: by contract.
        unsafe {
            (*waiter).is_stale = 0;
            let file = reactors::file_of(call);
            if reactors::is_member(waiter, call.kind, file) {
                return;
            }
            let now = bpf_ktime_get_ns();
            // In a shared loop, nobody looks for events because this thread looks elsewhere.
            if (*waiter).phase == Phase::Slice as u32 && (*waiter).is_shared == 0 {
                switch_run_state(waiter, RunState::Cpu, now);
                end_slice(waiter, self.tid, now, |_| Evidence::Unknown);
            }
            (*waiter).phase = Phase::Waiting as u32;
            reactors::leave(waiter, now);
            reactors::join(waiter, call, file, now);
        }
    }
}

/// State of an epoll set that the current thread last waited on at `last_return_ns`.
#[inline(always)]
fn set_state(set: u32, last_return_ns: u64) -> SetState {
    // An epoll set is an anonymous file.
    let is_open = OpenFile::of(set).and_then(OpenFile::is_anonymous) == Some(true);
    if !is_open {
        return SetState::Closed;
    }
    // SAFETY: has no preconditions.
    let idle = unsafe { bpf_ktime_get_ns() }.saturating_sub(last_return_ns);
    // The set on which the thread waits now may be its loop, and the first one that of a program's start.
    if idle < ABANDONED_NS { SetState::InUse } else { SetState::Abandoned }
}

/// Handles the return of the current thread from a call. If the call was its wait, a slice begins; otherwise the slice
/// continues. `evidence` says whether events had waited before the call, if it returned at once after a slice of the
/// given length.
///
/// # Safety
/// `waiter` points to the live map value of the current thread.
#[inline(always)]
pub(crate) unsafe fn return_from_call(
    waiter: *mut Waiter,
    tid: u32,
    events: i64,
    timed_out: bool,
    evidence: impl FnOnce(u64) -> Evidence,
) {
    // SAFETY: by contract.
    unsafe {
        let mut waited = 0;
        let mut return_delay = None;
        let mut delayed = None;
        let since = if (*waiter).phase == Phase::Waiting as u32 {
            // The thread was put on its CPU during the wait, so that time is known. Reading the clock would be most of
            // this program's cost.
            let is_known = (*waiter).run == RunState::Cpu as u32;
            let since = if is_known { (*waiter).run_since_ns } else { bpf_ktime_get_ns() };
            waited = since.saturating_sub((*waiter).phase_since_ns);
            let (timeout, woken) = ((*waiter).timeout_ns, (*waiter).woken_ns);
            if woken != 0 {
                let is_due = timed_out && timeout != FOREVER;
                return_delay =
                    Some(if is_due { waited.saturating_sub(timeout) } else { since.saturating_sub(woken) });
            }
            since
        } else if (*waiter).is_in_wait != 0 {
            // The thread has not blocked: the wait took no time.
            let now = bpf_ktime_get_ns();
            switch_run_state(waiter, RunState::Cpu, now);
            if let Some((length, Evidence::EventsWaited)) = end_slice(waiter, tid, now, evidence) {
                delayed = Some(length);
            }
            now
        } else {
            return;
        };
        gc::on_slice_begin(waiter);
        begin_slice(waiter, since);
        let Some(reactor) = reactors::of(waiter) else { return };
        let is_empty = reactors::exit(reactor, waiter, since);
        let is_shared = (*waiter).is_shared != 0;
        count(&raw mut (*reactor).waits, is_shared, 1);
        if !is_shared {
            (*reactor).wait_ns += waited;
        }
        let events = if events > 0 { events.cast_unsigned() } else { 0 };
        count(&raw mut (*reactor).events, is_shared, events);
        let slot = (*reactor).slot;
        if let Some(delay) = return_delay.filter(|_| is_empty) {
            // While others wait as well, an event need not wait for this thread.
            record_duration(slot, is_shared, |durations| &raw mut (*durations).wait_return_delay, delay);
        }
        if let Some(length) = delayed {
            record_duration(slot, is_shared, |durations| &raw mut (*durations).event_delay, length);
            count(&raw mut (*reactor).events_delayed, is_shared, events);
        }
    }
}
