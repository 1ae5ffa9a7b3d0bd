//! Waits of event loops: a thread enters a call that may be a wait, and returns from it.

use core::ptr::null_mut;

use aya_ebpf::helpers::bpf_ktime_get_ns;
use observer_common::reactor::{Call, Evidence, FOREVER, Phase, Reactor, RunState, SetState};

use super::slice::{begin_slice, end_slice, switch_run_state};
use crate::{
    kernel::{self, OpenFile},
    state::{
        gc, pools,
        reactors::{claim, evict_stale, find, record_duration},
        targets,
    },
};

/// The current thread, if its process is a target.
pub(crate) struct Thread {
    pub(crate) tgid: u32,
    pub(crate) tid: u32,
    /// The thread's entry; null if it has none. It is no `Option`, because the compiler would copy the uninitialised
    /// value of `None`, which the verifier rejects.
    pub(crate) existing: *mut Reactor,
}

impl Thread {
    #[inline(always)]
    pub(crate) fn current() -> Option<Self> {
        let (tgid, tid) = kernel::current();
        let existing = find(tid).filter(|reactor| !evict_stale(*reactor, tid)).unwrap_or(null_mut());
        if !existing.is_null() || targets::is_target(tgid) || targets::nominate_candidate(tgid) {
            Some(Self { tgid, tid, existing })
        } else {
            None
        }
    }

    /// The thread's entry, which is created if there is none.
    #[inline(always)]
    pub(crate) fn find_or_claim(&self) -> Option<*mut Reactor> {
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
        let Some(reactor) = self.find_or_claim() else { return };
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            let before = (*reactor).pattern;
            let since = (*reactor).phase_since_ns;
            if !(*reactor).pattern.is_wait(call, |pattern| set_state(pattern.set, since)) {
                return;
            }
            if (*reactor).pattern.is_counted == 0 {
                pools::leave((*reactor).tgid, before);
                pools::join((*reactor).tgid, &raw mut (*reactor).pattern);
            }
            if (*reactor).phase == Phase::Slice as u32 {
                (*reactor).is_in_wait = 1;
            } else {
                let now = bpf_ktime_get_ns();
                (*reactor).phase = Phase::Waiting as u32;
                (*reactor).phase_since_ns = now;
                (*reactor).run = RunState::Cpu as u32;
                (*reactor).run_since_ns = now;
            }
            (*reactor).timeout_ns = call.timeout_ns;
            (*reactor).woken_ns = 0;
        }
    }
}

/// State of an epoll set that the current thread last waited on at `last_return_ns`.
#[inline(always)]
fn set_state(set: u32, last_return_ns: u64) -> SetState {
    /// Time without a wait after which a set counts as abandoned: the one on which the thread waits now may be its loop,
    /// and the first one that of a program's start. Handlers that run a loop of their own for longer are rare.
    const ABANDONED_NS: u64 = 2_000_000_000;
    // An epoll set is an anonymous file.
    let is_open = OpenFile::of(set).and_then(OpenFile::is_anonymous) == Some(true);
    if !is_open {
        return SetState::Closed;
    }
    // SAFETY: has no preconditions.
    let idle = unsafe { bpf_ktime_get_ns() }.saturating_sub(last_return_ns);
    if idle < ABANDONED_NS { SetState::InUse } else { SetState::Abandoned }
}

/// Handles the return of the current thread from a call. If the call was its wait, a slice begins; otherwise the slice
/// continues. `evidence` says whether events had waited before the call, if it returned at once after a slice of the
/// given length.
///
/// # Safety
/// `reactor` points to a live map value that nothing else writes at present.
#[inline(always)]
pub(crate) unsafe fn return_from_call(
    reactor: *mut Reactor,
    tid: u32,
    events: i64,
    timed_out: bool,
    evidence: impl FnOnce(u64) -> Evidence,
) {
    // SAFETY: by contract.
    unsafe {
        let since = if (*reactor).phase == Phase::Waiting as u32 {
            // The thread was put on its CPU during the wait, so that time is known. Reading the clock would be most of
            // this program's cost.
            let is_known = (*reactor).run == RunState::Cpu as u32;
            let since = if is_known { (*reactor).run_since_ns } else { bpf_ktime_get_ns() };
            let elapsed = since.saturating_sub((*reactor).phase_since_ns);
            (*reactor).wait_ns += elapsed;
            let (timeout, woken) = ((*reactor).timeout_ns, (*reactor).woken_ns);
            if woken != 0 {
                let is_due = timed_out && timeout != FOREVER;
                let wait_return_delay =
                    if is_due { elapsed.saturating_sub(timeout) } else { since.saturating_sub(woken) };
                record_duration(
                    reactor,
                    |durations| &raw mut (*durations).wait_return_delay,
                    wait_return_delay,
                );
            }
            since
        } else if (*reactor).is_in_wait != 0 {
            // The thread has not blocked: the wait took no time.
            let now = bpf_ktime_get_ns();
            switch_run_state(reactor, RunState::Cpu, now);
            let length = now.saturating_sub((*reactor).phase_since_ns);
            let evidence = evidence(length);
            if evidence == Evidence::EventsWaited {
                record_duration(reactor, |durations| &raw mut (*durations).event_delay, length);
                if events > 0 {
                    (*reactor).events_delayed += events.cast_unsigned();
                }
            }
            end_slice(reactor, tid, now, evidence);
            now
        } else {
            return;
        };
        (*reactor).waits += 1;
        if events > 0 {
            (*reactor).events += events.cast_unsigned();
        }
        gc::on_slice_begin(reactor);
        // A thread that was already waiting when observer attached has not been counted yet.
        pools::join((*reactor).tgid, &raw mut (*reactor).pattern);
        begin_slice(reactor, since);
    }
}
