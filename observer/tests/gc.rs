//! Garbage collections, compared with the counts and times of the runtimes themselves.

use std::{
    env, fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::harness::skip;
use crate::support::{
    interactive::Interactive,
    is_emulated,
    kernel::wait_until_clean,
    observer::{BINARY, Observer, Report},
    send,
    servers::Server,
    wait_for,
};

/// Number of collections that the runtimes are asked for.
const COLLECTIONS: u32 = 23;

/// Maximum difference between observer's total and the runtime's own: a share, and seconds for each collection, because
/// the two probes at its begin run one after the other.
fn tolerance() -> (f64, f64) {
    if is_emulated() { (0.25, 0.002) } else { (0.10, 0.0001) }
}

/// A process that collects garbage on request; see `servers/gc_loop.*`.
struct Loop(Interactive);

impl Loop {
    fn start(mut command: Command, script: &str) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers").join(script);
        let mut started = Self(Interactive::start(command.arg(script)));
        // After the response, it is in the wait that it will be observed in.
        started.request("collect 0");
        started
    }

    fn python() -> Self {
        Self::start(Command::new("/usr/bin/python3"), "gc_loop.py")
    }

    fn request(&mut self, command: &str) -> Value {
        let answer = self.0.request(command);
        serde_json::from_str(&answer).unwrap_or_else(|_| panic!("{command} is answered by {answer:?}"))
    }

    fn pid(&self) -> u32 {
        self.0.pid()
    }
}

/// The runtime that a test requires, and those whose paths a variable lists.
fn runtimes(needed: &str, more: &str) -> Vec<PathBuf> {
    let more = env::var_os(more).unwrap_or_default();
    [needed.into()].into_iter().chain(env::split_paths(&more).filter(|path| path.is_file())).collect()
}

/// Makes an observed process collect garbage, and compares. Returns the target of the report.
fn assert_matches_runtime(
    what: &str,
    command: &str,
    mut collecting: Loop,
    observe: impl FnOnce(u32) -> Observer,
) -> Value {
    let earlier = collecting.request("collect 0");
    let observer = observe(collecting.pid());
    let before = collecting.request("collect 0");
    let after = collecting.request(&format!("{command} {COLLECTIONS}"));
    let report = observer.finish();
    report.assert_complete();
    let target = report.target(collecting.pid());
    let counts =
        [&before, &earlier].map(|from| after["count"].as_u64().unwrap() - from["count"].as_u64().unwrap());
    let seconds = [&before, &earlier]
        .map(|from| after["seconds"].as_f64().unwrap() - from["seconds"].as_f64().unwrap());
    let (count, inside) = (counts[0], seconds[0]);
    let outside = target["gc"]["seconds"].as_f64().unwrap_or_else(|| panic!("no gc in {:#}", report.0));
    let in_slices = report.reactor(collecting.pid())["split_seconds"]["gc"].as_f64().unwrap();
    let busy = report.reactor(collecting.pid())["busy_seconds"].as_f64().unwrap();
    eprintln!(
        "| {what} | {} of {count} | {:.2} ms of {:.2} ms | {:.2} ms of {:.2} ms busy | {after} |",
        target["gc"]["count"],
        outside * 1e3,
        inside * 1e3,
        in_slices * 1e3,
        busy * 1e3
    );
    // Collections of the loop's own while observer started may be partly counted.
    let seen = target["gc"]["count"].as_u64().unwrap();
    assert!((counts[0]..=counts[1]).contains(&seen), "{seen} seen, {counts:?} done: {after}");
    let (share, each) = tolerance();
    let slack = share * inside + f64::from(COLLECTIONS) * each;
    let allowed = seconds[0] - slack..=seconds[1] + slack;
    assert!(allowed.contains(&outside), "{outside} s outside, {seconds:?} s inside");
    // All collections are in slices, and nothing else is.
    assert!((in_slices - outside).abs() <= 0.001 + 0.01 * outside, "{in_slices} s of {outside} s in slices");
    assert!(in_slices <= busy, "{in_slices} of {busy}");
    target.clone()
}

