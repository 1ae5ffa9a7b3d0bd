//! What the view says about something that is late, and the wording that its parts share.

use crate::{export::words::span, model::snapshot::Reactor};

/// Something that is late, or never done: what, and whose fault that is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Finding {
    /// Whether it is late.
    pub(super) is_late: bool,
    pub(super) what: String,
    pub(super) why: String,
}

/// How long it has been in its slice.
pub(super) fn age(reactor: &Reactor) -> f64 {
    reactor.current_slice_seconds.unwrap_or(0.0)
}

/// `22.1/s`.
#[expect(clippy::cast_precision_loss, reason = "shown with two or three digits")]
pub(super) fn rate(count: u64, seconds: f64) -> String {
    let rate = if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    if rate >= 100.0 { format!("{rate:.0}/s") } else { format!("{rate:.1}/s") }
}

/// How many, and how long together.
pub(super) fn total(reactor: &Reactor) -> String {
    let stalls = &reactor.stalls;
    let threshold = span(stalls.threshold_seconds);
    match stalls.count {
        0 => format!(": none of {threshold} or more since the start"),
        count => format!(": {count} of {threshold} or more, {} together", span(stalls.seconds)),
    }
}
