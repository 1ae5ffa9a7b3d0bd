//! The reactor probe against real event loops: every block seen once, and its time put where it belongs.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use crate::support::{
    Process, assert_close, is_emulated,
    observer::{Observer, count_between},
    schedstat,
    servers::Server,
    stolen,
    told::Told,
};
use serde_json::Value;

/// Known operations.
const BLOCKS: u64 = 23;

/// Length of a block in milliseconds: longer than what else may take an emulated processor away.
fn block_ms() -> u32 {
    if is_emulated() { 400 } else { 100 }
}

/// Bounds of the scraped buckets that hold such a block, and what a busy machine adds to that.
fn bucket() -> (f64, f64) {
    const LEAST: f64 = 0.067_108_864;
    if is_emulated() { (4.0 * LEAST, 32.0 * LEAST) } else { (LEAST, 8.0 * LEAST) }
}

/// Blocks a server's loop and returns its reactor's figures with what the server measured: wall and CPU seconds.
fn block(server: &Server, kind: &str, times: u64) -> (Value, f64, f64) {
    let observer = Observer::of(server.pid());
    let (mut wall, mut cpu) = (0.0, 0.0);
    for _ in 0..times {
        let measured = server.block(kind, block_ms());
        wall += measured["wall"].as_f64().unwrap();
        cpu += measured["cpu"].as_f64().unwrap();
    }
    // Whoever answers this has ended the slice that the last block was in.
    server.block("none", 0);
    let report = observer.finish();
    report.assert_complete();
    (report.reactor(server.pid()).clone(), wall, cpu)
}

fn seconds(reactor: &Value, state: &str) -> f64 {
    let part = &reactor["split_seconds"][state];
    let blocks = |part: &Value| part.as_object().unwrap().values().map(|block| block.as_f64().unwrap()).sum();
    part.as_f64().unwrap_or_else(|| blocks(part))
}

/// It was blocked in this for as long as it had asked to sleep, less what passes before it does, and not longer than that
/// took by its own clock, which counts waiting for a CPU afterwards as well. No sleep was told as something without a name.
#[track_caller]
fn assert_slept(reactor: &Value, wall: f64, cause: &str) {
    let sleep = Duration::from_millis(u64::from(block_ms())).as_secs_f64();
    let asked = Duration::from_millis(u64::from(block_ms()) * BLOCKS).as_secs_f64();
    let [slept, other] = [cause, "other"].map(|cause| &reactor["split_seconds"]["blocked"][cause]);
    let (slept, other) = (slept.as_f64().unwrap(), other.as_f64().unwrap());
    assert!((0.95 * asked..=wall + 0.01).contains(&slept), "{slept} s, {asked} asked for, {wall} taken");
    assert!(other < 0.5 * sleep, "{other} s: {reactor:#}");
}

/// Cost of the requests around the blocks, which is real work of the same loop.
fn slack(times: u64) -> f64 {
    let each = if is_emulated() { 0.050 } else { 0.002 };
    each * f64::from(u32::try_from(times).unwrap())
}

#[real_test(quiet, contract)]
fn asyncio_23_sleeps_are_23_slices_and_blocked() {
    let server = Server::asyncio();
    // So that files which its first answer needs are not looked for in the first block.
    server.block("sleep", 1);
    let (computed_before, _) = schedstat(server.pid());
    let stolen_before = stolen();
    let (reactor, wall, _) = block(&server, "sleep", BLOCKS);
    let computed = schedstat(server.pid()).0 - computed_before;
    assert_eq!(count_between(&reactor["slice"], bucket().0, bucket().1), BLOCKS, "{reactor:#}");
    assert_slept(&reactor, wall, "sleep");
    assert_eq!(reactor["split_seconds"]["blocked"]["other"], 0.0, "{reactor:#}");
    // The scheduler's own account, which has the computing around the waits as well.
    // What a hypervisor takes comes on top; it is known to a tick of 10 ms.
    let disturbed = 0.010 + stolen() - stolen_before;
    assert!(seconds(&reactor, "cpu") < 1.05 * computed + disturbed, "{computed} s computed: {reactor:#}");
}

#[real_test(alone)]
fn asyncio_23_spins_are_23_slices_on_a_cpu() {
    let server = Server::asyncio();
    let (reactor, _, cpu) = block(&server, "spin", BLOCKS);
    let slices = &reactor["slice"];
    // Computing 100 ms takes longer when somebody else computes, too.
    assert_eq!(count_between(slices, bucket().0, f64::MAX), BLOCKS, "{reactor:#}");
    assert_close("on a CPU", seconds(&reactor, "cpu"), cpu, 0.05, slack(BLOCKS));
    assert!(seconds(&reactor, "blocked") < 0.05 * cpu, "{reactor:#}");
}

