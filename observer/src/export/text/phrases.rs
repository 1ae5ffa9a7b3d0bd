//! Phrases that the first lines and the details have in common.

use crate::{
    export::words::{cause_name, percent},
    model::{
        busy::{Cause, Split},
        snapshot::{Listener, Reactor, Target},
    },
};

/// ` (42 because the queue was full)`; empty if there were no overflows or their number is unknown.
pub(super) fn overflows(listener: &Listener) -> String {
    let overflows = listener.overflows.filter(|&overflows| overflows > 0);
    overflows.map(|overflows| format!(" ({overflows} because the queue was full)")).unwrap_or_default()
}

/// Shares of busy time, in the order in which they are shown. Causes of blocking with no time are left out.
pub(super) fn shares(split: &Split) -> Vec<(Cause, f64)> {
    let total = split.total().max(f64::MIN_POSITIVE);
    let all = Cause::PARTS.into_iter().map(|cause| (cause, split.of(cause) / total));
    all.filter(|(cause, share)| *share >= 0.0005 || !matches!(cause, Cause::Blocked(_))).collect()
}

/// `62.0 % asleep`.
pub(super) fn share_of((cause, share): (Cause, f64)) -> String {
    format!("{} {}", percent(share), cause_name(cause))
}

/// `; of which GC 12.0 %`, a share of busy time; empty if there was no collection in it.
pub(super) fn of_which_gc(reactor: &Reactor) -> String {
    let gc = reactor.split_seconds.gc;
    if gc > 0.0 { format!("; of which GC {}", percent(gc / reactor.busy_seconds)) } else { String::new() }
}

/// `app (10)`.
pub(super) fn process_name(target: &Target) -> String {
    format!("{} ({})", target.comm, target.pid)
}
