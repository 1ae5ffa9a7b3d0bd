//! Deferred work, link by link against what the servers themselves write down: which request each piece belongs to.

use std::{
    io::{BufReader, Write as _},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use crate::support::{
    deferred::{CLIENTS, Deferring, ask, assert_true, compare, jobs_for},
    example, http,
    observer::Observer,
    servers::Server,
    wait_for,
};

#[real_test(alone, links)]
fn asyncio_links_each_piece_to_its_request() {
    let of_job = 15;
    let server = Deferring::script("/usr/bin/python3", "deferred_asyncio.py");
    let observer = server.observe("asyncio");
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
    let observer = server.observe("tokio");
    server.load(jobs_for(10_000, of_job), of_job);
    let report = observer.finish();
    let pieces = server.pieces();
    let verdict = compare(&report, &[server.pid()], &pieces, false, |_| None);
    assert_true(flavour, &report, &[server.pid()], &verdict, pieces.len());
}

#[real_test(alone, links)]
fn tokio_links_each_task_of_one_thread() {
    tokio_links("current");
}

#[real_test(alone, links)]
fn tokio_links_each_task_of_several_threads() {
    tokio_links("multi");
}

#[real_test(alone, links)]
fn node_links_what_its_pool_of_threads_does() {
    let of_job = 17;
    let server = Deferring::script("node", "deferred_node.js");
    let observer = server.observe("node");
    server.load(jobs_for(20_000, of_job), of_job);
    let report = observer.finish();
    // What timers and promises handed on has no link to anything.
    let pieces: Vec<_> = server.pieces().into_iter().filter(|piece| !piece.is_lost).collect();
    let verdict = compare(&report, &[server.pid()], &pieces, false, |_| None);
    assert_true("node", &report, &[server.pid()], &verdict, pieces.len());
}

#[real_test]
fn a_server_without_a_known_runtime_is_left_alone() {
    let server = Server::nginx(1);
    let observer = Observer::of(server.pid());
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
fn a_library_of_ones_own_is_named_on_the_command_line() {
    let of_job = 4;
    let server = Deferring::start(Command::new(example("deferred_library")));
    let observer = server.observe_library();
    server.load(jobs_for(10_000, of_job), of_job);
    let report = observer.finish();
    let pieces = server.pieces();
    let verdict = compare(&report, &[server.pid()], &pieces, false, |_| None);
    assert_true("a library", &report, &[server.pid()], &verdict, pieces.len());
    let kind = &report.target(server.pid())["deferred"][0];
    assert_eq!(kind["enqueued"], pieces.len(), "{kind:#}");
    assert_eq!((&kind["started"], &kind["finished"]), (&kind["enqueued"], &kind["enqueued"]), "{kind:#}");
}

#[real_test(contract, links)]
fn connections_from_before_are_known_as_well() {
    let server = Deferring::start(Command::new(example("deferred_library")));
    let mut connection = BufReader::new(http::connect(server.port));
    ask(&mut connection, "/job/before");
    let observer = server.observe_library();
    ask(&mut connection, "/job/after");
    wait_for("the tasks", || (server.pieces().len() == 8).then_some(()));
    let report = observer.finish();
    let pieces: Vec<_> = server.pieces().into_iter().filter(|piece| piece.request == "after").collect();
    let verdict = compare(&report, &[server.pid()], &pieces, false, |_| None);
    assert_eq!((verdict.matched, verdict.wrong, verdict.unmatched), (4, 0, 0));
}

#[real_test(links)]
fn requests_that_overlap_are_nobodys() {
    let server = Deferring::start(Command::new(example("deferred_library")));
    let observer = server.observe_library();
    let mut connection = http::connect(server.port);
    // Two in one go: the server, which looks at the first alone, works for one of them.
    let two = "GET /job/1 HTTP/1.1\r\nHost: test\r\n\r\n".repeat(2);
    connection.write_all(two.as_bytes()).unwrap();
    wait_for("the tasks", || (server.pieces().len() >= 4).then_some(()));
    let report = observer.finish();
    let links = &report.target(server.pid())["deferred"][0]["links"];
    let links = links.as_array().unwrap();
    assert_eq!(links.len(), 4, "{links:?}");
    // It is known when they came, but not which it was.
    assert!(links.iter().all(|link| link["origin"]["path"].is_null()), "{links:?}");
}

#[real_test(alone, host_only("an emulated machine is too slow to cost so much"))]
fn what_costs_too_much_is_no_longer_followed_unless_it_is_asked_for() {
    let server = Deferring::script("/usr/bin/python3", "deferred_asyncio.py");
    let observer = Observer::of(server.pid());
    // Far more than 25,000 traps a second, for longer than three seconds.
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
