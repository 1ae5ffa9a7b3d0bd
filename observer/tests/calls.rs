//! The calls that event loops wait with: each is observed only if it is enabled, and counted exactly.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

use crate::support::{Process, acceptor::Acceptor, observer::Observer};

/// Number of waits of a test.
const WAITS: u32 = 23;

/// Event loops of a program that waits 23 times with this selector, as reported by observer with these arguments.
fn reactors(selector: &str, arguments: &[&str]) -> Vec<Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/selector_loop.py");
    let child =
        Command::new("/usr/bin/python3").arg(script).arg(selector).stdin(Stdio::piped()).spawn().unwrap();
    let mut program = Process(child);
    let pid = program.pid().to_string();
    let observer = Observer::start(&[&["--no-listen", "--pid", &pid], arguments].concat());
    program.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
    program.0.wait().unwrap();
    // observer ends because its only target has exited.
    let report = observer.report();
    report.assert_complete();
    report.target(program.pid())["reactors"].as_array().unwrap().clone()
}

#[track_caller]
fn assert_one_loop(reactors: &[Value]) {
    assert_eq!(reactors.len(), 1, "{reactors:#?}");
    assert_eq!(reactors[0]["waits"], WAITS, "{:#}", reactors[0]);
    assert_eq!(reactors[0]["slices"], WAITS - 1, "{:#}", reactors[0]);
}

#[real_test]
fn epoll_is_observed_by_default() {
    assert_one_loop(&reactors("EpollSelector", &[]));
}

#[real_test]
fn poll_is_observed_on_request() {
    assert_one_loop(&reactors("PollSelector", &["--reactor-calls", "poll"]));
    assert!(reactors("PollSelector", &[]).is_empty());
}

#[real_test]
fn select_is_observed_on_request() {
    assert_one_loop(&reactors("SelectSelector", &["--reactor-calls", "epoll,select"]));
    assert!(reactors("SelectSelector", &["--reactor-calls", "epoll,poll"]).is_empty());
}

/// Each connection takes one call that only submits, and one that waits for the completion.
#[real_test(contract)]
fn io_uring_counts_only_calls_that_wait() {
    let mut acceptor = Acceptor::ring("v4", "single", 128);
    let observer = Observer::attach(acceptor.pid());
    acceptor.request(&format!("connect {WAITS}"));
    acceptor.request(&format!("accept {WAITS}"));
    let report = observer.finish();
    report.assert_complete();
    assert_one_loop(report.target(acceptor.pid())["reactors"].as_array().unwrap());
}
