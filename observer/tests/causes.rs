//! Causes injected into event loops: each block is one stall, with its cause and the function that blocked.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use procfs::process::Process as Proc;
use serde_json::Value;

use crate::harness::skip;
use crate::support::{
    Process, assert_close, is_emulated, is_full,
    observer::Observer,
    servers::{Runtime, Server},
    stolen,
};

/// Number of stalls of a test.
const STALLS: u32 = 23;

/// Length of a block in milliseconds, and threshold of stalls in seconds. Each block is a stall, and nothing else is.
/// On an emulated machine, reading a stack takes several times as long as well.
fn lengths() -> (u32, f64) {
    if is_emulated() { (600, 0.25) } else { (120, 0.05) }
}

/// Time of a request in seconds that is not part of the block; the rest of each block is a stall.
fn slack() -> f64 {
    if is_emulated() { 0.030 } else { 0.003 }
}

/// Whether a frame belongs to this native, Python or Ruby function.
fn is_frame_of(frame: &Value, function: &str) -> bool {
    let name = frame["function"].as_str().unwrap_or_default();
    name == function || name.ends_with(&format!("::{function}"))
}

/// Duration and parts of a block, as the server measured them, and the injected cause.
struct Truth {
    wall: f64,
    parts: [(&'static str, f64); 3],
}

impl Truth {
    /// Blocks the loop of a server. Its time off the CPU counts as `cause`, except for time in the run queue.
    fn of(server: &Server, injected: &str, cause: &'static str) -> Self {
        let measured = server.block(injected, lengths().0);
        let [wall, cpu, delay] = ["wall", "cpu", "delay"].map(|part| measured[part].as_f64().unwrap());
        let other = (wall - cpu - delay).max(0.0);
        // A collection counts as such from its begin to its end, whether or not it has a CPU.
        let (computing, other) = if cause == "gc" { (0.0, wall) } else { (cpu, other) };
        Self { wall, parts: [("cpu", computing), ("runqueue", delay), (cause, other)] }
    }

    /// Whether this is about the largest part. On a busy machine, any injected block may wait longer for a CPU than it
    /// lasts.
    fn is_largest(&self, cause: &str) -> bool {
        let largest = self.parts.iter().map(|(_, seconds)| *seconds).fold(0.0, f64::max);
        self.parts.iter().any(|(part, seconds)| *part == cause && *seconds > largest - 0.1 * self.wall)
    }
}

/// Blocks a server's loop, and expects as many stalls with this cause.
fn assert_stalls(server: &Server, runtime: Runtime, injected: &str, cause: &'static str) {
    // Keeps compiling or loading on first use out of the first stall.
    server.block(injected, 1);
    let pid = server.pid().to_string();
    let (_, threshold) = lengths();
    let threshold_flag = format!("{}ms", threshold * 1e3);
    let observer = Observer::start(&["--no-listen", "--stall-threshold", &threshold_flag, "--pid", &pid]);
    let truth: Vec<_> = (0..STALLS).map(|_| Truth::of(server, injected, cause)).collect();
    // This response shows that the slice of the last block has ended.
    server.block("none", 0);
    let report = observer.finish();
    report.assert_complete();
    let stalls = &report.reactor(server.pid())["stalls"];
    let what = format!("{runtime:?}, {injected}");
    assert_eq!(stalls["threshold_seconds"], threshold, "{what}: {stalls:#}");
    assert_eq!(stalls["count"], STALLS, "{what}: {stalls:#}");

    let function = format!("cause_{injected}");
    let recent = stalls["recent"].as_array().unwrap();
    assert_eq!(recent.len(), STALLS as usize, "{what}: {stalls:#}");
    let (mut unseen, mut disturbed) = (0, 0);
    for (stall, truth) in recent.iter().zip(&truth) {
        let reported = stall["cause"].as_str().unwrap();
        // On a busy machine, the loop also waits for a CPU before or after the block. A hypervisor takes time that
        // counts as CPU time from outside, but not in the server's own count.
        let is_longer = stall["seconds"].as_f64().unwrap() > 1.2 * truth.wall;
        if is_longer || !truth.is_largest(reported) {
            eprintln!("{what}: reported as {reported}, measured {:?} of {} s", truth.parts, truth.wall);
            disturbed += 1;
        }
        let site =
            stall["site"].as_u64().unwrap_or_else(|| panic!("{what}: the stall has no site: {stall:#}"));
        let site = &stalls["sites"][usize::try_from(site).unwrap()];
        let frames = site["frames"].as_array().unwrap();
        let is_seen = frames.iter().any(|frame| is_frame_of(frame, &function));
        // On an emulated machine, there may be only one sample, taken before or after the block.
        assert!(is_seen || is_emulated() || site["missing"].is_string(), "{what}: {site:#}");
        unseen += u32::from(!is_seen);
    }
    let causes: Vec<_> = recent.iter().map(|stall| stall["cause"].as_str().unwrap()).collect();
    let right = causes.iter().filter(|&&reported| reported == cause).count();
    eprintln!("{what}: {right} of {STALLS} stalls are {cause}, {unseen} unseen, all others in {function}");
    // Under full load, observer may get no CPU during a stall. The report says so.
    assert!(
        unseen <= STALLS / 4 && disturbed <= STALLS / 4,
        "{what}: {unseen} unseen, {disturbed} disturbed"
    );
    let total = |block: fn(&Value) -> f64| recent.iter().map(block).sum::<f64>();
    let wall: f64 = truth.iter().map(|block| block.wall).sum();
    if disturbed == 0 {
        assert_close(
            &what,
            total(|stall| stall["seconds"].as_f64().unwrap()),
            wall,
            0.05,
            slack() * f64::from(STALLS),
        );
    }
}

/// All runtimes of this machine. Only the native one on an emulated kernel, because kernels differ only in how they
/// represent a blocked call.
fn runtimes() -> &'static [Runtime] {
    if is_emulated() { &[Runtime::Native] } else { &[Runtime::Native, Runtime::Python, Runtime::Ruby] }
}

/// Runtimes for causes that take long to inject and are the same for all runtimes.
fn runtimes_for_long() -> &'static [Runtime] {
    if is_full() { runtimes() } else { &[Runtime::Native] }
}

