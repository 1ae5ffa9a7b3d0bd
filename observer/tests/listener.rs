//! The listener probe: every kind of listener, every way to accept, and connections in the queue.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::support::{
    acceptor::{self, Acceptor, CONNECTIONS},
    is_emulated,
    observer::{Observer, only_value, value},
    wait_for,
};

/// Asserts that the waits of all connections are measured.
fn hold_and_accept(kind: &str, method: &str, client: &str, address: &str) {
    let acceptor = Acceptor::new(kind, method, 128);
    let listener = acceptor::hold_and_accept(acceptor, &format!("{kind} {client} {method}"), client, address);
    assert_eq!(listener["wait"]["count"], CONNECTIONS, "{listener:#}");
}

#[real_test]
fn ipv4_accepts_are_counted_for_every_call() {
    for method in ["accept4", "accept", "nonblocking"] {
        hold_and_accept("v4", method, "", "127.0.0.1:PLACE");
    }
}

#[real_test]
fn ipv6_accepts_are_counted_for_every_call() {
    for method in ["accept4", "accept", "nonblocking"] {
        hold_and_accept("v6", method, "", "[::1]:PLACE");
    }
}

#[real_test]
fn dual_stack_accepts_are_counted() {
    hold_and_accept("dual", "accept4", "v6", "[::]:PLACE");
    hold_and_accept("dual", "accept4", "v4", "[::]:PLACE");
}

#[real_test(contract)]
fn unix_accepts_are_counted_for_accept4() {
    hold_and_accept("unix", "accept4", "", "unix:PLACE");
}

#[real_test]
fn unix_accepts_are_counted_for_other_calls() {
    for method in ["accept", "nonblocking"] {
        hold_and_accept("unix", method, "", "unix:PLACE");
    }
    hold_and_accept("abstract", "accept4", "", "unix:PLACE");
}

/// Only the member that no thread accepts from has a depth and an age.
#[real_test]
fn stuck_member_of_a_reuseport_group_has_depth_and_age() {
    let mut group = Acceptor::group(4);
    let observer = Observer::attach(group.pid());
    assert_eq!(group.request("connect 80"), 80);
    for member in [0, 1, 3] {
        group.request(&format!("accept 80 {member}"));
    }
    let (depth, _) = group.ss();
    let report = observer.finish();
    let members = report.listeners(&format!("127.0.0.1:{}", group.address()));
    assert_eq!(members.len(), 4);
    let stuck: Vec<_> = members.iter().filter(|member| member["depth"] != 0).collect();
    assert_eq!(stuck.len(), 1, "{members:#?}");
    assert_eq!(stuck[0]["depth"], depth, "{members:#?}");
    assert!(stuck[0]["oldest_seconds"].as_f64().unwrap() > 0.0, "{members:#?}");
    assert_eq!(stuck[0]["accepts"], 0);
    let accepts: u64 = members.iter().map(|member| member["accepts"].as_u64().unwrap()).sum();
    assert_eq!(accepts, u64::from(80 - depth));
}

/// Asserts that the age of the oldest connection grows, because the server does not accept.
fn assert_oldest_ages(observer: &Observer) {
    let age = || {
        let scrape = observer.scrape();
        let refreshed = value(&scrape, "observer_self_refreshed_timestamp_seconds");
        (refreshed.expect("a time"), only_value(&scrape, "observer_accept_queue_oldest_seconds"))
    };
    // Targets are refreshed one after the other.
    let (pause, stale) = if is_emulated() { (8_000, 2.5) } else { (1_000, 0.15) };
    let first = age();
    thread::sleep(Duration::from_millis(pause));
    let second = age();
    let grown = second.1 - first.1;
    let truth = second.0 - first.0;
    assert!((grown - truth).abs() < 0.1 * truth + stale, "the oldest aged {grown} s in {truth} s");
}

/// The age of a unix connection is exact if it was made after observer attached, and a lower bound otherwise.
#[real_test]
fn oldest_unix_connection_ages() {
    for connects_before in [false, true] {
        let mut acceptor = Acceptor::new("unix", "accept4", 16);
        if connects_before {
            acceptor.request("connect 1");
            thread::sleep(Duration::from_millis(500));
        }
        // For older connections, age counts from when observer attached, which is before it says that it is ready.
        let mut attached = Instant::now();
        let observer = Observer::start(&["--pid", &acceptor.pid().to_string(), "--listen", "127.0.0.1:0"]);
        if !connects_before {
            attached = Instant::now();
        }
        acceptor.request("connect 3");
        assert_oldest_ages(&observer);
        let oldest = observer.metric("observer_accept_queue_oldest_seconds");
        let limit = attached.elapsed().as_secs_f64();
        assert!(oldest <= limit, "{oldest} s, though the first that is known of came {limit} s ago");
        let report = observer.finish();
        let listener = report.listeners(&format!("unix:{}", acceptor.address()))[0];
        assert_eq!(listener["oldest_is_lower_bound"], connects_before, "{listener:#}");
        assert_eq!(listener["depth"], 3 + u32::from(connects_before), "{listener:#}");
    }
}