#[real_test(contract)]
fn collections_of_cpython_are_counted() {
    let target = assert_matches_runtime("CPython", "collect", Loop::python(), Observer::attach);
    assert_eq!(target["gc"]["count"], COLLECTIONS);
    assert_eq!(target["gc"]["pause"]["count"], COLLECTIONS);
}

#[real_test]
fn collections_of_node_are_counted() {
    for node in runtimes("node", "OBSERVER_TEST_NODES") {
        for command in ["collect", "churn"] {
            let mut program = Command::new(&node);
            program.args(["--expose-gc", "--no-memory-reducer"]);
            let collecting = Loop::start(program, "gc_loop.js");
            let target =
                assert_matches_runtime(&node.to_string_lossy(), command, collecting, Observer::attach);
            assert!(target["gc"]["count"].as_u64().unwrap() > 10);
            assert_eq!(target["gc"]["pause"]["count"], target["gc"]["count"]);
        }
    }
}

#[real_test]
fn collections_of_ruby_are_counted() {
    for ruby in runtimes("/usr/bin/ruby", "OBSERVER_TEST_RUBIES") {
        let mut command = Command::new(&ruby);
        command.arg("--disable=gems,error_highlight,did_you_mean");
        let collecting = Loop::start(command, "gc_loop.rb");
        let observe = |pid: u32| {
            Observer::start(&["--pid", &pid.to_string(), "--no-listen", "--reactor-calls", "poll,select"])
        };
        let target = assert_matches_runtime(&ruby.to_string_lossy(), "collect", collecting, observe);
        assert_eq!(target["gc"]["count"], COLLECTIONS);
        // Ruby does not publish the time of each collection.
        assert_eq!(target["gc"]["pause"], Value::Null);
    }
}

/// A CPython that was built without probes cannot be observed, which the report says.
#[real_test]
fn python_without_probes_is_reported_as_missing() {
    const PROBES: &str =
        "import sys, sysconfig; print(sysconfig.get_config_var('WITH_DTRACE') or sys.executable)";
    let asked = Command::new("python3").args(["-c", PROBES]).output();
    let python = asked.ok().map(|asked| String::from_utf8(asked.stdout).unwrap());
    let python = python.unwrap_or_else(|| skip("no python3 on the PATH"));
    if !python.starts_with('/') {
        skip("the python3 on the PATH has probes");
    }
    let mut collecting = Loop::start(Command::new(python.trim()), "gc_loop.py");
    let observer = Observer::attach(collecting.pid());
    collecting.request("collect 1");
    let report = observer.finish();
    assert_eq!(report.target(collecting.pid())["gc"], Value::Null);
    let missing = report.0["self"]["missing"].to_string();
    assert!(missing.contains("python:gc__start"), "{missing}");
}

/// Address of the semaphore of the probe `gc__start` in Debian's python3, which is not position-independent.
fn semaphore_address() -> u64 {
    let file = fs::read("/usr/bin/python3").unwrap();
    let name = b"python\0gc__start\0";
    let at = file.windows(name.len()).position(|window| window == name).expect("a probe");
    // The last of three addresses before the names.
    u64::from_le_bytes(*file[at - 8..].first_chunk().unwrap())
}

/// The value of that semaphore in a process.
fn semaphore_value(pid: u32) -> u16 {
    let mut count = [0; 2];
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    memory.read_exact_at(&mut count, semaphore_address()).unwrap();
    u16::from_le_bytes(count)
}

