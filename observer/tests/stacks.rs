//! Loops that are stuck at the moment of the report: it names the functions they are stuck in.

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

/// Longer than it takes to ask for a report, so that the loop is stuck when that is written.
const BLOCK: Duration = Duration::from_secs(8);

/// The report of a server whose loop has been told to block and has been doing so for a second.
fn stuck(server: &Server, request: &str) -> Report {
    let observer = Observer::of(server.pid());
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
fn a_stuck_asyncio_loop_names_its_functions_asleep_or_busy() {
    for kind in ["sleep", "spin"] {
        let server = Server::asyncio();
        let request = format!("GET /{kind}/{} HTTP/1.1\r\nHost: test\r\n\r\n", BLOCK.as_millis());
        let report = stuck(&server, &request);
        let look = &report.reactor(server.pid())["current_stack"];
        assert_eq!(look["missing"], Value::Null, "{kind}: {look:#}");
        assert_eq!(functions(&report, server.pid())[..2], ["block", "serve"], "{kind}: {look:#}");
        assert!(look["frames"][0]["file"].as_str().unwrap().ends_with("asyncio_server.py"), "{look:#}");
    }
}

/// Native code, without a symbol of its own as distributions build it: at least the call it sleeps in has a name.
#[real_test(quiet, userspace)]
fn a_stuck_redis_names_the_call_it_sleeps_in() {
    let server = Server::redis();
    let report = stuck(&server, &format!("DEBUG SLEEP {}\r\n", BLOCK.as_secs()));
    let look = &report.reactor(server.pid())["current_stack"];
    let functions = functions(&report, server.pid());
    assert!(functions[0].contains("nanosleep"), "{look:#}");
    assert!(functions.len() > 3, "{look:#}");
}

/// A loop that waits is not stuck, and nobody looks into it.
#[real_test(quiet, userspace)]
fn a_loop_that_waits_is_left_alone() {
    let server = Server::asyncio();
    let observer = Observer::of(server.pid());
    server.block("none", 0);
    server.wait_until_idle();
    let report = observer.finish();
    assert_eq!(report.reactor(server.pid())["current_stack"], Value::Null);
}