/// Queued connections are destroyed with their listener; no entries of them stay.
#[real_test]
fn closed_listener_leaks_no_entries() {
    for kind in ["v4", "unix"] {
        let mut acceptor = Acceptor::new(kind, "accept4", 16);
        let observer = Observer::attach(acceptor.pid());
        assert_eq!(acceptor.request("connect 5"), 5);
        assert_eq!(observer.queued_connections(), 5, "{kind}");
        acceptor.request("close");
        wait_for("the closed listener to be noticed", || (observer.queued_connections() == 0).then_some(()));
        observer.finish().assert_complete();
    }
}

/// A listener with a backlog of 8 that does not accept, and 200 clients.
#[real_test]
fn overflows_agree_with_ss_and_nstat() {
    let mut acceptor = Acceptor::in_own_namespace(8);
    let arguments = ["--pid", &acceptor.pid().to_string(), "--listen", "127.0.0.1:0"];
    let observer = Observer::start(&arguments);
    acceptor.request("connect 200");
    assert_oldest_ages(&observer);

    let (depth, limit) = acceptor.ss();
    let before = (acceptor.nstat("TcpExtListenDrops"), acceptor.nstat("TcpExtListenOverflows"));
    let address = format!("127.0.0.1:{}", acceptor.address());
    let report = observer.finish();
    let after = (acceptor.nstat("TcpExtListenDrops"), acceptor.nstat("TcpExtListenOverflows"));
    let listener = report.listeners(&address)[0];
    assert_eq!(listener["depth"], depth, "{listener:#}");
    assert_eq!(listener["peak"], depth, "{listener:#}");
    assert_eq!(listener["limit"], limit, "{listener:#}");
    assert_eq!(listener["accepts"], 0);
    // Clients retry meanwhile, so the counters may differ between two reads.
    let (drops, overflows) =
        (listener["drops"].as_u64().unwrap(), listener["overflows"].as_u64().expect("certain"));
    assert!((before.0..=after.0).contains(&drops), "{drops} drops, nstat {before:?} to {after:?}");
    assert!(
        (before.1..=after.1).contains(&overflows),
        "{overflows} overflows, nstat {before:?} to {after:?}"
    );
    assert!(drops > 0 && overflows > 0);
}

/// A thousand clients that reset their connections in the queue.
#[real_test]
fn resets_in_the_queue_are_counted_and_leak_no_entries() {
    let mut acceptor = Acceptor::new("v4", "accept4", 1024);
    let observer = Observer::start(&["--pid", &acceptor.pid().to_string(), "--listen", "127.0.0.1:0"]);
    assert_eq!(acceptor.request("connect 1000"), 1000);
    acceptor.request("reset");
    let (depth, _) = acceptor.ss();
    assert_eq!(observer.metric("observer_accept_queue_aborted_total"), 1000.0);
    assert_eq!(observer.metric("observer_accept_queue_accepts_total"), 0.0);
    // The kernel keeps them in the queue until they are accepted.
    assert_eq!(observer.metric("observer_accept_queue_depth"), f64::from(depth));
    assert_eq!(observer.metric("observer_accept_queue_oldest_seconds"), 0.0);
    assert_eq!(observer.queued_connections(), 0, "connections remembered though none waits");

    acceptor.request("accept 1000");
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(acceptor.address().parse().unwrap());
    assert_eq!(listener["accepts"], 1000, "{listener:#}");
    assert_eq!(listener["aborted"], 1000, "{listener:#}");
    assert_eq!(listener["accepts_unknown_wait"], 0, "{listener:#}");
}

/// A listener that is opened, closed, and opened again on the same port counts as two listeners.
#[real_test]
fn listener_that_is_opened_again_is_a_new_listener() {
    let mut acceptor = Acceptor::new("v4", "accept4", 16);
    let port = acceptor.address().to_owned();
    acceptor.request("close");
    let observer = Observer::attach(acceptor.pid());
    for (command, connections) in [("listen", 3), ("listen", 5)] {
        acceptor.request(command);
        assert_eq!(acceptor.request(&format!("connect {connections}")), connections);
        assert_eq!(acceptor.request(&format!("accept {connections}")), connections);
        acceptor.request("reset");
        if connections == 3 {
            acceptor.request("close");
        }
    }
    let report = observer.finish();
    report.assert_complete();
    let found = report.listeners(&format!("127.0.0.1:{port}"));
    let mut counts: Vec<_> =
        found.iter().map(|l| (l["accepts"].as_u64().unwrap(), l["closed"].as_bool().unwrap())).collect();
    counts.sort_unstable();
    assert_eq!(counts, [(3, true), (5, false)], "{found:#?}");
    assert!(found.iter().all(|listener| listener["wait"]["count"] == listener["accepts"]), "{found:#?}");
}
