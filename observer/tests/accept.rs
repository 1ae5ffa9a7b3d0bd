//! The accept probe against real servers: every connection is counted once, and waits are measured.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::support::{
    acceptor::Acceptor,
    http, is_emulated, is_full,
    load::{observe, wrk},
    observer::Observer,
    send,
    servers::{Server, children},
};
use nix::sys::signal::Signal;

/// Number of connections of a test.
const CONNECTIONS: u64 = 23;

/// Runs a load on a server with one listener and compares counts; returns the server's.
fn assert_counts_equal(server: &Server, own_count: impl Fn(&Server) -> u64, load: impl FnOnce(u16)) -> u64 {
    let (connections, report) = observe(server, own_count, load);
    let listener = report.listener(server.port);
    assert_eq!(listener["accepts"], connections, "{listener:#}");
    connections
}

fn open_each(port: u16) {
    for _ in 0..CONNECTIONS {
        http::get(port, "/");
    }
}

fn keep_alive(port: u16) {
    for _ in 0..CONNECTIONS {
        http::get_many(port, "/", 10);
    }
}

#[real_test]
fn nginx_23_connections_one_worker() {
    let server = Server::nginx(1);
    // The connection of the second count is accepted under observation as well.
    assert_eq!(assert_counts_equal(&server, Server::nginx_accepts, open_each), CONNECTIONS + 1);
}

#[real_test(contract)]
fn nginx_23_connections_two_workers() {
    let server = Server::nginx(2);
    assert_eq!(assert_counts_equal(&server, Server::nginx_accepts, open_each), CONNECTIONS + 1);
}

#[real_test]
fn nginx_23_connections_with_keep_alive() {
    let server = Server::nginx(2);
    assert_eq!(assert_counts_equal(&server, Server::nginx_accepts, keep_alive), CONNECTIONS + 1);
}

#[real_test]
fn nginx_under_load_without_keep_alive() {
    for workers in [1, 2] {
        let server = Server::nginx(workers);
        let many = if is_full() { 100_000 } else { 10_000 };
        let load = |port| wrk(port, &["Connection: close"], || server.nginx_accepts() > many);
        let connections = assert_counts_equal(&server, Server::nginx_accepts, load);
        assert!(is_emulated() || connections > many);
        eprintln!("{workers} workers: {connections} connections counted");
    }
}

#[real_test]
fn nginx_under_load_with_keep_alive() {
    for workers in [1, 2] {
        let server = Server::nginx(workers);
        assert_counts_equal(&server, Server::nginx_accepts, |port| wrk(port, &[], || true));
    }
}

#[real_test]
fn redis_23_connections() {
    let server = Server::redis();
    let load = |port| {
        for _ in 0..CONNECTIONS {
            drop(http::connect(port));
        }
    };
    assert_eq!(assert_counts_equal(&server, Server::redis_accepts, load), CONNECTIONS + 1);
}

#[real_test]
fn asyncio_23_connections() {
    let server = Server::asyncio();
    let own_count = |server: &Server| server.block("none", 0)["connections"].as_u64().unwrap();
    assert_eq!(assert_counts_equal(&server, own_count, open_each), CONNECTIONS + 1);
}

#[real_test]
fn node_23_connections() {
    let server = Server::node();
    let own_count = |server: &Server| server.block("none", 0)["connections"].as_u64().unwrap();
    assert_eq!(assert_counts_equal(&server, own_count, open_each), CONNECTIONS + 1);
}

/// A stopped server accepts nothing: a connection waits as long as the server is stopped, and is in the queue.
#[real_test(contract)]
fn wait_for_a_stopped_server_is_measured() {
    let server = Server::nginx(1);
    let worker = children(server.pid())[0];
    let observer = Observer::attach(server.pid());

    send(worker, Signal::SIGSTOP);
    let before_connect = Instant::now();
    let connection = http::connect(server.port);
    let after_connect = Instant::now();
    thread::sleep(Duration::from_secs(1));
    let shortest = after_connect.elapsed().as_secs_f64();
    send(worker, Signal::SIGCONT);
    http::request(connection, "/");
    let longest = before_connect.elapsed().as_secs_f64();

    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(server.port);
    assert_eq!(listener["accepts"], 1, "{listener:#}");
    assert_eq!(listener["peak"], 1, "{listener:#}");
    let wait = listener["wait"]["max"].as_f64().unwrap();
    eprintln!("wait {wait:.6} s, truth between {shortest:.6} and {longest:.6} s");
    // Both times were taken around the wait, so the wait lies between them regardless of load. The clocks are the same,
    // so a tolerance of one millisecond is generous.
    assert!((shortest - 0.001..=longest + 0.001).contains(&wait), "{wait} not in {shortest}..={longest}");
}

