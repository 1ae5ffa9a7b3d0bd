//! The ring probe: connections accepted with io_uring, in every way that it supports.

use std::thread;

use crate::support::{
    acceptor::{self, Acceptor, CONNECTIONS},
    http, is_emulated,
    observer::Observer,
};

/// Number of measured waits of connections that were held in the queue and then accepted with io_uring.
fn waits_known(kind: &str, method: &str, address: &str) -> u64 {
    let acceptor = Acceptor::ring(kind, method, 128);
    let listener = acceptor::hold_and_accept(acceptor, &format!("{kind} io_uring {method}"), "", address);
    let known = listener["wait"]["count"].as_u64().unwrap();
    assert_eq!(listener["accepts_unknown_wait"], u64::from(CONNECTIONS) - known, "{listener:#}");
    known
}

/// Asserts that all waits are measured, over TCP and over a unix socket.
fn assert_all_waits_known(method: &str) {
    for (kind, address) in [("v4", "127.0.0.1:PLACE"), ("unix", "unix:PLACE")] {
        let known = waits_known(kind, method, address);
        assert_eq!(known, u64::from(CONNECTIONS), "{kind} {method}");
    }
}

#[real_test(contract)]
fn single_accepts_are_counted() {
    assert_all_waits_known("single");
}

#[real_test]
fn multishot_accepts_are_counted() {
    assert_all_waits_known("multishot");
}

#[real_test]
fn accepts_on_a_fixed_listener_are_counted() {
    assert_all_waits_known("fixed");
}

#[real_test]
fn accepts_of_an_sqpoll_thread_are_counted() {
    assert_all_waits_known("sqpoll");
}

/// Such connections have no descriptor, so their sockets and waits are unknown.
#[real_test]
fn accepts_into_direct_descriptors_have_unknown_waits() {
    let known = waits_known("v4", "direct", "127.0.0.1:PLACE");
    assert_eq!(known, 0);
}

/// Asserts that requests that were waiting for a connection before observer attached are counted: they cause no event
/// before a connection arrives.
fn assert_earlier_requests_counted(method: &str) {
    let mut acceptor = Acceptor::ring("v4", method, 128);
    acceptor.request("arm");
    let observer = Observer::attach(acceptor.pid());
    assert_eq!(acceptor.request(&format!("connect {CONNECTIONS}")), CONNECTIONS);
    assert_eq!(acceptor.request(&format!("accept {CONNECTIONS}")), CONNECTIONS);
    assert_eq!(observer.queued_connections(), 0, "connections remembered though none waits");
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(acceptor.address().parse().unwrap());
    assert_eq!(listener["accepts"], CONNECTIONS, "{listener:#}");
    assert_eq!(listener["wait"]["count"], CONNECTIONS, "{listener:#}");
}

#[real_test]
fn single_accepts_submitted_before_attach_are_counted() {
    assert_earlier_requests_counted("single");
}

#[real_test]
fn multishot_accept_submitted_before_attach_is_counted() {
    assert_earlier_requests_counted("multishot");
}

#[real_test]
fn fixed_listener_accept_submitted_before_attach_is_counted() {
    assert_earlier_requests_counted("fixed");
}

/// Asserts that connections of concurrent clients are counted.
fn assert_load_counted(method: &str) {
    const CLIENTS: u32 = 4;
    let each = if is_emulated() { 250 } else { 1_000 };
    let connections = CLIENTS * each;
    // A backlog for all of them: a client retries a connection that overflows after a second, or never.
    let mut acceptor = Acceptor::ring("v4", method, connections);
    let port = acceptor.address().parse().unwrap();
    let observer = Observer::attach(acceptor.pid());
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| (0..each).for_each(|_| drop(http::connect(port))));
        }
        assert_eq!(acceptor.request(&format!("accept {connections}")), connections);
    });
    assert_eq!(observer.queued_connections(), 0, "connections remembered though none waits");
    let skipped = observer.skipped_runs();
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(port);
    assert_eq!(listener["accepts"], connections, "{listener:#}");
    assert_eq!(listener["arrivals"], connections, "{listener:#}");
    // The kernel skips a program that is already running on the CPU: a handshake that an interrupt finishes meanwhile
    // has no timestamp. The kernel counts skipped programs, but not per listener.
    let unknown = listener["accepts_unknown_wait"].as_u64().unwrap();
    assert!(unknown <= skipped, "{skipped} runs skipped, {listener:#}");
    assert_eq!(listener["wait"]["count"].as_u64().unwrap() + unknown, u64::from(connections), "{listener:#}");
    eprintln!("io_uring {method}: {connections} connections counted");
}

#[real_test]
fn single_accepts_under_load_are_counted() {
    assert_load_counted("single");
}

#[real_test]
fn multishot_accepts_under_load_are_counted() {
    assert_load_counted("multishot");
}
