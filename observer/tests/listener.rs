//! The listener probe: every kind of listener, every way to accept, and what becomes of connections that wait.

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

/// Waits are measured, all of them.
fn hold_and_accept(kind: &str, method: &str, client: &str, address: &str) {
    let acceptor = Acceptor::new(kind, method, 128);
    let listener = acceptor::hold_and_accept(acceptor, &format!("{kind} {client} {method}"), client, address);
    assert_eq!(listener["wait"]["count"], CONNECTIONS, "{listener:#}");
}

#[real_test]
fn ipv4_by_every_way_to_accept() {
    for method in ["accept4", "accept", "nonblocking"] {
        hold_and_accept("v4", method, "", "127.0.0.1:PLACE");
    }
}

#[real_test]
fn ipv6_by_every_way_to_accept() {
    for method in ["accept4", "accept", "nonblocking"] {
        hold_and_accept("v6", method, "", "[::1]:PLACE");
    }
}

#[real_test]
fn dual_stack_with_ipv6_and_mapped_ipv4() {
    hold_and_accept("dual", "accept4", "v6", "[::]:PLACE");
    hold_and_accept("dual", "accept4", "v4", "[::]:PLACE");
}

#[real_test(contract)]
fn unix_by_accept4() {
    hold_and_accept("unix", "accept4", "", "unix:PLACE");
}

#[real_test]
fn unix_by_other_ways_to_accept() {
    for method in ["accept", "nonblocking"] {
        hold_and_accept("unix", method, "", "unix:PLACE");
    }
    hold_and_accept("abstract", "accept4", "", "unix:PLACE");
}

/// Exactly the member that nobody accepts from shows depth and age.
#[real_test]
fn a_stuck_member_of_a_reuseport_group_stands_out() {
    let mut group = Acceptor::group(4);
    let observer = Observer::of(group.pid());
    assert_eq!(group.tell("connect 80"), 80);
    for member in [0, 1, 3] {
        group.tell(&format!("accept 80 {member}"));
    }
    let (depth, _) = group.ss();
    let report = observer.finish();
    let members = report.listeners(&format!("127.0.0.1:{}", group.place()));
    assert_eq!(members.len(), 4);
    let stuck: Vec<_> = members.iter().filter(|member| member["depth"] != 0).collect();
    assert_eq!(stuck.len(), 1, "{members:#?}");
    assert_eq!(stuck[0]["depth"], depth, "{members:#?}");
    assert!(stuck[0]["oldest_seconds"].as_f64().unwrap() > 0.0, "{members:#?}");
    assert_eq!(stuck[0]["accepts"], 0);
    let accepts: u64 = members.iter().map(|member| member["accepts"].as_u64().unwrap()).sum();
    assert_eq!(accepts, u64::from(80 - depth));
}

/// Nobody accepts, so the connection that waits longest gets older as time goes by.
fn assert_the_oldest_ages(observer: &Observer) {
    let age = || {
        let scrape = observer.scrape();
        let refreshed = value(&scrape, "observer_self_refreshed_timestamp_seconds");
        (refreshed.expect("a time"), only_value(&scrape, "observer_accept_queue_oldest_seconds"))
    };
    // Refreshed is one after the other.
    let (pause, stale) = if is_emulated() { (8_000, 2.5) } else { (1_000, 0.15) };
    let first = age();
    thread::sleep(Duration::from_millis(pause));
    let second = age();
    let grown = second.1 - first.1;
    let truth = second.0 - first.0;
    assert!((grown - truth).abs() < 0.1 * truth + stale, "the oldest aged {grown} s in {truth} s");
}

/// A unix connection that came after observer did is as old as it is, one from before at least as old as observer.
#[real_test]
fn the_oldest_unix_connection_ages() {
    for connects_before in [false, true] {
        let mut acceptor = Acceptor::new("unix", "accept4", 16);
        if connects_before {
            acceptor.tell("connect 1");
            thread::sleep(Duration::from_millis(500));
        }
        // What was there before is as old as observer, which takes a while until it says that it is there.
        let mut came = Instant::now();
        let observer = Observer::start(&["--pid", &acceptor.pid().to_string(), "--listen", "127.0.0.1:0"]);
        if !connects_before {
            came = Instant::now();
        }
        acceptor.tell("connect 3");
        assert_the_oldest_ages(&observer);
        let oldest = observer.figure("observer_accept_queue_oldest_seconds");
        let limit = came.elapsed().as_secs_f64();
        assert!(oldest <= limit, "{oldest} s, though the first that is known of came {limit} s ago");
        let report = observer.finish();
        let listener = report.listeners(&format!("unix:{}", acceptor.place()))[0];
        assert_eq!(listener["oldest_is_lower_bound"], connects_before, "{listener:#}");
        assert_eq!(listener["depth"], 3 + u32::from(connects_before), "{listener:#}");
    }
}

