//! Support for the tests: observer as a process, real servers, a small HTTP client. Processes end when they are
//! dropped, and every wait has a time limit.

pub(crate) mod acceptor;
pub(crate) mod deferred;
pub(crate) mod disturbance;
pub(crate) mod http;
pub(crate) mod interactive;
pub(crate) mod kernel;
pub(crate) mod load;
pub(crate) mod observer;
pub(crate) mod otlp;
pub(crate) mod prometheus;
pub(crate) mod schema;
pub(crate) mod servers;
pub(crate) mod text;

use std::{
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    time::{Duration, Instant},
};

use procfs::{CurrentSI as _, KernelStats};

/// Time limit of every wait. An emulated kernel that shares its CPUs with other guests takes a minute to start
/// observer.
pub(crate) const LIMIT: Duration = Duration::from_secs(150);

/// Path of an example program that tests observe; it is built together with the tests.
pub(crate) fn example(name: &str) -> PathBuf {
    Path::new(observer::BINARY).with_file_name("examples").join(name)
}

/// Whether this is an emulated machine, which is ten times slower.
pub(crate) fn is_emulated() -> bool {
    std::env::var_os("OBSERVER_TEST_EMULATED").is_some()
}

/// Whether tests run their full load and all rounds: `cargo xtask test --full`.
pub(crate) fn is_full() -> bool {
    std::env::var_os("OBSERVER_TEST_FULL").is_some()
}

/// Length of a wait from which on it is reported: in a slow test it shows what it waited for.
const LONG: Duration = Duration::from_secs(5);

/// Polls until there is a result. Panics with `what` after the time limit, and reports a long wait.
pub(crate) fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    let end = begin + LIMIT;
    loop {
        if let Some(result) = poll() {
            let waited = begin.elapsed();
            if waited > LONG {
                eprintln!("waited {waited:.1?} for {what}");
            }
            return result;
        }
        assert!(Instant::now() < end, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for a process to exit; `None` if it does not exit within the limit.
pub(crate) fn exit_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + limit;
    loop {
        match child.try_wait().unwrap() {
            None if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            ended => return ended,
        }
    }
}

/// A process that is killed when it is dropped.
pub(crate) struct Process(pub(crate) Child);

impl Process {
    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        send(self.pid(), signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Whether a thread is blocked in `epoll_wait` or `epoll_pwait`, according to `/proc`.
pub(crate) fn waits_for_events(pid: u32, tid: u32) -> bool {
    const EPOLL_WAIT: &str = "232";
    const EPOLL_PWAIT: &str = "281";
    is_blocked_in(pid, tid, &[EPOLL_WAIT, EPOLL_PWAIT])
}

/// Whether a thread is blocked in `nanosleep` or `clock_nanosleep`, according to `/proc`.
pub(crate) fn is_asleep(pid: u32, tid: u32) -> bool {
    const NANOSLEEP: &str = "35";
    const CLOCK_NANOSLEEP: &str = "230";
    is_blocked_in(pid, tid, &[NANOSLEEP, CLOCK_NANOSLEEP])
}

fn is_blocked_in(pid: u32, tid: u32, calls: &[&str]) -> bool {
    let call = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).unwrap();
    calls.contains(&call.split(' ').next().unwrap())
}

/// Sends a signal to a process that a test started.
pub(crate) fn send(pid: u32, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// Time that the main thread of a process was on a CPU and in the run queue, in seconds, as the scheduler counts it.
pub(crate) fn schedstat(pid: u32) -> (f64, f64) {
    let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    let mut times = text.split(' ').map(|ns| Duration::from_nanos(ns.trim().parse().unwrap()).as_secs_f64());
    (times.next().unwrap(), times.next().unwrap())
}

/// Time that the hypervisor took from all CPUs, in seconds.
pub(crate) fn stolen() -> f64 {
    KernelStats::current().unwrap().total.steal_duration().unwrap_or_default().as_secs_f64()
}

/// Asserts that a value differs from the expected one by at most `share` of it plus `slack`.
#[track_caller]
pub(crate) fn assert_close(what: &str, value: f64, expected: f64, share: f64, slack: f64) {
    let error = (value - expected).abs();
    assert!(error <= expected * share + slack, "{what}: {value}, expected {expected}, off by {error}");
}
