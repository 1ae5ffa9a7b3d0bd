//! Compares lag with probers inside the process, in the same run: both must agree for every workload and runtime. The
//! results of probers that re-arm their timer are printed as well; docs/accuracy.md explains why they differ.

use std::{
    io::{Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use serde_json::Value;

use crate::support::{Process, is_emulated, observer::Observer, schedstat};

/// Interval of the timers of the prober, in seconds.
const TIMER_INTERVAL: f64 = 0.003;

/// Maximum difference: a share, or this number of seconds if that is more. The loops round timers to milliseconds,
/// which only a prober inside can measure. An emulated machine takes ten times as long for everything.
fn tolerance() -> (f64, f64) {
    if is_emulated() { (0.25, 0.015) } else { (0.10, 0.0015) }
}

/// Share of its time in the run queue above which a run counts as disturbed, and the number of runs in that case.
const CONTENTION: f64 = 0.001;
const RUNS: u32 = 3;

/// An event loop with a prober: its runtime and script.
struct Runtime {
    name: &'static str,
    program: &'static str,
    script: &'static str,
}

const ASYNCIO: Runtime =
    Runtime { name: "asyncio", program: "/usr/bin/python3", script: "asyncio_prober.py" };
const NODE: Runtime = Runtime { name: "Node", program: "node", script: "node_prober.js" };
const RUBY: Runtime = Runtime { name: "Ruby", program: "/usr/bin/ruby", script: "ruby_prober.rb" };

/// Values to compare, and their percentiles.
const VALUES: [(&str, usize); 4] = [("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)];

/// Delays that a prober measured, sorted.
struct Delays(Vec<f64>);

impl Delays {
    fn of(measured: &Value) -> Self {
        let mut delays: Vec<f64> = serde_json::from_value(measured.clone()).unwrap();
        delays.sort_by(f64::total_cmp);
        Self(delays)
    }

    fn at(&self, percent: usize) -> f64 {
        self.0[(self.0.len() * percent / 100).min(self.0.len() - 1)]
    }
}

/// Results of one run of a workload.
struct Run {
    /// Name of each value, the value measured inside, and the one measured outside.
    rows: [(&'static str, f64, f64); VALUES.len()],
    /// Share of the run that the loop was in the run queue, as the scheduler counts it.
    contention: f64,
}

impl Run {
    /// Runs a workload while observer observes it, and prints the results of both.
    fn of(runtime: &Runtime, workload: &str) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers").join(runtime.script);
        let child = Command::new(runtime.program)
            .arg(script)
            .args([workload, if is_emulated() { "5" } else { "0.5" }])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", runtime.program));
        let mut prober = Process(child);
        let observer = Observer::attach(prober.pid());
        let (began, (_, delay_before)) = (Instant::now(), schedstat(prober.pid()));
        prober.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let mut answer = String::new();
        prober.0.stdout.take().unwrap().read_to_string(&mut answer).unwrap();
        // It has exited, but has not been reaped.
        let (_, delay) = schedstat(prober.pid());
        let contention = (delay - delay_before) / began.elapsed().as_secs_f64();
        prober.0.wait().unwrap();
        let measured: Value = serde_json::from_str(&answer).unwrap();
        let (truth, sleeper) = (Delays::of(&measured["timers"]), Delays::of(&measured["sleeper"]));
        assert!(truth.0.len() > 1900, "only {} timers were met", truth.0.len());
        // observer ends because its only target has exited.
        let report = observer.report();
        report.assert_complete();
        let lag = &report.reactor(prober.pid())["lag"];

        let rows = VALUES.map(|(value, percent)| {
            let (outside, inside) = (lag[value].as_f64().unwrap(), truth.at(percent));
            let monitor = measured["monitor"][value].as_f64();
            eprintln!(
                "| {} | {workload} | {value} | {:.2} ms | {:.2} ms | {:.2} ms | {} |",
                runtime.name,
                outside * 1e3,
                inside * 1e3,
                sleeper.at(percent) * 1e3,
                monitor.map_or(String::new(), |seconds| format!("{:.2} ms", seconds * 1e3))
            );
            (value, inside, outside)
        });
        Self { rows, contention }
    }

    /// The first value on which the two do not agree, with a description; `None` if they agree on all.
    fn disagreement(&self) -> Option<(&'static str, String)> {
        let (share, slack) = tolerance();
        let agrees = |(value, inside, outside): (&str, f64, f64)| {
            let apart = slack.max(share * inside);
            // The prober misses part of the longest slice if none of its timers is due at the beginning. If one is, it
            // may be late by the rounding of the loop as well.
            let (unmet, rounded) = if value == "max" { (2.0 * TIMER_INTERVAL, 0.001) } else { (0.0, 0.0) };
            (outside - apart - unmet..=outside + apart + rounded).contains(&inside)
        };
        let (value, inside, outside) = self.rows.into_iter().find(|&row| !agrees(row))?;
        Some((value, format!("{value} is {inside} s inside, {outside} s outside")))
    }
}

/// Asserts that the two agree. A disturbed run is repeated, because a process that loses its CPU while it measures a
/// delay measures a delay that is too long. For the longest of some thousand delays, losing it once is enough.
fn assert_lag(runtime: &Runtime, workload: &str) {
    for run in 1.. {
        let results = Run::of(runtime, workload);
        let Some((value, disagreement)) = results.disagreement() else { return };
        let waited = format!("the loop waited for a CPU for {:.1} % of the run", results.contention * 100.0);
        let is_final = run == RUNS || (results.contention < CONTENTION && value != "max");
        assert!(!is_final, "{}, {workload}: {disagreement}; {waited}", runtime.name);
        eprintln!("again, for {waited}, and {disagreement}");
    }
}

#[real_test(quiet, userspace)]
fn lag_of_an_idle_asyncio_loop() {
    assert_lag(&ASYNCIO, "idle");
}

#[real_test(alone, userspace)]
fn lag_of_an_asyncio_loop_with_short_slices() {
    assert_lag(&ASYNCIO, "short");
}

#[real_test(quiet, userspace)]
fn lag_of_an_asyncio_loop_with_rare_blocks() {
    assert_lag(&ASYNCIO, "rare");
}

#[real_test(alone, userspace)]
fn lag_of_a_saturated_asyncio_loop() {
    assert_lag(&ASYNCIO, "saturated");
}

#[real_test(full, quiet, userspace, host_only("emulated machines run this workload with asyncio only"))]
fn lag_of_an_idle_node_loop() {
    assert_lag(&NODE, "idle");
}

#[real_test(full, alone, userspace, host_only("emulated machines run this workload with asyncio only"))]
fn lag_of_a_node_loop_with_short_slices() {
    assert_lag(&NODE, "short");
}

#[real_test(quiet, userspace)]
fn lag_of_a_node_loop_with_rare_blocks() {
    assert_lag(&NODE, "rare");
}

#[real_test(full, alone, userspace, host_only("emulated machines run this workload with asyncio only"))]
fn lag_of_a_saturated_node_loop() {
    assert_lag(&NODE, "saturated");
}

#[real_test(full, quiet, userspace, host_only("emulated machines run this workload with asyncio only"))]
fn lag_of_an_idle_ruby_loop() {
    assert_lag(&RUBY, "idle");
}

#[real_test(full, alone, userspace, host_only("emulated machines run this workload with asyncio only"))]
fn lag_of_a_ruby_loop_with_short_slices() {
    assert_lag(&RUBY, "short");
}

#[real_test(quiet, userspace)]
fn lag_of_a_ruby_loop_with_rare_blocks() {
    assert_lag(&RUBY, "rare");
}

#[real_test(full, alone, userspace, host_only("emulated machines run this workload with asyncio only"))]
fn lag_of_a_saturated_ruby_loop() {
    assert_lag(&RUBY, "saturated");
}
