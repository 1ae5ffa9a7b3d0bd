//! The reactor probe with real event loops: every block is seen once, and its time is attributed correctly.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use crate::support::{
    Process, assert_close,
    interactive::Interactive,
    is_emulated,
    observer::{Observer, count_between},
    schedstat,
    servers::Server,
    stolen,
};
use serde_json::Value;

/// Number of blocks of a test.
const BLOCKS: u64 = 23;

/// Length of a block in milliseconds: longer than other interruptions of an emulated CPU.
fn block_ms() -> u32 {
    if is_emulated() { 400 } else { 100 }
}

/// Bounds of the buckets that such a block falls into, with an upper bound for busy machines.
fn bucket() -> (f64, f64) {
    const LEAST: f64 = 0.067_108_864;
    if is_emulated() { (4.0 * LEAST, 32.0 * LEAST) } else { (LEAST, 8.0 * LEAST) }
}

/// Blocks a server's loop. Returns its event loop as reported, and the wall and CPU seconds that the server measured.
fn block(server: &Server, kind: &str, times: u64) -> (Value, f64, f64) {
    let observer = Observer::attach(server.pid());
    let (mut wall, mut cpu) = (0.0, 0.0);
    for _ in 0..times {
        let measured = server.block(kind, block_ms());
        wall += measured["wall"].as_f64().unwrap();
        cpu += measured["cpu"].as_f64().unwrap();
    }
    // This response shows that the slice of the last block has ended.
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

/// Asserts that the loop was blocked with this cause for at least the requested sleep, less a little before it, and at
/// most for the time that the server measured, which includes the wait for a CPU afterwards. No sleep may have an
/// unknown cause.
#[track_caller]
fn assert_slept(reactor: &Value, wall: f64, cause: &str) {
    let sleep = Duration::from_millis(u64::from(block_ms())).as_secs_f64();
    let requested = Duration::from_millis(u64::from(block_ms()) * BLOCKS).as_secs_f64();
    let [slept, other] = [cause, "other"].map(|cause| &reactor["split_seconds"]["blocked"][cause]);
    let (slept, other) = (slept.as_f64().unwrap(), other.as_f64().unwrap());
    assert!(
        (0.95 * requested..=wall + 0.01).contains(&slept),
        "{slept} s, {requested} requested, {wall} taken"
    );
    assert!(other < 0.5 * sleep, "{other} s: {reactor:#}");
}

/// Tolerance for the work of the requests around the blocks, in seconds.
fn slack(times: u64) -> f64 {
    let each = if is_emulated() { 0.050 } else { 0.002 };
    each * f64::from(u32::try_from(times).unwrap())
}

#[real_test(quiet, contract)]
fn asyncio_sleeps_are_blocked_slices() {
    let server = Server::asyncio();
    // Keeps files that the first response loads out of the first block.
    server.block("sleep", 1);
    let (computed_before, _) = schedstat(server.pid());
    let stolen_before = stolen();
    let (reactor, wall, _) = block(&server, "sleep", BLOCKS);
    let computed = schedstat(server.pid()).0 - computed_before;
    assert_eq!(count_between(&reactor["slice"], bucket().0, bucket().1), BLOCKS, "{reactor:#}");
    assert_slept(&reactor, wall, "sleep");
    assert_eq!(reactor["split_seconds"]["blocked"]["other"], 0.0, "{reactor:#}");
    // The scheduler's own account, which includes the work around the waits. The time of a hypervisor comes on top; its
    // resolution is a tick of 10 ms.
    let disturbed = 0.010 + stolen() - stolen_before;
    assert!(seconds(&reactor, "cpu") < 1.05 * computed + disturbed, "{computed} s computed: {reactor:#}");
}

#[real_test(alone)]
fn asyncio_spins_are_slices_on_a_cpu() {
    let server = Server::asyncio();
    let (reactor, _, cpu) = block(&server, "spin", BLOCKS);
    let slices = &reactor["slice"];
    // 100 ms of CPU time take longer on a busy machine.
    assert_eq!(count_between(slices, bucket().0, f64::MAX), BLOCKS, "{reactor:#}");
    assert_close("on a CPU", seconds(&reactor, "cpu"), cpu, 0.05, slack(BLOCKS));
    assert!(seconds(&reactor, "blocked") < 0.05 * cpu, "{reactor:#}");
}

#[real_test(quiet)]
fn node_sleeps_are_blocked_slices() {
    let server = Server::node();
    // Keeps compiling of the handler out of the first block.
    server.block("sleep", 1);
    let (reactor, wall, _) = block(&server, "sleep", BLOCKS);
    let long = count_between(&reactor["slice"], bucket().0, f64::MAX);
    // On an emulated machine, compiling a function may take as long.
    assert!(long == BLOCKS || (is_emulated() && long > BLOCKS), "{reactor:#}");
    // Other causes are possible, because some activities of Node's threads, such as concurrent garbage collection, are
    // unknown.
    assert_slept(&reactor, wall, "lock");
}

/// A process that keeps the first CPU busy.
fn hog() -> Process {
    let mut hog = Command::new("taskset");
    hog.args(["-c", "0", "/usr/bin/python3", "-c", "while True: pass"]).stdin(Stdio::null());
    Process(hog.spawn().unwrap())
}

/// Time that another process takes from the CPU is not counted as the server's own work.
#[real_test(alone)]
fn competing_process_causes_time_in_the_run_queue() {
    let _hog = hog();
    let server = Server::asyncio_on_cpu(0);
    let (_, delay_before) = schedstat(server.pid());
    let (reactor, wall, cpu) = block(&server, "spin", BLOCKS);
    let delay = schedstat(server.pid()).1 - delay_before;
    let waited = wall - cpu;
    assert!(waited > 0.25 * wall, "the hog got in nobody's way: {waited} of {wall} s");
    assert_close("waiting for a CPU", seconds(&reactor, "runqueue"), waited, 0.05, slack(BLOCKS));
    assert_close("on a CPU", seconds(&reactor, "cpu"), cpu, 0.05, slack(BLOCKS));
    // The scheduler's own account of all delays, including those after a wake-up.
    let delays = seconds(&reactor, "runqueue") + reactor["wakeup"]["sum"].as_f64().unwrap();
    assert_close("delays as the scheduler counts them", delays, delay, 0.05, slack(BLOCKS));
}

/// Every wait and every slice is counted once, compared with the loop's own count.
#[real_test(contract)]
fn waits_and_slices_are_counted_exactly() {
    let server = Server::asyncio();
    server.wait_until_idle();
    let before = server.waits();
    let observer = Observer::attach(server.pid());
    for _ in 0..BLOCKS {
        server.block("none", 0);
    }
    server.wait_until_idle();
    let waits = server.waits() - before;
    let report = observer.finish();
    let reactor = report.reactor(server.pid());
    assert_eq!(reactor["waits"], waits, "{reactor:#}");
    // The idle loop has ended all slices that it began.
    assert_eq!(reactor["slices"], waits, "{reactor:#}");
    assert!(waits >= BLOCKS);
}

/// A wait is time off the CPU: all CPU time of a loop is in its slices, however short, compared with the scheduler's
/// account.
#[real_test(alone)]
fn all_cpu_time_is_in_slices() {
    // Both processes share a CPU, so that it never goes idle: the scheduler counts the wake-up of an idle CPU as time
    // of its thread.
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
    let (pid, mut stdin) = (program.pid(), program.0.stdin.take().unwrap());
    let mut output = BufReader::new(program.0.stdout.take().unwrap());
    let mut run_batch = || {
        stdin.write_all(b"go\n").unwrap();
        output.read_line(&mut String::new()).unwrap();
    };
    run_batch();
    let mut round = || {
        let observer = Observer::attach(pid);
        let (before, _) = schedstat(pid);
        run_batch();
        let cpu = schedstat(pid).0 - before;
        let report = observer.finish();
        let seen = seconds(report.reactor(pid), "cpu");
        eprintln!("on a CPU: {seen} s where {cpu} s is true");
        seen / cpu
    };
    // Time of interrupts and of a hypervisor counts as CPU time from outside, but not in the scheduler's account. It
    // comes on top, and not in every round.
    let ratios: Vec<f64> = (0..5).map(|_| round()).collect();
    assert!(ratios.iter().all(|ratio| *ratio > 0.85), "{ratios:?}");
    assert!(ratios.iter().any(|ratio| *ratio < 1.15), "{ratios:?}");
}

/// A wait that returns immediately is not idle time, and a loop that is preempted in it is in the run queue.
#[real_test(alone)]
fn loop_that_never_blocks_is_always_busy() {
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
    let observer = Observer::attach(program.pid());
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

/// The parts add up to the total.
#[real_test(quiet)]
fn parts_add_up_to_busy_time() {
    let server = Server::asyncio();
    let (reactor, ..) = block(&server, "sleep", 5);
    let parts: f64 = ["cpu", "runqueue", "blocked"].iter().map(|state| seconds(&reactor, state)).sum();
    assert_close("the parts", parts, reactor["busy_seconds"].as_f64().unwrap(), 0.01, 0.000_1);
}

/// A loop without events never returns from its wait, but is reported.
#[real_test(quiet)]
fn idle_loop_is_reported_as_idle() {
    let server = Server::asyncio();
    let observer = Observer::attach(server.pid());
    // On an emulated machine, start-up takes half a second from the first program to the last one.
    thread::sleep(Duration::from_millis(if is_emulated() { 4_000 } else { 500 }));
    let report = observer.finish();
    let reactor = report.reactor(server.pid());
    assert_eq!(reactor["slices"], 0, "{reactor:#}");
    assert_eq!(reactor["utilization"], 0.0, "{reactor:#}");
    let waited = reactor["wait_seconds"].as_f64().unwrap();
    assert_close("waiting", waited, report.0["duration_seconds"].as_f64().unwrap(), 0.2, 0.1);
}

/// A slice that has not ended when the report is written counts with its current age.
#[real_test(quiet)]
fn slice_in_progress_is_reported() {
    let server = Server::asyncio();
    let observer = Observer::attach(server.pid());
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

/// More threads than the capacity, all in one loop or each in its own: the first ones are reported, and the report says
/// that some are missing.
#[real_test]
fn threads_beyond_the_capacity_are_reported_as_missing() {
    const THREADS: usize = 1100;
    const CAPACITY: u64 = 1024;
    for (set, loops) in [("shared", 1), ("select.epoll()", CAPACITY)] {
        let script = format!(
            "import resource, select, threading\n\
             resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n\
             threading.stack_size(65536); shared = select.epoll(); sets = []\n\
             for _ in range({THREADS}):\n    \
                 sets.append({set}); threading.Thread(target=sets[-1].poll, daemon=True).start()\n\
             print(flush=True); input()"
        );
        let mut server = Interactive::python(&script);
        server.next_line();
        let report = Observer::attach(server.pid()).finish();
        let reactors = report.target(server.pid())["reactors"].as_array().unwrap();
        let threads: u64 = reactors.iter().map(|reactor| reactor["threads"].as_u64().unwrap()).sum();
        assert_eq!((reactors.len() as u64, threads), (loops, CAPACITY), "{set}");
        let missing = report.0["self"]["missing"].to_string();
        assert!(missing.contains(&format!("some threads of process {}", server.pid())), "{missing}");
    }
}
