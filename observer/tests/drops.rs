//! The kernel counts overflows for a whole network namespace: they are a listener's only where that is certain.

use std::path::Path;

use serde_json::Value;

use crate::support::{
    acceptor::Acceptor,
    observer::{Observer, Report},
};

fn observe(acceptors: &[&Acceptor]) -> Observer {
    let pids: Vec<_> = acceptors.iter().map(|acceptor| acceptor.pid().to_string()).collect();
    let mut arguments = vec!["--no-listen"];
    arguments.extend(pids.iter().flat_map(|pid| ["--pid", pid]));
    Observer::start(&arguments)
}

#[track_caller]
fn listener<'r>(report: &'r Report, acceptor: &Acceptor) -> &'r Value {
    let listeners = report.target(acceptor.pid())["listeners"].as_array().unwrap();
    assert_eq!(listeners.len(), 1, "{listeners:#?}");
    &listeners[0]
}

/// Of two that overflow nobody can tell which one's an overflow was; one that dropped nothing has none.
#[real_test]
fn overflows_of_two_listeners_are_told_for_neither() {
    let mut first = Acceptor::in_own_namespace(8);
    let mut second = Acceptor::beside(&first, 8);
    let mut silent = Acceptor::beside(&first, 8);
    let observer = observe(&[&first, &second, &silent]);
    first.tell("connect 50");
    second.tell("connect 30");
    assert_eq!(silent.tell("connect 3"), 3);
    let report = observer.finish();
    for acceptor in [&first, &second] {
        let listener = listener(&report, acceptor);
        assert!(listener["drops"].as_u64().unwrap() > 0, "{listener:#}");
        assert_eq!(listener["overflows"], Value::Null, "{listener:#}");
    }
    let silent = listener(&report, &silent);
    assert_eq!(silent["drops"], 0, "{silent:#}");
    assert_eq!(silent["overflows"], 0, "{silent:#}");
}

/// Beside listeners that drop nothing an overflow can only be this one's, however fast they come.
#[real_test]
fn overflows_beside_silent_listeners_are_certain() {
    let mut full = Acceptor::in_own_namespace(8);
    let silent = Acceptor::beside(&full, 8);
    let observer = observe(&[&full, &silent]);
    full.tell("connect 600");
    let before = full.nstat("TcpExtListenOverflows");
    let report = observer.finish();
    let after = full.nstat("TcpExtListenOverflows");
    let overflows = listener(&report, &full)["overflows"].as_u64().expect("certain");
    assert!(overflows > 0 && (before..=after).contains(&overflows), "{overflows} not in {before}..={after}");
    assert_eq!(listener(&report, &silent)["overflows"], 0);
}

/// A listener drops segments that begin no connection, which its namespace does not count as drops of listeners.
#[real_test]
fn stray_segments_are_drops_but_no_overflows() {
    const SEGMENTS: u32 = 23;
    let acceptor = Acceptor::in_own_namespace(8);
    let observer = observe(&[&acceptor]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/stray_segments.py");
    acceptor.tool("/usr/bin/python3", &[script.to_str().unwrap(), acceptor.place(), &SEGMENTS.to_string()]);
    let report = observer.finish();
    let listener = listener(&report, &acceptor);
    assert_eq!(acceptor.nstat("TcpExtListenDrops"), 0);
    assert_eq!(listener["drops"], SEGMENTS, "{listener:#}");
    assert_eq!(listener["overflows"], 0, "{listener:#}");
}