/// A killed observer cannot clean up. The kernel does: the semaphore of the process is 0 again.
#[real_test]
fn kernel_resets_the_semaphore_when_observer_is_killed() {
    let mut collecting = Loop::python();
    assert_eq!(semaphore_value(collecting.pid()), 0);
    let observer = Observer::attach(collecting.pid());
    assert_eq!(semaphore_value(collecting.pid()), 1);
    // A forked child has a copy of the semaphore, and is observed itself from the next refresh on.
    let child = u32::try_from(collecting.request("fork").as_u64().unwrap()).unwrap();
    thread::sleep(Duration::from_secs(3));
    assert_eq!(semaphore_value(child), 1);
    observer.kill();
    for pid in [collecting.pid(), child] {
        wait_for("the kernel to reset the semaphore", || (semaphore_value(pid) == 0).then_some(()));
    }
    assert_eq!(collecting.request("collect 1")["count"], 1);
    send(child, nix::sys::signal::Signal::SIGKILL);
}

#[real_test]
fn collections_of_a_child_forked_later_are_counted() {
    let mut collecting = Loop::python();
    let observer = Observer::attach(collecting.pid());
    let child = u32::try_from(collecting.request("fork").as_u64().unwrap()).unwrap();
    thread::sleep(Duration::from_secs(4));
    let report = observer.finish();
    send(child, nix::sys::signal::Signal::SIGKILL);
    report.assert_complete();
    assert!(report.target(child)["gc"]["count"].as_u64().unwrap() > 0, "{:#}", report.0);
    // The collections of the child do not count for its parent.
    assert_eq!(report.target(collecting.pid())["gc"]["count"], 0);
}

/// A shell that executes the server, as many are started. The shell has no garbage collector.
#[real_test]
fn collections_after_an_exec_are_counted() {
    let mut shell = Command::new("sh");
    shell.args(["-c", "read go; exec /usr/bin/python3 \"$@\"", "sh"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/gc_loop.py");
    let mut collecting = Loop(Interactive::start(shell.arg(script)));
    let pid = collecting.pid().to_string();
    let observer = Observer::start(&["--pid", &pid, "--listen", "127.0.0.1:0"]);
    // Longer than observer retries to find a runtime in the shell.
    thread::sleep(Duration::from_secs(7));
    collecting.request("go\ncollect 0");
    wait_for("observer to attach", || (semaphore_value(collecting.pid()) == 1).then_some(()));
    // If observer attached during start-up, it has counted collections already.
    let before = observer.metric("observer_gc_total");
    collecting.request(&format!("collect {COLLECTIONS}"));
    assert_eq!(observer.metric("observer_gc_total") - before, f64::from(COLLECTIONS));
    observer.finish().assert_complete();
}

/// Number of uprobes of an observer, according to bpftool.
fn uprobes(observer: &Observer) -> usize {
    let output = Command::new("bpftool").args(["-j", "perf", "show"]).output().unwrap();
    let entries: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let is_one = |entry: &&Value| entry["pid"] == observer.pid() && entry["fd_type"] == "uprobe";
    entries.iter().filter(is_one).count()
}

#[real_test]
fn only_processes_with_a_runtime_get_uprobes() {
    let redis = Server::redis();
    let observer = Observer::attach(redis.pid());
    assert_eq!(uprobes(&observer), 0);
    let report: Report = observer.finish();
    assert_eq!(report.target(redis.pid())["gc"], Value::Null);

    let python = Loop::python();
    let pid = python.pid().to_string();
    let observer = Observer::start(&["--pid", &pid, "--no-listen", "--profile", "CPython"]);
    assert_eq!(uprobes(&observer), 2);
    observer.finish();
    wait_until_clean();
}

#[real_test]
fn text_report_shows_collections() {
    let mut collecting = Loop::python();
    let pid = collecting.pid().to_string();
    let mut observer = Command::new(BINARY)
        // Attaching counts as well.
        .args(["--pid", &pid, "--no-listen", "--duration", if is_emulated() { "20s" } else { "4s" }])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    while observer.try_wait().unwrap().is_none() {
        collecting.request("collect 1");
    }
    let text = String::from_utf8(observer.wait_with_output().unwrap().stdout).unwrap();
    assert!(text.contains("; of which GC "), "{text}");
    assert!(text.contains(" pauses: p50 "), "{text}");
}
