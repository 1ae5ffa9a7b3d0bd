//! The kernel counts overflows for a whole network namespace: observer reports them for a listener only where that is
//! certain.

use std::{path::Path, thread, time::Duration};

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

/// If two listeners overflow, it is unknown whose an overflow was. A listener without drops has no overflows.
#[real_test]
fn overflows_are_unknown_if_two_listeners_overflow() {
    let mut first = Acceptor::in_own_namespace(8);
    let mut second = Acceptor::in_namespace_of(&first, 8);
    let mut silent = Acceptor::in_namespace_of(&first, 8);
    let observer = observe(&[&first, &second, &silent]);
    first.request("connect 50");
    second.request("connect 30");
    assert_eq!(silent.request("connect 3"), 3);
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

/// If other listeners drop nothing, all overflows belong to this one, however fast they occur.
#[real_test]
fn overflows_are_exact_if_one_listener_overflows() {
    let mut full = Acceptor::in_own_namespace(8);
    let silent = Acceptor::in_namespace_of(&full, 8);
    let observer = observe(&[&full, &silent]);
    full.request("connect 600");
    let before = full.nstat("TcpExtListenOverflows");
    let report = observer.finish();
    let after = full.nstat("TcpExtListenOverflows");
    let overflows = listener(&report, &full)["overflows"].as_u64().expect("certain");
    assert!(overflows > 0 && (before..=after).contains(&overflows), "{overflows} not in {before}..={after}");
    assert_eq!(listener(&report, &silent)["overflows"], 0);
}

fn send_stray_segments(acceptor: &Acceptor, count: u32) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/stray_segments.py");
    acceptor.tool("/usr/bin/python3", &[script.to_str().unwrap(), acceptor.address(), &count.to_string()]);
}

/// With `TCP_DEFER_ACCEPT`, the kernel counts the last segment of each handshake as dropped, although nobody is turned
/// away. The connection is queued when its first data arrives.
#[real_test]
fn segments_of_deferred_handshakes_are_no_drops() {
    const CONNECTIONS: u32 = 23;
    const STRAY: u32 = 5;
    const PAUSE: Duration = Duration::from_millis(400);
    let mut acceptor = Acceptor::in_own_namespace_with("deferred", 64);
    let observer = observe(&[&acceptor]);
    assert_eq!(acceptor.request(&format!("connect {CONNECTIONS}")), CONNECTIONS);
    thread::sleep(PAUSE);
    assert_eq!(acceptor.request("send"), CONNECTIONS);
    assert_eq!(acceptor.request(&format!("accept {CONNECTIONS}")), CONNECTIONS);
    assert_eq!(acceptor.nstat("TcpExtTCPDeferAcceptDrop"), u64::from(CONNECTIONS));
    send_stray_segments(&acceptor, STRAY);
    let report = observer.finish();
    let listener = listener(&report, &acceptor);
    assert_eq!(listener["accepts"], CONNECTIONS, "{listener:#}");
    assert_eq!(listener["wait"]["count"], CONNECTIONS, "{listener:#}");
    // A connection has waited at most from the sending on.
    assert!(listener["wait"]["max"].as_f64().unwrap() < PAUSE.as_secs_f64(), "{listener:#}");
    assert_eq!(listener["drops"], STRAY, "{listener:#}");
    assert_eq!(listener["overflows"], 0, "{listener:#}");
}

/// A listener drops segments that begin no connection. The kernel does not count these as drops of listeners.
#[real_test]
fn stray_segments_are_drops_but_not_overflows() {
    const SEGMENTS: u32 = 23;
    let acceptor = Acceptor::in_own_namespace(8);
    let observer = observe(&[&acceptor]);
    send_stray_segments(&acceptor, SEGMENTS);
    let report = observer.finish();
    let listener = listener(&report, &acceptor);
    assert_eq!(acceptor.nstat("TcpExtListenDrops"), 0);
    assert_eq!(listener["drops"], SEGMENTS, "{listener:#}");
    assert_eq!(listener["overflows"], 0, "{listener:#}");
}
