//! Deferred work, link by link against what the servers themselves write down: which request each piece belongs to.

use std::process::Command;

use serde_json::json;

use crate::support::{
    deferred::{Deferring, assert_true, compare, jobs_for},
    example, http,
    observer::Observer,
    servers::Server,
};

#[test]
fn asyncio_links_each_piece_to_its_request() {
    let of_job = 15;
    let server = Deferring::script("/usr/bin/python3", "deferred_asyncio.py");
    let observer = Observer::of(server.pid());
    let jobs = jobs_for(10_000, of_job);
    server.load(jobs, of_job);
    let report = observer.finish();
    let pieces = server.pieces();
    let verdict = compare(&report, &[server.pid()], &pieces, false, |task| Some(task.to_owned()));
    assert_true("asyncio", &report, &[server.pid()], &verdict, pieces.len());
}

/// Of tokio only the types of futures tell tasks apart, which programs without debug information do not name: requests
/// are compared.
fn tokio_links(flavour: &str) {
    let of_job = 7;
    let mut command = Command::new(example("deferred_tokio"));
    command.arg(flavour);
    let server = Deferring::start(command);
    let observer = Observer::of(server.pid());
    server.load(jobs_for(10_000, of_job), of_job);
    let report = observer.finish();
    let pieces = server.pieces();
    let verdict = compare(&report, &[server.pid()], &pieces, false, |_| None);
    assert_true(flavour, &report, &[server.pid()], &verdict, pieces.len());
}

#[test]
fn tokio_links_each_task_of_one_thread() {
    tokio_links("current");
}

#[test]
fn tokio_links_each_task_of_several_threads() {
    tokio_links("multi");
}

#[test]
fn node_links_what_its_pool_of_threads_does() {
    let of_job = 17;
    let server = Deferring::script("node", "deferred_node.js");
    let observer = Observer::of(server.pid());
    server.load(jobs_for(20_000, of_job), of_job);
    let report = observer.finish();
    // What timers and promises handed on has no link to anything.
    let pieces: Vec<_> = server.pieces().into_iter().filter(|piece| !piece.is_lost).collect();
    let verdict = compare(&report, &[server.pid()], &pieces, false, |_| None);
    assert_true("node", &report, &[server.pid()], &verdict, pieces.len());
}

#[test]
fn a_server_without_a_known_runtime_is_left_alone() {
    let server = Server::nginx(1);
    let observer = Observer::of(server.pid());
    http::get_many(server.port, "/", 1000);
    let report = observer.finish();
    report.assert_complete();
    let missing = report.0["self"]["missing"].as_array().unwrap();
    assert!(
        !missing.iter().any(|missing| missing["source"].as_str().unwrap().contains("deferred")),
        "{missing:?}"
    );
    for target in report.0["targets"].as_array().unwrap() {
        assert_eq!(target["hooks"], json!([]), "{target:#}");
        assert_eq!(target["deferred"], json!([]), "{target:#}");
    }
}
