//! Servers of many kinds under load: whichever process accepts, observer's count equals the server's own.

use serde_json::Value;

use crate::support::{
    http, is_emulated, is_full,
    load::{observe, redis_benchmark, wrk},
    servers::{Server, children},
};

/// Number of connections of a test.
const CONNECTIONS: u64 = 23;

/// Makes each request use a new connection.
const CLOSE: &[&str] = &["Connection: close"];

/// Minimum number of connections on real hardware.
const MANY: u64 = 10_000;

#[track_caller]
fn assert_many(what: &str, connections: u64) {
    eprintln!("{what}: {connections} connections counted");
    assert!(connections > if is_emulated() { 10 } else { MANY });
}

/// Number of accepts for each bucket of `depth_on_accept`.
fn depths(listener: &Value) -> Vec<u64> {
    let counts = listener["depth_on_accept"]["counts"].as_array().unwrap();
    counts.iter().map(|count| count.as_u64().unwrap()).collect()
}

/// Each connection wakes all waiting workers. All but one fail to accept, and none of these attempts is counted.
#[real_test(userspace)]
fn failed_accepts_of_gunicorn_workers_are_not_counted() {
    /// Maximum number of rounds until a worker has lost a race, which depends on the scheduler.
    const ROUNDS: u64 = 20;
    let server = Server::gunicorn();
    let lost_before = server.races_lost();
    let mut rounds = 0;
    let (connections, report) = observe(&server, Server::connections, |port| {
        // At least one round: a worker may report late that it lost the race for the last connection before.
        while rounds == 0 || (rounds < ROUNDS && server.races_lost() == lost_before) {
            (0..CONNECTIONS).for_each(|_| drop(http::get(port, "/")));
            rounds += 1;
        }
    });
    let lost = server.races_lost() - lost_before;
    eprintln!("{lost} races lost for {connections} connections");
    assert_eq!(connections, rounds * CONNECTIONS);
    assert!(lost > 0, "nothing was put to the test");
    let listener = report.listener(server.port);
    let depths = depths(listener);
    assert_eq!(depths.iter().sum::<u64>(), connections, "{listener:#}");
    // The client waits for each response, so there is never more than one connection.
    assert_eq!(depths[0] + depths[1], connections, "{listener:#}");
    assert_eq!(listener["peak"], 1, "{listener:#}");
}

#[real_test(userspace)]
fn gunicorn_under_load_is_counted() {
    let server = Server::gunicorn();
    let load = |port| wrk(port, CLOSE, || server.connections() > MANY);
    let (connections, report) = observe(&server, Server::connections, load);
    eprintln!("{} races lost", server.races_lost());
    assert_many("gunicorn", connections);
    let listener = report.listener(server.port);
    assert_eq!(depths(listener).iter().sum::<u64>(), connections, "{listener:#}");
}

#[real_test(userspace)]
fn haproxy_under_load_is_counted() {
    let server = Server::haproxy();
    let load = |port| wrk(port, CLOSE, || server.haproxy_accepts() > MANY);
    let (connections, _) = observe(&server, Server::haproxy_accepts, load);
    assert_many("haproxy", connections);
}

/// The primary process accepts and hands connections to workers, so the listener belongs to it.
#[real_test(full, userspace)]
fn node_cluster_with_accepting_primary_is_counted() {
    let server = Server::node_cluster("rr");
    let load = |port| wrk(port, CLOSE, || server.connections() > MANY);
    let (connections, report) = observe(&server, Server::connections, load);
    assert_many("node cluster, first process accepts", connections);
    assert_eq!(report.target(server.pid())["listeners"].as_array().unwrap().len(), 1, "{:#}", report.0);
}

#[real_test(userspace)]
fn node_cluster_with_accepting_workers_is_counted() {
    let server = Server::node_cluster("none");
    let load = |port| wrk(port, CLOSE, || server.connections() > MANY);
    let (connections, _) = observe(&server, Server::connections, load);
    assert_many("node cluster, workers accept", connections);
}

/// One listener for each worker: their accepts add up to nginx's count, and each is listed with its worker.
#[real_test(userspace)]
fn nginx_with_a_listener_per_worker_is_counted() {
    let server = Server::nginx_reuseport(2);
    let load = |port| wrk(port, CLOSE, || server.nginx_accepts() > MANY);
    let (connections, report) = observe(&server, Server::nginx_accepts_of_all, load);
    assert_many("nginx, a listener for each worker", connections);
    for worker in children(server.pid()) {
        let listeners = report.target(worker)["listeners"].as_array().unwrap();
        assert_eq!(listeners.len(), 1, "{:#}", report.target(worker));
        assert!(listeners[0]["accepts"].as_u64().unwrap() > 0, "{:#}", report.target(worker));
    }
}

#[real_test(userspace)]
fn redis_without_keep_alive_is_counted() {
    let server = Server::redis();
    let commands = match (is_emulated(), is_full()) {
        (true, _) => 2_000,
        (_, false) => 20_000,
        (_, true) => 100_000,
    };
    let (connections, _) = observe(&server, Server::redis_accepts, |port| redis_benchmark(port, commands));
    assert_many("redis", connections);
    assert!(connections >= u64::from(commands));
}
