//! Lag against probers inside the process, in the same run: both must say the same of every workload, whatever runs
//! the loop. What probers say that arm their timer again is printed beside them; docs/accuracy.md tells why it differs.

use std::{
    io::{Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use serde_json::Value;

use crate::support::{Process, is_emulated, observer::Observer, schedstat};

/// In each such stretch of seconds one timer of the prober inside falls due.
const STRETCH: f64 = 0.003;

/// How far the two may be apart: a share, or so many seconds if that is more. The loops let their timers fall due in
/// whole milliseconds, which only a prober inside can see; an emulated machine takes ten times as long for everything.
fn tolerance() -> (f64, f64) {
    if is_emulated() { (0.25, 0.015) } else { (0.10, 0.0015) }
}

/// From which share of its time on that a loop waits for a CPU its run was disturbed; and how many runs there are then.
const CONTENTION: f64 = 0.001;
const RUNS: u32 = 3;

/// A loop with a prober in it: what runs it, and the script.
struct Runtime {
    name: &'static str,
    program: &'static str,
    script: &'static str,
}

const ASYNCIO: Runtime =
    Runtime { name: "asyncio", program: "/usr/bin/python3", script: "asyncio_prober.py" };
const NODE: Runtime = Runtime { name: "Node", program: "node", script: "node_prober.js" };
const RUBY: Runtime = Runtime { name: "Ruby", program: "/usr/bin/ruby", script: "ruby_prober.rb" };

/// Figures that are compared, with the part of all instants that they bound, in percent.
const FIGURES: [(&str, usize); 4] = [("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)];

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

/// One workload, seen from both sides.
struct Run {
    /// Each of the figures, inside and outside.
    rows: [(&'static str, f64, f64); FIGURES.len()],
    /// Part of the run that the loop waited for a CPU, as the scheduler counts it.
    contention: f64,
}

impl Run {
    /// Lets a loop work while observer looks, and prints what each says.
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
        let observer = Observer::of(prober.pid());
        let (began, (_, delay_before)) = (Instant::now(), schedstat(prober.pid()));
        prober.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let mut answer = String::new();
        prober.0.stdout.take().unwrap().read_to_string(&mut answer).unwrap();
        // It has exited, but is not reaped yet.
        let (_, delay) = schedstat(prober.pid());
        let contention = (delay - delay_before) / began.elapsed().as_secs_f64();
        prober.0.wait().unwrap();
        let measured: Value = serde_json::from_str(&answer).unwrap();
        let (truth, sleeper) = (Delays::of(&measured["timers"]), Delays::of(&measured["sleeper"]));
        assert!(truth.0.len() > 1900, "only {} timers were met", truth.0.len());
        // It ends by itself, for its only target has.
        let report = observer.report();
        report.assert_complete();
        let lag = &report.reactor(prober.pid())["lag"];

        let rows = FIGURES.map(|(figure, percent)| {
            let (outside, inside) = (lag[figure].as_f64().unwrap(), truth.at(percent));
            let monitor = measured["monitor"][figure].as_f64();
            eprintln!(
                "| {} | {workload} | {figure} | {:.2} ms | {:.2} ms | {:.2} ms | {} |",
                runtime.name,
                outside * 1e3,
                inside * 1e3,
                sleeper.at(percent) * 1e3,
                monitor.map_or(String::new(), |seconds| format!("{:.2} ms", seconds * 1e3))
            );
            (figure, inside, outside)
        });
        Self { rows, contention }
    }

    /// On which figure the two do not agree, if there is any, and what they say.
    fn dispute(&self) -> Option<(&'static str, String)> {
        let (share, slack) = tolerance();
        let agrees = |(figure, inside, outside): (&str, f64, f64)| {
            let apart = slack.max(share * inside);
            // Whoever has no timer due when the longest slice begins does not meet all of it; whoever has one may be
            // late by the loop's own rounding as well.
            let (unmet, rounded) = if figure == "max" { (2.0 * STRETCH, 0.001) } else { (0.0, 0.0) };
            (outside - apart - unmet..=outside + apart + rounded).contains(&inside)
        };
        let (figure, inside, outside) = self.rows.into_iter().find(|&row| !agrees(row))?;
        Some((figure, format!("{figure} is {inside} s inside, {outside} s outside")))
    }
}

/// Asserts that the two agree, if not in the first run then in a further one where a run was disturbed: what is kept
/// from its CPU in the middle of telling how late it is, is that late as well. For the longest delay of some thousand
/// that once is enough, as when somebody else has the whole machine.
fn assert_lag(runtime: &Runtime, workload: &str) {
    for run in 1.. {
        let figures = Run::of(runtime, workload);
        let Some((figure, dispute)) = figures.dispute() else { return };
        let waited = format!("the loop waited for a CPU for {:.1} % of the run", figures.contention * 100.0);
        let is_final = run == RUNS || (figures.contention < CONTENTION && figure != "max");
        assert!(!is_final, "{}, {workload}: {dispute}; {waited}", runtime.name);
        eprintln!("again, for {waited}, and {dispute}");
    }
}

#[real_test(quiet, userspace)]
fn an_idle_asyncio_loop() {
    assert_lag(&ASYNCIO, "idle");
}

#[real_test(alone, userspace)]
fn an_asyncio_loop_of_short_slices() {
    assert_lag(&ASYNCIO, "short");
}

#[real_test(quiet, userspace)]
fn an_asyncio_loop_with_rare_blocks() {
    assert_lag(&ASYNCIO, "rare");
}

#[real_test(alone, userspace)]
fn a_saturated_asyncio_loop() {
    assert_lag(&ASYNCIO, "saturated");
}

#[real_test(full, quiet, userspace, host_only("an emulated machine has asyncio under this workload alone"))]
fn an_idle_node_loop() {
    assert_lag(&NODE, "idle");
}

#[real_test(full, alone, userspace, host_only("an emulated machine has asyncio under this workload alone"))]
fn a_node_loop_of_short_slices() {
    assert_lag(&NODE, "short");
}

#[real_test(quiet, userspace)]
fn a_node_loop_with_rare_blocks() {
    assert_lag(&NODE, "rare");
}

#[real_test(full, alone, userspace, host_only("an emulated machine has asyncio under this workload alone"))]
fn a_saturated_node_loop() {
    assert_lag(&NODE, "saturated");
}

#[real_test(full, quiet, userspace, host_only("an emulated machine has asyncio under this workload alone"))]
fn an_idle_ruby_loop() {
    assert_lag(&RUBY, "idle");
}

#[real_test(full, alone, userspace, host_only("an emulated machine has asyncio under this workload alone"))]
fn a_ruby_loop_of_short_slices() {
    assert_lag(&RUBY, "short");
}

#[real_test(quiet, userspace)]
fn a_ruby_loop_with_rare_blocks() {
    assert_lag(&RUBY, "rare");
}

#[real_test(full, alone, userspace, host_only("an emulated machine has asyncio under this workload alone"))]
fn a_saturated_ruby_loop() {
    assert_lag(&RUBY, "saturated");
}
