//! Event loops that are stuck when the report is written: it has the stack that they are stuck in.

use std::{
    io::Write as _,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{
    http,
    observer::{Observer, Report},
    servers::Server,
};

/// Longer than it takes to request a report, so that the loop is still stuck when it is written.
const BLOCK: Duration = Duration::from_secs(8);

/// Report of a server whose loop has been blocked for a second.
fn stuck(server: &Server, request: &str) -> Report {
    let observer = Observer::attach(server.pid());
    let mut client = http::connect(server.port);
    let began = Instant::now();
    client.write_all(request.as_bytes()).unwrap();
    thread::sleep(Duration::from_secs(1));
    let report = observer.finish();
    assert!(began.elapsed() < BLOCK, "this machine is too slow: the block was over before the report");
    let age = report.reactor(server.pid())["current_slice_seconds"].as_f64().expect("a slice in progress");
    assert!(age > 0.9 && age < BLOCK.as_secs_f64(), "{age}");
    report
}

fn functions(report: &Report, pid: u32) -> Vec<&str> {
    let frames = report.reactor(pid)["current_stack"]["frames"].as_array().expect("a stack");
    frames.iter().map(|frame| frame["function"].as_str().unwrap()).collect()
}

#[real_test(quiet, userspace)]
fn stack_of_a_stuck_asyncio_loop_is_reported() {
    for kind in ["sleep", "spin"] {
        let server = Server::asyncio();
        let request = format!("GET /{kind}/{} HTTP/1.1\r\nHost: test\r\n\r\n", BLOCK.as_millis());
        let report = stuck(&server, &request);
        let stack = &report.reactor(server.pid())["current_stack"];
        assert_eq!(stack["missing"], Value::Null, "{kind}: {stack:#}");
        assert_eq!(functions(&report, server.pid())[..2], ["block", "serve"], "{kind}: {stack:#}");
        assert!(stack["frames"][0]["file"].as_str().unwrap().ends_with("asyncio_server.py"), "{stack:#}");
    }
}

/// Native code, stripped as in distributions: at least the call that it sleeps in has a name.
#[real_test(quiet, userspace)]
fn stack_of_a_sleeping_redis_is_reported() {
    let server = Server::redis();
    let report = stuck(&server, &format!("DEBUG SLEEP {}\r\n", BLOCK.as_secs()));
    let stack = &report.reactor(server.pid())["current_stack"];
    let functions = functions(&report, server.pid());
    assert!(functions[0].contains("nanosleep"), "{stack:#}");
    assert!(functions.len() > 3, "{stack:#}");
}

/// A waiting loop is not stuck, and its stack is not read.
#[real_test(quiet, userspace)]
fn waiting_loop_has_no_stack() {
    let server = Server::asyncio();
    let observer = Observer::attach(server.pid());
    server.block("none", 0);
    server.wait_until_idle();
    let report = observer.finish();
    assert_eq!(report.reactor(server.pid())["current_stack"], Value::Null);
}
