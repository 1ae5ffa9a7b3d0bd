//! Deferred tasks: each link is compared with the server's own log of which request the task belongs to.

use std::{
    io::{BufReader, Write as _},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::support::{
    deferred::{CLIENTS, DeferringServer, assert_links_correct, compare, jobs_for, send_request},
    example, http,
    observer::Observer,
    servers::Server,
    wait_for,
};

#[real_test(alone, links)]
fn asyncio_tasks_are_linked_to_their_requests() {
    let per_job = 15;
    let server = DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
    let observer = server.observe("asyncio");
    let jobs = jobs_for(10_000, per_job);
    server.load(jobs, per_job);
    let report = observer.finish();
    let records = server.records();
    let comparison = compare(&report, &[server.pid()], &records, false, |task| Some(task.to_owned()));
    assert_links_correct("asyncio", &report, &[server.pid()], &comparison, records.len());
}

/// tokio's tasks are distinguished only by the types of their futures, which programs without debug information do not
/// name. So only requests are compared.
fn assert_tokio_links(flavour: &str) {
    let per_job = 7;
    let mut command = Command::new(example("deferred_tokio"));
    command.arg(flavour);
    let server = DeferringServer::start(command);
    let observer = server.observe("tokio");
    server.load(jobs_for(10_000, per_job), per_job);
    let report = observer.finish();
    let records = server.records();
    let comparison = compare(&report, &[server.pid()], &records, false, |_| None);
    assert_links_correct(flavour, &report, &[server.pid()], &comparison, records.len());
}

#[real_test(alone, links)]
fn tokio_tasks_of_a_current_thread_runtime_are_linked() {
    assert_tokio_links("current");
}

#[real_test(alone, links)]
fn tokio_tasks_of_a_multi_thread_runtime_are_linked() {
    assert_tokio_links("multi");
}

#[real_test(alone, links)]
fn node_thread_pool_jobs_are_linked() {
    let per_job = 17;
    let server = DeferringServer::script("node", "deferred_node.js");
    let observer = server.observe("node");
    server.load(jobs_for(20_000, per_job), per_job);
    let report = observer.finish();
    // Callbacks of timers and promises are not linked.
    let records: Vec<_> = server.records().into_iter().filter(|record| !record.is_lost).collect();
    let comparison = compare(&report, &[server.pid()], &records, false, |_| None);
    assert_links_correct("node", &report, &[server.pid()], &comparison, records.len());
}

#[real_test]
fn server_without_a_known_runtime_has_no_hooks() {
    let server = Server::nginx(1);
    let observer = Observer::attach(server.pid());
    http::get_many(server.port, "/", 50);
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

#[real_test(alone, links)]
fn custom_library_is_hooked_with_flags() {
    let per_job = 4;
    let server = DeferringServer::start(Command::new(example("deferred_library")));
    let observer = server.observe_library();
    server.load(jobs_for(10_000, per_job), per_job);
    let report = observer.finish();
    let records = server.records();
    let comparison = compare(&report, &[server.pid()], &records, false, |_| None);
    assert_links_correct("a library", &report, &[server.pid()], &comparison, records.len());
    let kind = &report.target(server.pid())["deferred"][0];
    assert_eq!(kind["enqueued"], records.len(), "{kind:#}");
    assert_eq!((&kind["started"], &kind["finished"]), (&kind["enqueued"], &kind["enqueued"]), "{kind:#}");
}

#[real_test(contract, links)]
fn requests_on_connections_older_than_observer_are_linked() {
    let server = DeferringServer::start(Command::new(example("deferred_library")));
    let mut connection = BufReader::new(http::connect(server.port));
    send_request(&mut connection, "/job/before");
    let observer = server.observe_library();
    send_request(&mut connection, "/job/after");
    wait_for("the tasks", || (server.records().len() == 8).then_some(()));
    let report = observer.finish();
    let records: Vec<_> = server.records().into_iter().filter(|record| record.request == "after").collect();
    let comparison = compare(&report, &[server.pid()], &records, false, |_| None);
    assert_eq!((comparison.matched, comparison.wrong, comparison.unmatched), (4, 0, 0));
}

#[real_test(links)]
fn pipelined_requests_have_no_path() {
    let server = DeferringServer::start(Command::new(example("deferred_library")));
    let observer = server.observe_library();
    let mut connection = http::connect(server.port);
    // Two pipelined requests: the server, which reads only the first one, works for one of them.
    let two = "GET /job/1 HTTP/1.1\r\nHost: test\r\n\r\n".repeat(2);
    connection.write_all(two.as_bytes()).unwrap();
    wait_for("the tasks", || (server.records().len() >= 4).then_some(()));
    let report = observer.finish();
    let links = &report.target(server.pid())["deferred"][0]["links"];
    let links = links.as_array().unwrap();
    assert_eq!(links.len(), 4, "{links:?}");
    // Their time of arrival is known, but not which of them the tasks belong to.
    assert!(links.iter().all(|link| link["origin"]["path"].is_null()), "{links:?}");
}

#[real_test(alone, host_only("an emulated machine is too slow to reach the limit on overhead"))]
fn costly_profile_is_detached_unless_requested() {
    let server = DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
    let observer = Observer::attach(server.pid());
    // Far more than 25,000 traps per second, for longer than three seconds.
    let end = Instant::now() + Duration::from_secs(8);
    while Instant::now() < end {
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| http::get_many(server.port, "/job/1", 20));
            }
        });
    }
    let report = observer.finish();
    let missing = report.0["self"]["missing"].as_array().unwrap();
    let missing: Vec<_> = missing.iter().filter_map(|missing| missing["reason"].as_str()).collect();
    assert!(missing.iter().any(|reason| reason.contains("--profile asyncio")), "{missing:?}");
    assert_eq!(report.target(server.pid())["hooks"].as_array().unwrap().len(), 0);
    assert!(report.reactor(server.pid())["slices"].as_u64().unwrap() > 100);
}