fn assert_stalls_everywhere(injected: &str, cause: &'static str) {
    for &runtime in runtimes() {
        assert_stalls(&Server::causes(runtime), runtime, injected, cause);
    }
}

/// Whether a folder is on a file system that reads its files from a device.
fn is_on_disk(folder: &Path) -> bool {
    let mounts = Proc::myself().unwrap().mountinfo().unwrap();
    let above = mounts.0.iter().filter(|mount| folder.starts_with(&mount.mount_point));
    // The last of several mounts at a mount point is the visible one.
    let here = above.max_by_key(|mount| mount.mount_point.components().count()).unwrap();
    !["ramfs", "rootfs", "tmpfs"].contains(&here.fs_type.as_str())
}

#[real_test(alone)]
fn computation_is_cpu() {
    assert_stalls_everywhere("spin", "cpu");
}

#[real_test(quiet)]
fn sleep_is_sleep() {
    assert_stalls_everywhere("sleep", "sleep");
}

#[real_test(quiet)]
fn file_lock_is_lock() {
    assert_stalls_everywhere("flock", "lock");
}

/// A mutex of Rust, a `threading.Lock`, a `Mutex` of Ruby.
#[real_test(quiet)]
fn contended_mutex_is_lock() {
    assert_stalls_everywhere("futex", "lock");
}

/// Reading the memory usage of a process, as monitoring agents do, takes the lock of its address space.
#[real_test(alone)]
fn mmap_lock_is_lock() {
    const READS: u32 = 100;
    const LOOP: &str = "
import mmap, os, select, sys, time
SIZE = 256 << 20
large = mmap.mmap(-1, SIZE)
large.madvise(mmap.MADV_NOHUGEPAGE)
for page in range(0, SIZE, mmap.PAGESIZE): large[page] = 1
figures = os.open('/proc/self/schedstat', os.O_RDONLY)
off_cpu = lambda: time.monotonic() - time.thread_time() - int(os.pread(figures, 99, 0).split()[1]) / 1e9
events = select.epoll()
events.register(sys.stdin, select.EPOLLIN)
print('ready', flush=True)
blocked = 0
while not events.poll(0.001):
    blocked -= off_cpu()
    mmap.mmap(-1, mmap.PAGESIZE).close()
    blocked += off_cpu()
print(blocked)
";
    let mut program = Command::new("/usr/bin/python3");
    program.args(["-c", LOOP]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut program = Process(program.spawn().unwrap());
    let mut reported = BufReader::new(program.0.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(reported.next().as_deref(), Some("ready"));
    let observer = Observer::attach(program.pid());
    let stolen_before = stolen();
    for _ in 0..READS {
        fs::read(format!("/proc/{}/smaps_rollup", program.pid())).unwrap();
    }
    drop(program.0.stdin.take());
    let truth: f64 = reported.next().unwrap().parse().unwrap();
    let report = observer.finish();
    let blocked = &report.reactor(program.pid())["split_seconds"]["blocked"];
    eprintln!("{truth} s blocked: {blocked}");
    assert!(truth > 0.01, "it was in nobody's way: {truth} s");
    // On an emulated machine, reading three clocks takes as long as a block, and the reader may run in between.
    let share = if is_emulated() { 0.5 } else { 0.1 };
    // The program counts as blocked all time that it was neither on a CPU nor in the run queue, including time that the
    // hypervisor took.
    let slack = 0.005 + stolen() - stolen_before;
    assert_close("blocked by the lock", blocked["lock"].as_f64().unwrap(), truth, share, slack);
    assert_eq!(blocked["other"], 0.0, "{blocked}");
}

#[real_test(alone)]
fn uncached_file_is_disk() {
    let folder = env::temp_dir();
    if !is_on_disk(&folder) {
        skip(format!("{} is in memory", folder.display()));
    }
    assert_stalls_everywhere("file", "disk");
}

#[real_test(quiet)]
fn unresponsive_resolver_is_network() {
    assert_stalls_everywhere("dns", "network");
}

/// Native programs have no garbage collector.
#[real_test(alone, host_only("it takes too long on an emulated kernel"))]
fn garbage_collection_is_gc() {
    for runtime in [Runtime::Python, Runtime::Ruby] {
        assert_stalls(&Server::causes(runtime), runtime, "gc", "gc");
    }
}

/// Several processes, so that the loop is in the run queue longer than on the CPU.
#[real_test(alone)]
fn competing_processes_are_runqueue() {
    const HOGS: usize = 3;
    let hog = || {
        Command::new("taskset")
            .args(["-c", "0", "/usr/bin/python3", "-c", "while True: pass"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    };
    for &runtime in runtimes_for_long() {
        let server = Server::causes_on_cpu(runtime, 0);
        let _hogs: [Process; HOGS] = std::array::from_fn(|_| Process(hog()));
        assert_stalls(&server, runtime, "hog", "runqueue");
    }
}
