//! Metrics about observer itself: its version, what it could not observe or record, pending attachments and exports.
//! Part of the catalog.

use super::{
    family::{Aggregation, Family, Kind, Value, count},
    subject::{Subject, SubjectKind, live},
};

/// In the order of the reference page.
pub(super) const OWN: &[Family] = &[
    Family {
        name: "observer_build_info",
        otlp: "observer.build.info",
        unit: "",
        help: "Version of observer and release of the running kernel. The value is always 1.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Own,
        own_labels: &["version", "kernel"],
        collect: |s, mut sink| {
            let labels = [("version", s.own.version), ("kernel", s.own.kernel.as_str())];
            sink.add_with(Subject::Own, labels, Value::Number(1.0));
        },
    },
    Family {
        name: "observer_self_lost_total",
        otlp: "observer.self.lost",
        unit: "{event}",
        help: "Number of events that the eBPF programs could not record, by cause.",
        kind: Kind::Counter,
        subject: SubjectKind::Own,
        own_labels: &["cause"],
        collect: |s, mut sink| {
            for lost in &s.own.lost {
                sink.add_with(Subject::Own, [("cause", lost.cause)], count(lost.count));
            }
        },
    },
    Family {
        name: "observer_self_missing",
        otlp: "observer.self.missing",
        unit: "{source}",
        help: "A source of metrics that is unavailable, with the reason. The value is 1, or the number of sources where several are aggregated.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Source,
        own_labels: &[],
        collect: |s, mut sink| {
            for missing in &s.own.missing {
                sink.add(Subject::Source(missing), Value::Number(1.0));
            }
        },
    },
    Family {
        name: "observer_self_targets",
        otlp: "observer.self.targets",
        unit: "{process}",
        help: "Number of processes under observation.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Own,
        own_labels: &[],
        collect: |s, mut sink| {
            let targets = u32::try_from(live(s).count()).unwrap_or(u32::MAX);
            sink.add(Subject::Own, Value::Number(targets.into()));
        },
    },
    Family {
        name: "observer_self_map_memory_bytes",
        otlp: "observer.self.map_memory",
        unit: "By",
        help: "Kernel memory of the eBPF maps in bytes. It depends on --capacity and is constant.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Own,
        own_labels: &[],
        collect: |s, mut sink| sink.add(Subject::Own, count(s.own.map_memory_bytes)),
    },
    Family {
        name: "observer_self_refreshed_timestamp_seconds",
        otlp: "observer.self.refreshed.timestamp",
        unit: "s",
        help: "Unix time in seconds of the last refresh. observer refreshes once a second.",
        kind: Kind::Gauge(Aggregation::Max),
        subject: SubjectKind::Own,
        own_labels: &[],
        collect: |s, mut sink| {
            if let Some(refreshed) = s.own.service.refreshed {
                sink.add(Subject::Own, Value::Number(refreshed));
            }
        },
    },
    Family {
        name: "observer_self_off",
        otlp: "observer.self.off",
        unit: "{observer}",
        help: "1 while observer is detached because the file of --kill-switch exists, 0 otherwise.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Own,
        own_labels: &[],
        collect: |s, mut sink| sink.add(Subject::Own, count(s.own.service.is_off.into())),
    },
    Family {
        name: "observer_self_attach_waiting",
        otlp: "observer.self.attach_waiting",
        unit: "{process}",
        help: "Number of processes whose runtimes wait to be attached to, at the rate of --attach-per-second.",
        kind: Kind::Gauge(Aggregation::Sum),
        subject: SubjectKind::Own,
        own_labels: &[],
        collect: |s, mut sink| sink.add(Subject::Own, count(s.own.service.waiting)),
    },
    Family {
        name: "observer_self_config_reloads_total",
        otlp: "observer.self.config_reloads",
        unit: "{reload}",
        help: "Number of times that the file of --config was reloaded, by whether it was accepted or refused.",
        kind: Kind::Counter,
        subject: SubjectKind::Own,
        own_labels: &["outcome"],
        collect: |s, mut sink| {
            sink.add_with(Subject::Own, [("outcome", "accepted")], count(s.own.service.accepted));
            sink.add_with(Subject::Own, [("outcome", "refused")], count(s.own.service.refused));
        },
    },
    Family {
        name: "observer_self_otlp_delivered_total",
        otlp: "observer.self.otlp_delivered",
        unit: "{item}",
        help: "Number of data points and spans that an OTLP collector accepted.",
        kind: Kind::Counter,
        subject: SubjectKind::Own,
        own_labels: &["signal"],
        collect: |s, mut sink| {
            for delivery in &s.own.otlp {
                sink.add_with(Subject::Own, [("signal", delivery.signal)], count(delivery.delivered));
            }
        },
    },
    Family {
        name: "observer_self_otlp_dropped_total",
        otlp: "observer.self.otlp_dropped",
        unit: "{item}",
        help: "Number of data points and spans that were dropped: because the buffer was full (the collector was unavailable for too long, or too many came at once), or because the collector refused them.",
        kind: Kind::Counter,
        subject: SubjectKind::Own,
        own_labels: &["signal", "reason"],
        collect: |s, mut sink| {
            for delivery in &s.own.otlp {
                for dropped in &delivery.dropped {
                    let labels = [("signal", delivery.signal), ("reason", dropped.reason)];
                    sink.add_with(Subject::Own, labels, count(dropped.count));
                }
            }
        },
    },
    Family {
        name: "observer_self_otlp_failures_total",
        otlp: "observer.self.otlp_failures",
        unit: "{attempt}",
        help: "Number of failed attempts to reach an OTLP collector. What is not counted as dropped is sent again.",
        kind: Kind::Counter,
        subject: SubjectKind::Own,
        own_labels: &["signal"],
        collect: |s, mut sink| {
            for delivery in &s.own.otlp {
                sink.add_with(Subject::Own, [("signal", delivery.signal)], count(delivery.failures));
            }
        },
    },
];
