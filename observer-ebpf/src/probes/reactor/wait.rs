//! The wait of an event loop: a thread enters a call that may be one, and returns from it.

use core::ptr::null_mut;

use aya_ebpf::helpers::bpf_ktime_get_ns;
use observer_common::reactor::{Call, FOREVER, Phase, Reactor, RunState};

use super::slice::{slice_begins, slice_ends, switch_run_state};
use crate::{
    kernel,
    state::{
        gc, pools,
        reactors::{claim, evict_stale, find, took},
        targets,
    },
};

/// The current thread, if it is a target's.
pub(crate) struct Thread {
    pub(crate) tgid: u32,
    pub(crate) tid: u32,
    /// Null if it has none: of an `Option` the compiler copies what is not there, which the verifier does not let pass.
    pub(crate) known: *mut Reactor,
}

impl Thread {
    #[inline(always)]
    pub(crate) fn current() -> Option<Self> {
        let (tgid, tid) = kernel::current();
        let known = find(tid).filter(|reactor| !evict_stale(*reactor, tid)).unwrap_or(null_mut());
        if !known.is_null() || targets::is_target(tgid) || targets::nominate_candidate(tgid) {
            Some(Self { tgid, tid, known })
        } else {
            None
        }
    }

    /// Its entry, made if there is none.
    #[inline(always)]
    pub(crate) fn reactor(&self) -> Option<*mut Reactor> {
        if self.known.is_null() { claim(self.tid, self.tgid) } else { Some(self.known) }
    }

    /// It enters this call, if it is one that may be a wait. If it is the wait of its event loop, the slice, if one
    /// was seen to begin, is over as soon as the thread blocks there.
    #[inline(always)]
    pub(crate) fn enters(self, call: Option<Call>) {
        let Some(call) = call else { return };
        if self.known.is_null() && call.is_single {
            return;
        }
        let Some(reactor) = self.reactor() else { return };
        // SAFETY: a live map value that only this thread writes while it runs.
        unsafe {
            let before = (*reactor).pattern;
            if !(*reactor).pattern.is_wait(call) {
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

/// The current thread returns from a call. If that was its wait a slice begins, else it goes on.
///
/// # Safety
/// `reactor` points to a live map value that nobody else writes now.
#[inline(always)]
pub(crate) unsafe fn returned(reactor: *mut Reactor, tid: u32, events: i64, timed_out: bool) {
    // SAFETY: by contract.
    unsafe {
        let since = if (*reactor).phase == Phase::Waiting as u32 {
            // It came onto its CPU in the wait. A look at the clock would be most of what this program takes.
            let is_known = (*reactor).run == RunState::Cpu as u32;
            let since = if is_known { (*reactor).run_since_ns } else { bpf_ktime_get_ns() };
            let elapsed = since.saturating_sub((*reactor).phase_since_ns);
            (*reactor).wait_ns += elapsed;
            let (timeout, woken) = ((*reactor).timeout_ns, (*reactor).woken_ns);
            if woken != 0 {
                let is_due = timed_out && timeout != FOREVER;
                let wait_return_delay =
                    if is_due { elapsed.saturating_sub(timeout) } else { since.saturating_sub(woken) };
                took(reactor, |durations| &raw mut (*durations).wait_return_delay, wait_return_delay);
            }
            since
        } else if (*reactor).is_in_wait != 0 {
            // It has not blocked: a wait of no time.
            let now = bpf_ktime_get_ns();
            switch_run_state(reactor, RunState::Cpu, now);
            slice_ends(reactor, tid, now);
            now
        } else {
            return;
        };
        (*reactor).waits += 1;
        if events > 0 {
            (*reactor).events += events.cast_unsigned();
        }
        gc::slice_begins(reactor);
        // Of one that waited when the loader came nobody saw that it does.
        pools::join((*reactor).tgid, &raw mut (*reactor).pattern);
        slice_begins(reactor, since);
    }
}
