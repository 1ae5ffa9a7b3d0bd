//! Listeners that accept Multipath TCP, which Go opens by default. The queue is that of a TCP listener that the socket
//! behind the descriptor owns.

use std::fs;

use crate::{
    harness::skip,
    support::{
        acceptor::{self, Acceptor, CONNECTIONS},
        observer::Observer,
        wait_for,
    },
};

/// Skips the test on kernels without Multipath TCP.
fn require_multipath() {
    if fs::read_to_string("/proc/sys/net/mptcp/enabled").is_ok_and(|enabled| enabled.trim() == "1") {
        return;
    }
    skip("this kernel has no Multipath TCP, or it is switched off (net.mptcp.enabled)");
}

/// Such a listener accepts Multipath TCP and plain TCP.
#[real_test(contract)]
fn multipath_accepts_are_counted() {
    require_multipath();
    for (kind, client, address) in [
        ("v4", "multipath", "127.0.0.1:PLACE"),
        ("v4", "v4", "127.0.0.1:PLACE"),
        ("dual", "multipath", "[::]:PLACE"),
    ] {
        let acceptor = Acceptor::new(kind, "multipath", 128);
        let what = format!("{kind} multipath, client {client}");
        let listener = acceptor::hold_and_accept(acceptor, &what, client, address);
        assert_eq!(listener["wait"]["count"], CONNECTIONS, "{listener:#}");
        assert_eq!(listener["accepts_unknown_wait"], 0, "{listener:#}");
        assert_eq!(listener["aborted"], 0, "{listener:#}");
    }
}

/// A listener that is opened under observation, and closed with connections in its queue.
#[real_test(contract)]
fn multipath_listener_that_opens_later_is_seen() {
    require_multipath();
    let mut acceptor = Acceptor::new("v4", "multipath", 16);
    acceptor.request("close");
    let observer = Observer::start(&["--pid", &acceptor.pid().to_string(), "--listen", "127.0.0.1:0"]);
    acceptor.request("listen");
    for client in ["v4", "multipath"] {
        assert_eq!(acceptor.request(&format!("connect 5 {client}")), 5);
    }
    assert_eq!(observer.queued_connections(), 10);
    assert_eq!(acceptor.request("accept 8"), 8);
    assert_eq!(observer.queued_connections(), 2);
    // The limit is known from the first refresh on.
    let is_reported = |scrape: String| {
        scrape.lines().any(|line| line.starts_with("observer_accept_queue_limit{") && line.ends_with(" 16"))
    };
    wait_for("the listener to be reported", || is_reported(observer.scrape()).then_some(()));
    acceptor.request("close");
    wait_for("the closed listener to be noticed", || (observer.queued_connections() == 0).then_some(()));
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listeners(&format!("127.0.0.1:{}", acceptor.address()))[0];
    assert_eq!(listener["limit"], 16, "{listener:#}");
    assert_eq!(listener["peak"], 10, "{listener:#}");
    assert_eq!(listener["accepts"], 8, "{listener:#}");
    assert_eq!(listener["wait"]["count"], 8, "{listener:#}");
}

/// Connections that clients reset while they wait are aborted, not connections with an unknown wait.
#[real_test(contract)]
fn multipath_connections_reset_in_the_queue_are_aborted() {
    require_multipath();
    let mut acceptor = Acceptor::new("v4", "multipath", 16);
    let observer = Observer::attach(acceptor.pid());
    assert_eq!(acceptor.request("connect 4 v4"), 4);
    acceptor.request("reset");
    assert_eq!(acceptor.request("accept 4"), 4);
    assert_eq!(observer.queued_connections(), 0);
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listeners(&format!("127.0.0.1:{}", acceptor.address()))[0];
    assert_eq!(listener["accepts"], 4, "{listener:#}");
    assert_eq!(listener["aborted"], 4, "{listener:#}");
    assert_eq!(listener["accepts_unknown_wait"], 0, "{listener:#}");
}

/// A further path of a connection has a handshake of its own at the listener's port, but is never accepted.
#[real_test]
fn further_paths_of_a_connection_do_not_wait() {
    require_multipath();
    let mut acceptor = Acceptor::in_own_namespace_with("multipath", 128);
    acceptor.tool("ip", &["mptcp", "limits", "set", "subflow", "2", "add_addr_accepted", "2"]);
    acceptor.tool("ip", &["mptcp", "endpoint", "add", "127.0.0.2", "dev", "lo", "subflow"]);
    let observer = Observer::attach(acceptor.pid());
    assert_eq!(acceptor.request(&format!("connect {CONNECTIONS} multipath")), CONNECTIONS);
    assert_eq!(acceptor.request(&format!("accept {CONNECTIONS}")), CONNECTIONS);
    assert_eq!(acceptor.request("send"), CONNECTIONS);
    wait_for("each connection to have a second path", || {
        (acceptor.nstat("MPTcpExtMPJoinAckRx") >= u64::from(CONNECTIONS)).then_some(())
    });
    assert_eq!(observer.queued_connections(), 0, "connections remembered though none waits");
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listeners(&format!("127.0.0.1:{}", acceptor.address()))[0];
    assert_eq!(listener["accepts"], CONNECTIONS, "{listener:#}");
    assert_eq!(listener["wait"]["count"], CONNECTIONS, "{listener:#}");
}
