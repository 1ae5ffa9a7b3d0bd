//! However an observation ends, it leaves nothing in its targets: their code equals their files, the kernel reports no
//! uprobe that it could not remove, and every request is served meanwhile. `OBSERVER_TEST_DETACH=200` sets how often
//! each kind of end is tested.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;

use crate::support::{
    LIMIT, Process,
    deferred::{DeferringServer, send_request},
    example, exit_within, http, is_emulated,
    observer::BINARY,
    servers::{Runtime, Server},
    text::{KernelLog, altered_code},
    wait_for,
};

/// How an observation ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Duration,
    Interrupt,
    Terminate,
    Kill,
    KillSwitch,
    TargetExits,
}

const ENDS: [End; 6] =
    [End::Duration, End::Interrupt, End::Terminate, End::Kill, End::KillSwitch, End::TargetExits];

/// How often each kind of end is tested.
fn rounds(by_default: usize) -> usize {
    let by_default = if is_emulated() { 1 } else { by_default };
    env::var("OBSERVER_TEST_DETACH").map_or(by_default, |rounds| rounds.parse().unwrap())
}

/// Pause between two requests. Without one, a server would take all the CPU time of an emulated guest.
fn pause() {
    if is_emulated() {
        thread::sleep(Duration::from_millis(50));
    }
}

/// A server whose functions observer attaches to.
trait Target {
    fn pid(&self) -> u32;
    fn port(&self) -> u16;
    /// Sends requests until `is_over`.
    fn send_requests(port: u16, is_over: &AtomicBool, served: &AtomicU64);
}

impl Target for DeferringServer {
    fn pid(&self) -> u32 {
        Self::pid(self)
    }

    fn port(&self) -> u16 {
        self.port
    }

    fn send_requests(port: u16, is_over: &AtomicBool, served: &AtomicU64) {
        let mut connection = BufReader::new(http::connect(port));
        while !is_over.load(Relaxed) {
            send_request(&mut connection, "/job/1");
            served.fetch_add(1, Relaxed);
            pause();
        }
    }
}

impl Target for Server {
    fn pid(&self) -> u32 {
        Self::pid(self)
    }

    fn port(&self) -> u16 {
        self.port
    }

    fn send_requests(port: u16, is_over: &AtomicBool, served: &AtomicU64) {
        while !is_over.load(Relaxed) {
            http::get(port, "/none/0");
            served.fetch_add(1, Relaxed);
            pause();
        }
    }
}

/// Starts observer on a process; returns once it has attached. Its messages are shown.
fn observe(pid: u32, end: End, arguments: &[&str], switch: &Path) -> Process {
    let mut command = Command::new(BINARY);
    command.args(["--pid", &pid.to_string(), "--no-listen", "--format", "json"]).args(arguments);
    match end {
        // Longer than attaching takes.
        End::Duration => drop(command.args(["--duration", if is_emulated() { "20s" } else { "5s" }])),
        End::KillSwitch => drop(command.arg("--kill-switch").arg(switch)),
        _ => {}
    }
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut observer = Process(child);
    let mut lines = BufReader::new(observer.0.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.starts_with("report ")), "observer does not start");
    // Keep reading, so that the pipe stays open.
    thread::spawn(move || lines.for_each(|line| eprintln!("observer: {line}")));
    observer
}

fn wait_for_exit(observer: &mut Child, end: End) {
    let status = exit_within(observer, LIMIT).unwrap_or_else(|| panic!("{end:?}: observer does not end"));
    let is_killed = status.signal() == Some(Signal::SIGKILL as i32);
    assert_eq!((status.success(), is_killed), (end != End::Kill, end == End::Kill), "{end:?}: {status}");
}

/// Ends one observation of a target, and checks what it left behind. Returns the target unless it has exited.
fn end_once<T: Target>(target: T, end: End, arguments: &[&str], log: &mut KernelLog) -> Option<T> {
    let folder = tempfile::tempdir().unwrap();
    let switch = folder.path().join("off");
    let mut observer = observe(target.pid(), end, arguments, &switch);
    let pid = target.pid();
    let is_clean = || altered_code(pid).is_empty();
    wait_for("breakpoints", || (!is_clean()).then_some(()));
    let mut target = Some(target);
    match end {
        End::Duration => {}
        End::Interrupt => observer.signal(Signal::SIGINT),
        End::Terminate => observer.signal(Signal::SIGTERM),
        End::Kill => observer.signal(Signal::SIGKILL),
        End::KillSwitch => {
            fs::write(&switch, "").unwrap();
            wait_for("breakpoints to be removed", || is_clean().then_some(()));
            observer.signal(Signal::SIGTERM);
        }
        End::TargetExits => drop(target.take()),
    }
    wait_for_exit(&mut observer.0, end);
    if target.is_some() {
        // observer waits for the removal before it exits. If it is killed, its descriptors are closed after its exit.
        if end == End::Kill {
            wait_for("breakpoints to be removed", || is_clean().then_some(()));
        }
        assert_eq!(altered_code(pid), Vec::<String>::new(), "{end:?}");
    }
    let complaints: Vec<_> = log.lines().into_iter().filter(|line| line.contains("uprobe")).collect();
    assert!(complaints.is_empty(), "{end:?}: {complaints:?}");
    target
}

/// Tests all kinds of ends on a server that is under load.
fn assert_code_is_restored<T: Target + Send>(start: impl Fn() -> T, arguments: &[&str], rounds: usize) {
    let mut log = KernelLog::from_now_on();
    for end in ENDS {
        let mut target = Some(start());
        for _ in 0..rounds {
            let server = target.take().unwrap_or_else(&start);
            let (is_over, served) = (&AtomicBool::new(false), &AtomicU64::new(0));
            let port = server.port();
            target = thread::scope(|scope| {
                let _stop = StopOnDrop(is_over);
                // A target that exits need not respond.
                if end != End::TargetExits {
                    scope.spawn(move || T::send_requests(port, is_over, served));
                }
                end_once(server, end, arguments, &mut log)
            });
            assert!(served.load(Relaxed) > 0 || end == End::TargetExits, "nothing was asked");
        }
        eprintln!("{end:?}: {rounds} ends");
    }
}

/// Stops the load when a test fails.
struct StopOnDrop<'s>(&'s AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[real_test]
fn code_of_python_is_restored() {
    let start = || DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
    assert_code_is_restored(start, &["--profile", "asyncio,CPython"], rounds(2));
}

#[real_test]
fn code_of_node_is_restored() {
    let start = || DeferringServer::script("node", "deferred_node.js");
    assert_code_is_restored(start, &["--profile", "node"], rounds(1));
}

/// Uses functions of the interpreter, because Rage is not available.
#[real_test]
fn code_of_ruby_is_restored() {
    let (snapshot, restore) = ("libruby:rb_fiber_new:arg0", "libruby:rb_io_wait:arg0");
    assert_code_is_restored(
        || Server::causes(Runtime::Ruby),
        &["--snapshot", snapshot, "--restore", restore],
        rounds(1),
    );
}

#[real_test]
fn code_of_tokio_is_restored() {
    let start = || {
        let mut command = Command::new(example("deferred_tokio"));
        command.arg("multi");
        DeferringServer::start(command)
    };
    assert_code_is_restored(start, &["--profile", "tokio"], rounds(1));
}
