//! The ring probe: connections accepted through io_uring, in every way there is to do that.

use std::thread;

use crate::support::{
    acceptor::{self, Acceptor, CONNECTIONS},
    http, is_emulated,
    observer::Observer,
};

/// How many waits are known of connections that were held and then accepted by io_uring.
fn waits_known(kind: &str, method: &str, address: &str) -> u64 {
    let acceptor = Acceptor::ring(kind, method, 128);
    let listener = acceptor::hold_and_accept(acceptor, &format!("{kind} io_uring {method}"), "", address);
    let known = listener["wait"]["count"].as_u64().unwrap();
    assert_eq!(listener["accepts_unknown_wait"], u64::from(CONNECTIONS) - known, "{listener:#}");
    known
}

/// The same where every wait is known: over TCP and over a unix socket.
fn assert_all_waits_known(method: &str) {
    for (kind, address) in [("v4", "127.0.0.1:PLACE"), ("unix", "unix:PLACE")] {
        let known = waits_known(kind, method, address);
        assert_eq!(known, u64::from(CONNECTIONS), "{kind} {method}");
    }
}

#[real_test(contract)]
fn one_request_for_each_connection() {
    assert_all_waits_known("single");
}

#[real_test]
fn one_request_for_all_connections() {
    assert_all_waits_known("multishot");
}

#[real_test]
fn from_a_listener_in_the_ring_s_own_table() {
    assert_all_waits_known("fixed");
}

#[real_test]
fn submitted_by_the_kernel_s_own_thread() {
    assert_all_waits_known("sqpoll");
}

/// Such connections are no descriptors, so nobody finds them to tell how long they waited.
#[real_test]
fn into_the_ring_s_own_table() {
    let known = waits_known("v4", "direct", "127.0.0.1:PLACE");
    assert_eq!(known, 0);
}

/// Requests that wait for a connection when observer comes tell nothing before one wakes them.
fn assert_adopted(method: &str) {
    let mut acceptor = Acceptor::ring("v4", method, 128);
    acceptor.tell("arm");
    let observer = Observer::of(acceptor.pid());
    assert_eq!(acceptor.tell(&format!("connect {CONNECTIONS}")), CONNECTIONS);
    assert_eq!(acceptor.tell(&format!("accept {CONNECTIONS}")), CONNECTIONS);
    assert_eq!(observer.in_flight(), 0, "connections remembered though none waits");
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(acceptor.place().parse().unwrap());
    assert_eq!(listener["accepts"], CONNECTIONS, "{listener:#}");
    assert_eq!(listener["wait"]["count"], CONNECTIONS, "{listener:#}");
}

#[real_test]
fn requests_for_one_each_from_before_observer_came() {
    assert_adopted("single");
}

#[real_test]
fn a_request_for_all_from_before_observer_came() {
    assert_adopted("multishot");
}

#[real_test]
fn a_request_for_all_of_the_ring_s_own_table_from_before() {
    assert_adopted("fixed");
}

/// Clients that come and go as fast as they can, all at once.
fn assert_load_counted(method: &str) {
    const CLIENTS: u32 = 4;
    let each = if is_emulated() { 250 } else { 1_000 };
    let connections = CLIENTS * each;
    // Room for all of them: a connection that overflows comes again after a second, or never.
    let mut acceptor = Acceptor::ring("v4", method, connections);
    let port = acceptor.place().parse().unwrap();
    let observer = Observer::of(acceptor.pid());
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| (0..each).for_each(|_| drop(http::connect(port))));
        }
        assert_eq!(acceptor.tell(&format!("accept {connections}")), connections);
    });
    assert_eq!(observer.in_flight(), 0, "connections remembered though none waits");
    let skipped = observer.skipped_runs();
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(port);
    assert_eq!(listener["accepts"], connections, "{listener:#}");
    assert_eq!(listener["arrivals"], connections, "{listener:#}");
    // The kernel runs no program inside of itself: a handshake that is done in an interrupt of it has no time stamp. It
    // counts those, on whomsoever's behalf.
    let unknown = listener["accepts_unknown_wait"].as_u64().unwrap();
    assert!(unknown <= skipped, "{skipped} runs skipped, {listener:#}");
    assert_eq!(listener["wait"]["count"].as_u64().unwrap() + unknown, u64::from(connections), "{listener:#}");
    eprintln!("io_uring {method}: {connections} connections counted");
}

#[real_test]
fn under_load_by_one_request_for_each() {
    assert_load_counted("single");
}

#[real_test]
fn under_load_by_one_request_for_all() {
    assert_load_counted("multishot");
}
