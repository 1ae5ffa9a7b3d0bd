//! Lag against a prober inside the process, in the same run: both must say the same of every workload.

use std::{
    io::{Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
};

use crate::support::{Process, is_emulated, observer::Observer};

/// In each such stretch of seconds one timer of the prober inside falls due.
const STRETCH: f64 = 0.003;

/// How far the two may be apart: a share, or so many seconds if that is more. asyncio rounds its waits up to whole
/// milliseconds, which only a prober inside can see; an emulated machine takes ten times as long for everything.
fn tolerance() -> (f64, f64) {
    if is_emulated() { (0.25, 0.015) } else { (0.10, 0.0015) }
}

fn assert_lag(workload: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/asyncio_prober.py");
    let child = Command::new("/usr/bin/python3")
        .arg(script)
        .arg(workload)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut prober = Process(child);
    let observer = Observer::of(prober.pid());
    prober.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let mut answer = String::new();
    prober.0.stdout.take().unwrap().read_to_string(&mut answer).unwrap();
    let mut truth: Vec<f64> = serde_json::from_str(&answer).unwrap();
    truth.sort_by(f64::total_cmp);
    assert!(truth.len() > 1900, "only {} timers were met", truth.len());
    prober.0.wait().unwrap();
    // It ends by itself, for its only target has.
    let report = observer.report();
    report.assert_complete();
    let lag = &report.reactor(prober.pid())["lag"];

    let (share, slack) = tolerance();
    let at = |percent: usize| truth[(truth.len() * percent / 100).min(truth.len() - 1)];
    let rows = [("p50", at(50)), ("p90", at(90)), ("p99", at(99)), ("max", at(100))].map(|(name, inside)| {
        let outside = lag[name].as_f64().unwrap();
        eprintln!("| {workload} | {name} | {:.2} ms | {:.2} ms |", outside * 1e3, inside * 1e3);
        (name, inside, outside)
    });
    for (name, inside, outside) in rows {
        let apart = slack.max(share * inside);
        // Whoever has no timer due when the longest slice begins does not meet all of it.
        let unmet = if name == "max" { 2.0 * STRETCH } else { 0.0 };
        assert!(
            (outside - apart - unmet..=outside + apart).contains(&inside),
            "{workload}: {name} is {inside} s inside, {outside} s outside"
        );
    }
}

#[test]
fn an_idle_loop() {
    assert_lag("idle");
}

#[test]
fn a_loop_of_short_slices() {
    assert_lag("short");
}

#[test]
fn a_loop_with_rare_blocks() {
    assert_lag("rare");
}

#[test]
fn a_saturated_loop() {
    assert_lag("saturated");
}
