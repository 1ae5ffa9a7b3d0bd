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
    servers::{self, Server},
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
trait Target: Send {
    fn pid(&self) -> u32;
    fn port(&self) -> u16;
    /// A client that sends requests to this port until it is over, and counts them.
    fn client(&self) -> Client;
}

type Client = fn(port: u16, is_over: &AtomicBool, served: &AtomicU64);

impl Target for DeferringServer {
    fn pid(&self) -> u32 {
        Self::pid(self)
    }

    fn port(&self) -> u16 {
        self.port
    }

    fn client(&self) -> Client {
        |port, is_over, served| {
            let mut connection = BufReader::new(http::connect(port));
            while !is_over.load(Relaxed) {
                send_request(&mut connection, "/job/1");
                served.fetch_add(1, Relaxed);
                pause();
            }
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

    fn client(&self) -> Client {
        |port, is_over, served| {
            while !is_over.load(Relaxed) {
                http::get(port, "/none/0");
                served.fetch_add(1, Relaxed);
                pause();
            }
        }
    }
}

/// How a target is started, and the arguments with which observer attaches to it.
struct Runtime {
    start: fn() -> Box<dyn Target>,
    profile: &'static str,
}

const PYTHON: Runtime = Runtime {
    start: || Box::new(DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py")),
    profile: "asyncio,CPython",
};

const NODE: Runtime =
    Runtime { start: || Box::new(DeferringServer::script("node", "deferred_node.js")), profile: "node" };

/// Functions of the interpreter, because Rage is not available.
const RUBY: Runtime = Runtime {
    start: || Box::new(Server::causes(servers::Runtime::Ruby)),
    profile: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/servers/ruby_fibers.toml"),
};

const TOKIO: Runtime = Runtime {
    start: || {
        let mut command = Command::new(example("deferred_tokio"));
        command.arg("multi");
        Box::new(DeferringServer::start(command))
    },
    profile: "tokio",
};

/// Starts observer on processes; returns once it has started. Its messages are shown.
fn observe(pids: &[u32], end: End, profiles: &str, switch: &Path) -> Process {
    let mut command = Command::new(BINARY);
    command.args(["--no-listen", "--format", "json", "--profile", profiles]);
    for pid in pids {
        command.args(["--pid", &pid.to_string()]);
    }
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

/// Ends one observation of the targets, and checks what it left behind. They are gone afterwards if the end is their
/// exit.
fn end_once(targets: &mut Vec<Box<dyn Target>>, end: End, profiles: &str, log: &mut KernelLog) {
    let folder = tempfile::tempdir().unwrap();
    let switch = folder.path().join("off");
    let pids: Vec<_> = targets.iter().map(|target| target.pid()).collect();
    let mut observer = observe(&pids, end, profiles, &switch);
    let wait_for_removal = || {
        for &pid in &pids {
            wait_for("breakpoints to be removed", || altered_code(pid).is_empty().then_some(()));
        }
    };
    for &pid in &pids {
        wait_for("breakpoints", || (!altered_code(pid).is_empty()).then_some(()));
    }
    match end {
        End::Duration => {}
        End::Interrupt => observer.signal(Signal::SIGINT),
        End::Terminate => observer.signal(Signal::SIGTERM),
        End::Kill => observer.signal(Signal::SIGKILL),
        End::KillSwitch => {
            fs::write(&switch, "").unwrap();
            wait_for_removal();
            observer.signal(Signal::SIGTERM);
        }
        End::TargetExits => targets.clear(),
    }
    wait_for_exit(&mut observer.0, end);
    // observer waits for the removal before it exits. If it is killed, its descriptors are closed after its exit.
    if end == End::Kill {
        wait_for_removal();
    }
    for target in targets.iter() {
        assert_eq!(altered_code(target.pid()), Vec::<String>::new(), "{end:?}");
    }
    let complaints: Vec<_> = log.lines().into_iter().filter(|line| line.contains("uprobe")).collect();
    assert!(complaints.is_empty(), "{end:?}: {complaints:?}");
}

/// Tests all kinds of ends of one observation of servers that are under load.
fn assert_code_is_restored(runtimes: &[Runtime], rounds: usize) {
    let profiles = runtimes.iter().map(|runtime| runtime.profile).collect::<Vec<_>>().join(",");
    let mut log = KernelLog::from_now_on();
    for end in ENDS {
        let mut targets = Vec::new();
        for _ in 0..rounds {
            if targets.is_empty() {
                targets.extend(runtimes.iter().map(|runtime| (runtime.start)()));
            }
            let is_over = &AtomicBool::new(false);
            let clients: Vec<_> =
                targets.iter().map(|target| (target.client(), target.port(), AtomicU64::new(0))).collect();
            thread::scope(|scope| {
                let _stop = StopOnDrop(is_over);
                // A target that exits need not respond.
                if end != End::TargetExits {
                    for (client, port, served) in &clients {
                        scope.spawn(move || client(*port, is_over, served));
                    }
                }
                end_once(&mut targets, end, &profiles, &mut log);
            });
            for (_, port, served) in &clients {
                assert!(
                    served.load(Relaxed) > 0 || end == End::TargetExits,
                    "no request was served at {port}"
                );
            }
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

#[real_test(host_only("the guests test all runtimes at once"))]
fn code_of_python_is_restored() {
    assert_code_is_restored(&[PYTHON], rounds(2));
}

#[real_test(host_only("the guests test all runtimes at once"))]
fn code_of_node_is_restored() {
    assert_code_is_restored(&[NODE], rounds(1));
}

#[real_test(host_only("the guests test all runtimes at once"))]
fn code_of_ruby_is_restored() {
    assert_code_is_restored(&[RUBY], rounds(1));
}

#[real_test(host_only("the guests test all runtimes at once"))]
fn code_of_tokio_is_restored() {
    assert_code_is_restored(&[TOKIO], rounds(1));
}

#[real_test(guest_only("here, each runtime is tested by itself"))]
fn code_of_all_runtimes_is_restored() {
    assert_code_is_restored(&[PYTHON, NODE, RUBY, TOKIO], rounds(1));
}
