//! Load on real servers, and the central check: observer must count the same accepts as the server.

use std::process::{Command, Stdio};

use serde_json::Value;

use super::{
    is_emulated, is_full,
    observer::{Observer, Report},
    servers::Server,
};

/// Runs a load and compares observer's accepts with the server's own count of connections. Every connection that
/// arrived must have been accepted by then. Returns the count and the report.
#[track_caller]
pub(crate) fn observe(
    server: &Server,
    own_count: impl Fn(&Server) -> u64,
    load: impl FnOnce(u16),
) -> (u64, Report) {
    let before = own_count(server);
    let observer = Observer::attach(server.pid());
    load(server.port);
    let connections = own_count(server) - before;
    assert_eq!(observer.queued_connections(), 0, "connections remembered though none waits");
    let report = observer.finish();
    report.assert_complete();
    let listeners = report.listeners(&format!("127.0.0.1:{}", server.port));
    let sum = |field: fn(&Value) -> &Value| -> u64 {
        listeners.iter().map(|listener| field(listener).as_u64().unwrap()).sum()
    };
    assert_eq!(sum(|l| &l["accepts"]), connections, "{listeners:#?}");
    assert_eq!(sum(|l| &l["arrivals"]), connections, "{listeners:#?}");
    assert_eq!(sum(|l| &l["wait"]["count"]), connections, "{listeners:#?}");
    assert_eq!(sum(|l| &l["accepts_unknown_wait"]), 0, "{listeners:#?}");
    assert_eq!(sum(|l| &l["depth"]), 0, "{listeners:#?}");
    (connections, report)
}

/// Sends HTTP requests from 32 clients, in runs of a few seconds until `is_enough`, but only one run on an emulated
/// machine.
pub(crate) fn wrk(port: u16, headers: &[&str], is_enough: impl Fn() -> bool) {
    let seconds = if is_full() && !is_emulated() { "5" } else { "2" };
    for _ in 0..12 {
        let status = Command::new("wrk")
            .args(["-t", "2", "-c", "32", "-d", seconds])
            .args(headers.iter().flat_map(|header| ["-H", header]))
            .arg(format!("http://127.0.0.1:{port}/"))
            .stdout(Stdio::null())
            .status()
            .expect("wrk is installed");
        assert!(status.success());
        if is_emulated() || is_enough() {
            return;
        }
    }
    panic!("not enough connections in a minute");
}

/// Sends commands to a redis server from 50 clients, each command on a new connection.
pub(crate) fn redis_benchmark(port: u16, commands: u32) {
    let status = Command::new("redis-benchmark")
        .args(["-p", &port.to_string(), "-n", &commands.to_string()])
        .args(["-k", "0", "-c", "50", "-t", "ping_mbulk", "-q"])
        .stdout(Stdio::null())
        .status()
        .expect("redis-benchmark is installed");
    assert!(status.success());
}