/// Connections that wait die with their listener; nothing of them is kept.
#[real_test]
fn a_listener_that_closes_leaves_nothing_behind() {
    for kind in ["v4", "unix"] {
        let mut acceptor = Acceptor::new(kind, "accept4", 16);
        let observer = Observer::of(acceptor.pid());
        assert_eq!(acceptor.tell("connect 5"), 5);
        assert_eq!(observer.in_flight(), 5, "{kind}");
        acceptor.tell("close");
        wait_for("the closed listener to be noticed", || (observer.in_flight() == 0).then_some(()));
        observer.finish().assert_complete();
    }
}

/// A listener with room for 8, nobody who accepts, and 200 who come.
#[real_test]
fn an_overflow_agrees_with_ss_and_nstat() {
    let mut acceptor = Acceptor::in_own_namespace(8);
    let arguments = ["--pid", &acceptor.pid().to_string(), "--listen", "127.0.0.1:0"];
    let observer = Observer::start(&arguments);
    acceptor.tell("connect 200");
    assert_the_oldest_ages(&observer);

    let (depth, limit) = acceptor.ss();
    let before = (acceptor.nstat("TcpExtListenDrops"), acceptor.nstat("TcpExtListenOverflows"));
    let address = format!("127.0.0.1:{}", acceptor.place());
    let report = observer.finish();
    let after = (acceptor.nstat("TcpExtListenDrops"), acceptor.nstat("TcpExtListenOverflows"));
    let listener = report.listeners(&address)[0];
    assert_eq!(listener["depth"], depth, "{listener:#}");
    assert_eq!(listener["peak"], depth, "{listener:#}");
    assert_eq!(listener["limit"], limit, "{listener:#}");
    assert_eq!(listener["accepts"], 0);
    // Clients go on trying while we look, so that the counters may have moved from one look to the next.
    let (drops, overflows) =
        (listener["drops"].as_u64().unwrap(), listener["overflows"].as_u64().expect("certain"));
    assert!((before.0..=after.0).contains(&drops), "{drops} drops, nstat {before:?} to {after:?}");
    assert!(
        (before.1..=after.1).contains(&overflows),
        "{overflows} overflows, nstat {before:?} to {after:?}"
    );
    assert!(drops > 0 && overflows > 0);
}

/// A thousand clients that give up while they wait.
#[real_test]
fn resets_in_the_queue_are_counted_and_leave_nothing_behind() {
    let mut acceptor = Acceptor::new("v4", "accept4", 1024);
    let observer = Observer::start(&["--pid", &acceptor.pid().to_string(), "--listen", "127.0.0.1:0"]);
    assert_eq!(acceptor.tell("connect 1000"), 1000);
    acceptor.tell("reset");
    let (depth, _) = acceptor.ss();
    assert_eq!(observer.figure("observer_accept_queue_aborted_total"), 1000.0);
    assert_eq!(observer.figure("observer_accept_queue_accepts_total"), 0.0);
    // The kernel keeps them until somebody accepts them.
    assert_eq!(observer.figure("observer_accept_queue_depth"), f64::from(depth));
    assert_eq!(observer.figure("observer_accept_queue_oldest_seconds"), 0.0);
    assert_eq!(observer.in_flight(), 0, "connections remembered though none waits");

    acceptor.tell("accept 1000");
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(acceptor.place().parse().unwrap());
    assert_eq!(listener["accepts"], 1000, "{listener:#}");
    assert_eq!(listener["aborted"], 1000, "{listener:#}");
    assert_eq!(listener["accepts_unknown_wait"], 0, "{listener:#}");
}

/// Opened after observer came, closed, opened again in the same place: two listeners, each with its own figures.
#[real_test]
fn a_listener_closed_and_opened_again() {
    let mut acceptor = Acceptor::new("v4", "accept4", 16);
    let place = acceptor.place().to_owned();
    acceptor.tell("close");
    let observer = Observer::of(acceptor.pid());
    for (command, connections) in [("listen", 3), ("listen", 5)] {
        acceptor.tell(command);
        assert_eq!(acceptor.tell(&format!("connect {connections}")), connections);
        assert_eq!(acceptor.tell(&format!("accept {connections}")), connections);
        acceptor.tell("reset");
        if connections == 3 {
            acceptor.tell("close");
        }
    }
    let report = observer.finish();
    report.assert_complete();
    let found = report.listeners(&format!("127.0.0.1:{place}"));
    let mut figures: Vec<_> =
        found.iter().map(|l| (l["accepts"].as_u64().unwrap(), l["closed"].as_bool().unwrap())).collect();
    figures.sort_unstable();
    assert_eq!(figures, [(3, true), (5, false)], "{found:#?}");
    assert!(found.iter().all(|listener| listener["wait"]["count"] == listener["accepts"]), "{found:#?}");
}