/// Connections that were queued before observer attached are counted, but their wait is unknown.
#[real_test]
fn connections_queued_before_attach_have_unknown_wait() {
    let server = Server::nginx(1);
    let worker = children(server.pid())[0];
    send(worker, Signal::SIGSTOP);
    let early: Vec<_> = (0..5).map(|_| http::connect(server.port)).collect();

    let observer = Observer::attach(server.pid());
    let late: Vec<_> = (0..7).map(|_| http::connect(server.port)).collect();
    send(worker, Signal::SIGCONT);
    for connection in early.into_iter().chain(late) {
        http::request(connection, "/");
    }

    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(server.port);
    assert_eq!(listener["accepts"], 12, "{listener:#}");
    assert_eq!(listener["accepts_unknown_wait"], 5, "{listener:#}");
    assert_eq!(listener["wait"]["count"], 7, "{listener:#}");
    assert_eq!(listener["arrivals"], 7, "{listener:#}");
    assert_eq!(listener["peak"], 12, "{listener:#}");
}

/// Depth and limit agree with `ss`.
#[real_test]
fn depth_and_limit_agree_with_ss() {
    let server = Server::nginx(1);
    let worker = children(server.pid())[0];
    let observer = Observer::attach(server.pid());
    send(worker, Signal::SIGSTOP);
    let waiting: Vec<_> = (0..9).map(|_| http::connect(server.port)).collect();

    let ss = Command::new("ss").args(["-Hltn", &format!("sport = :{}", server.port)]).output().unwrap();
    let ss = String::from_utf8(ss.stdout).unwrap();
    let columns: Vec<&str> = ss.split_whitespace().collect();
    let report = observer.finish();
    let listener = report.listener(server.port);
    assert_eq!(listener["depth"].to_string(), columns[1], "{ss}");
    assert_eq!(listener["limit"].to_string(), columns[2], "{ss}");
    assert_eq!(listener["depth"], waiting.len());
    assert_eq!(listener["accepts"], 0);
}

/// The handshake of a connection from a SYN cookie has no request socket; its wait is measured all the same.
#[real_test]
fn wait_of_syn_cookie_connections_is_measured() {
    const HOLD: Duration = Duration::from_millis(200);
    let mut acceptor = Acceptor::in_own_namespace(128);
    acceptor.tool("sh", &["-c", "echo 2 >/proc/sys/net/ipv4/tcp_syncookies"]);
    let observer = Observer::attach(acceptor.pid());
    let before_connect = Instant::now();
    assert_eq!(acceptor.request(&format!("connect {CONNECTIONS}")), u32::try_from(CONNECTIONS).unwrap());
    let after_connect = Instant::now();
    thread::sleep(HOLD);
    let shortest = after_connect.elapsed().as_secs_f64();
    assert_eq!(acceptor.request(&format!("accept {CONNECTIONS}")), u32::try_from(CONNECTIONS).unwrap());
    let longest = before_connect.elapsed().as_secs_f64();
    assert_eq!(acceptor.nstat("TcpExtSyncookiesRecv"), CONNECTIONS, "made from cookies");

    assert_eq!(observer.queued_connections(), 0, "connections remembered though none waits");
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listeners(&format!("127.0.0.1:{}", acceptor.address()))[0];
    assert_eq!(listener["accepts"], CONNECTIONS, "{listener:#}");
    assert_eq!(listener["arrivals"], CONNECTIONS, "{listener:#}");
    assert_eq!(listener["wait"]["count"], CONNECTIONS, "{listener:#}");
    let (min, max) = (listener["wait"]["min"].as_f64().unwrap(), listener["wait"]["max"].as_f64().unwrap());
    eprintln!("waits {min:.4} to {max:.4} s, truth between {shortest:.4} and {longest:.4} s");
    assert!(shortest - 0.005 <= min && max <= longest + 0.005, "not in {shortest}..={longest}: {listener:#}");
}
