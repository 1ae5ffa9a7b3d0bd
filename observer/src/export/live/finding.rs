//! A finding of the live view, and the wording that its parts share.

use crate::{
    export::words::{counted, site_cause, span},
    model::{snapshot::Reactor, stall::Site},
};

/// What a finding says of its subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing is late.
    NotLate,
    /// Nothing is known to be late, but some processes wait for events unwatched.
    NotKnown,
    /// Something has waited for it.
    Late,
    /// An event loop that does not look for events for long, though nothing is known to wait.
    Busy,
    /// A group of workers.
    Workers,
    /// Tasks were dropped.
    Lost,
}

/// A line of the first screen, with its cause.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) verdict: Verdict,
    /// The name of the subject, and how late it is.
    pub(super) what: String,
    /// The cause, or the values that explain it.
    pub(super) why: String,
}

/// Age of the current slice in seconds; 0 while the loop waits.
pub(super) fn age(reactor: &Reactor) -> f64 {
    reactor.current_slice_seconds.unwrap_or(0.0)
}

/// `22.1/s`.
#[expect(clippy::cast_precision_loss, reason = "shown with two or three digits")]
pub(super) fn rate(count: u64, seconds: f64) -> String {
    let rate = if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    if rate >= 100.0 { format!("{rate:.0}/s") } else { format!("{rate:.1}/s") }
}

/// `: 3 of 50.0 ms or longer, 360 ms in total`: the number of stalls and their total length.
pub(super) fn stall_total(reactor: &Reactor) -> String {
    let stalls = &reactor.stalls;
    let threshold = span(stalls.threshold_seconds);
    match stalls.count {
        0 => format!(": none of {threshold} or longer since the start"),
        count => format!(": {count} of {threshold} or longer, {} in total", span(stalls.seconds)),
    }
}

/// `of the lag: 3 stalls, 360 ms in total, asleep (clock_nanosleep)`, to follow a site's share of the lag.
pub(super) fn site_total(site: &Site) -> String {
    let count = counted(site.count, "stall");
    format!("of the lag: {count}, {} in total, {}", span(site.seconds), site_cause(site))
}