#[real_test(quiet)]
fn node_23_sleeps_are_23_slices_and_blocked() {
    let server = Server::node();
    // So that compiling the handler is not part of the first block.
    server.block("sleep", 1);
    let (reactor, wall, _) = block(&server, "sleep", BLOCKS);
    let long = count_between(&reactor["slice"], bucket().0, f64::MAX);
    // Emulated, compiling a function can take as long.
    assert!(long == BLOCKS || (is_emulated() && long > BLOCKS), "{reactor:#}");
    // What its threads do beside each other, as they collect garbage, is not all known.
    assert_slept(&reactor, wall, "lock");
}

/// Somebody else who computes on the first CPU.
fn hog() -> Process {
    let mut hog = Command::new("taskset");
    hog.args(["-c", "0", "/usr/bin/python3", "-c", "while True: pass"]).stdin(Stdio::null());
    Process(hog.spawn().unwrap())
}

/// A neighbour that computes on the same CPU is told apart from the server's own work.
#[real_test(alone)]
fn a_hog_on_the_same_cpu_shows_as_time_waiting_for_a_cpu() {
    let _hog = hog();
    let server = Server::asyncio_on_cpu(0);
    let (_, delay_before) = schedstat(server.pid());
    let (reactor, wall, cpu) = block(&server, "spin", BLOCKS);
    let delay = schedstat(server.pid()).1 - delay_before;
    let waited = wall - cpu;
    assert!(waited > 0.25 * wall, "the hog got in nobody's way: {waited} of {wall} s");
    assert_close("waiting for a CPU", seconds(&reactor, "runqueue"), waited, 0.05, slack(BLOCKS));
    assert_close("on a CPU", seconds(&reactor, "cpu"), cpu, 0.05, slack(BLOCKS));
    // The scheduler's own account of all delays, those after a wake-up included.
    let delays = seconds(&reactor, "runqueue") + reactor["wakeup"]["sum"].as_f64().unwrap();
    assert_close("delays as the scheduler counts them", delays, delay, 0.05, slack(BLOCKS));
}

/// Every wait and every slice is counted once, by the loop's own count.
#[real_test(contract)]
fn waits_and_slices_are_counted_exactly() {
    let server = Server::asyncio();
    server.wait_until_idle();
    let before = server.waits();
    let observer = Observer::of(server.pid());
    for _ in 0..BLOCKS {
        server.block("none", 0);
    }
    server.wait_until_idle();
    let waits = server.waits() - before;
    let report = observer.finish();
    let reactor = report.reactor(server.pid());
    assert_eq!(reactor["waits"], waits, "{reactor:#}");
    // Idle again, the loop has ended every slice that it began.
    assert_eq!(reactor["slices"], waits, "{reactor:#}");
    assert!(waits >= BLOCKS);
}

/// A wait is time off a CPU: all that a loop has of one is in its slices, however short, by the scheduler's own account.
#[real_test(alone)]
fn all_time_on_a_cpu_is_in_slices() {
    // Both on one CPU, so that it never sleeps: the scheduler counts what it takes a CPU to wake up as its thread's.
    const LOOP: &str = "
import os, select, sys
asks, answers = os.pipe(), os.pipe()
if os.fork() == 0:
    os.close(asks[1])
    while os.read(asks[0], 1): os.write(answers[1], b'.')
    os._exit(0)
events = select.epoll()
events.register(sys.stdin, select.EPOLLIN)
events.register(answers[0], select.EPOLLIN)
while events.poll() and sys.stdin.readline():
    for _ in range(2000):
        os.write(asks[1], b'.')
        events.poll()
        os.read(answers[0], 1)
    print('done', flush=True)
";
    let mut program = Command::new("taskset");
    program.args(["-c", "0", "/usr/bin/python3", "-c", LOOP]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut program = Process(program.spawn().unwrap());
    let (pid, mut asked) = (program.pid(), program.0.stdin.take().unwrap());
    let mut told = BufReader::new(program.0.stdout.take().unwrap());
    let mut ask = || {
        asked.write_all(b"go\n").unwrap();
        told.read_line(&mut String::new()).unwrap();
    };
    ask();
    let mut round = || {
        let observer = Observer::of(pid);
        let (before, _) = schedstat(pid);
        ask();
        let cpu = schedstat(pid).0 - before;
        let report = observer.finish();
        let seen = seconds(report.reactor(pid), "cpu");
        eprintln!("on a CPU: {seen} s where {cpu} s is true");
        seen / cpu
    };
    // What interrupts and a hypervisor take is on a CPU as seen from outside, and not as the scheduler counts it: it comes on top,
    // and not in every round.
    let ratios: Vec<f64> = (0..5).map(|_| round()).collect();
    assert!(ratios.iter().all(|ratio| *ratio > 0.85), "{ratios:?}");
    assert!(ratios.iter().any(|ratio| *ratio < 1.15), "{ratios:?}");
}

/// A wait that returns at once is no idle time, and who is pushed off its CPU there wants it back.
#[real_test(alone)]
fn a_loop_that_never_has_to_wait_is_busy_all_the_time() {
    const LOOP: &str = "
import os, select
readable, writable = os.pipe()
os.write(writable, b'.')
events = select.epoll()
events.register(readable, select.EPOLLIN)
print('ready', flush=True)
while True: events.poll()
";
    let mut program = Command::new("taskset");
    program.args(["-c", "0", "/usr/bin/python3", "-c", LOOP]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut program = Process(program.spawn().unwrap());
    program.0.stdout.take().unwrap().read_exact(&mut [0; b"ready\n".len()]).unwrap();
    let _hog = hog();
    let (cpu_before, delay_before) = schedstat(program.pid());
    let observer = Observer::of(program.pid());
    thread::sleep(Duration::from_secs(1));
    let report = observer.finish();
    let (cpu, delay) = schedstat(program.pid());
    let reactor = report.reactor(program.pid());
    let (busy, waited) = (&reactor["busy_seconds"], &reactor["wait_seconds"]);
    assert!(waited.as_f64().unwrap() <= 0.001 * busy.as_f64().unwrap(), "{reactor:#}");
    let queued = seconds(reactor, "runqueue") / busy.as_f64().unwrap();
    let truth = (delay - delay_before) / (delay - delay_before + cpu - cpu_before);
    assert_close("waiting for a CPU, of its time", queued, truth, 0.1, 0.05);
    assert!(reactor["waits"].as_u64().unwrap() > BLOCKS && reactor["wakeup"]["count"] == 0, "{reactor:#}");
}

/// The parts are the whole.
#[real_test(quiet)]
fn the_split_adds_up_to_busy_time() {
    let server = Server::asyncio();
    let (reactor, ..) = block(&server, "sleep", 5);
    let parts: f64 = ["cpu", "runqueue", "blocked"].iter().map(|state| seconds(&reactor, state)).sum();
    assert_close("the parts", parts, reactor["busy_seconds"].as_f64().unwrap(), 0.01, 0.000_1);
}

/// A loop with nothing to do never returns from its wait, and is shown all the same.
#[real_test(quiet)]
fn an_idle_loop_is_seen_and_idle() {
    let server = Server::asyncio();
    let observer = Observer::of(server.pid());
    // Emulated, it takes half a second from the first program to the last question at start.
    thread::sleep(Duration::from_millis(if is_emulated() { 4_000 } else { 500 }));
    let report = observer.finish();
    let reactor = report.reactor(server.pid());
    assert_eq!(reactor["slices"], 0, "{reactor:#}");
    assert_eq!(reactor["utilization"], 0.0, "{reactor:#}");
    let waited = reactor["wait_seconds"].as_f64().unwrap();
    assert_close("waiting", waited, report.0["duration_seconds"].as_f64().unwrap(), 0.2, 0.1);
}

/// A loop that is stuck when the report is written counts with the age of its slice so far.
#[real_test(quiet)]
fn a_slice_in_progress_is_reported() {
    let server = Server::asyncio();
    let observer = Observer::of(server.pid());
    thread::scope(|scope| {
        scope.spawn(|| server.block("sleep", 3000));
        thread::sleep(Duration::from_millis(1000));
        let report = observer.finish();
        let reactor = report.reactor(server.pid());
        let age = reactor["current_slice_seconds"].as_f64().expect("a slice in progress");
        assert!((0.3..3.0).contains(&age), "{reactor:#}");
        assert_close("blocked so far", seconds(reactor, "blocked"), age, 0.05, 0.01);
    });
}

/// More event loops than there is room for: the others are seen, and that some are not is said.
#[real_test]
fn more_reactors_than_fit() {
    const THREADS: usize = 1100;
    let script = format!(
        "import select, threading\n\
         threading.stack_size(65536); epoll = select.epoll()\n\
         for _ in range({THREADS}): threading.Thread(target=epoll.poll, daemon=True).start()\n\
         print(flush=True); input()"
    );
    let mut server = Told::python(&script);
    server.said();
    let report = Observer::of(server.pid()).finish();
    assert_eq!(report.target(server.pid())["reactors"].as_array().unwrap().len(), 1024);
    let missing = report.0["self"]["missing"].to_string();
    assert!(missing.contains(&format!("some threads of process {}", server.pid())), "{missing}");
}
