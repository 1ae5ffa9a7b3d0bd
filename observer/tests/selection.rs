//! Processes that are not given by their ids: found when they are there, noticed when they come, let go if nobody wants them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::harness::skip;
use crate::support::{
    acceptor::Acceptor,
    http, is_emulated,
    observer::{Observer, Report},
    servers::{Server, free_port},
    wait_for,
};

/// Known operations.
const CONNECTIONS: u32 = 23;

fn select(criteria: &[&str]) -> Observer {
    Observer::start(&[criteria, &["--no-listen"]].concat())
}

fn is_target(report: &Report, pid: u32) -> bool {
    report.0["targets"].as_array().unwrap().iter().any(|target| target["pid"] == pid)
}

/// A cgroup of our own, empty again when it ends.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Skips the test where there are no cgroups of version 2.
    fn new() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let root = mounts.find(|mount| mount[2] == "cgroup2").map(|mount| mount[1].to_owned());
        let root = root.unwrap_or_else(|| skip("no cgroups of version 2 are mounted"));
        let path = Path::new(&root).join(format!("observer-test-{}", std::process::id()));
        fs::create_dir_all(path.join("inner")).unwrap();
        Self(path)
    }

    fn take(&self, pid: u32) {
        fs::write(self.0.join("inner/cgroup.procs"), pid.to_string()).unwrap();
    }

    /// As `/proc` names it.
    fn name(&self) -> String {
        format!("/{}", self.0.file_name().unwrap().to_string_lossy())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        wait_for("the cgroup to be empty", || {
            let is_gone = fs::remove_dir(self.0.join("inner")).is_ok() && fs::remove_dir(&self.0).is_ok();
            is_gone.then_some(())
        });
    }
}

#[real_test]
fn whoever_is_there_is_found() {
    let (wanted, other) = (Server::redis(), Server::asyncio());
    let port = wanted.port.to_string();
    let executable = fs::read_link(format!("/proc/{}/exe", wanted.pid())).unwrap();
    let program = executable.file_name().unwrap().to_str().unwrap();
    for criteria in [
        ["--comm", "redis-server"],
        ["--exe", program],
        ["--exe", executable.to_str().unwrap()],
        ["--port", &port],
    ] {
        let observer = select(&criteria);
        for _ in 0..CONNECTIONS {
            http::connect(wanted.port);
        }
        let accepts = wanted.redis_accepts();
        let report = observer.finish();
        assert!(is_target(&report, wanted.pid()) && !is_target(&report, other.pid()), "{criteria:?}");
        let seen = report.listener(wanted.port)["accepts"].as_u64().unwrap();
        // One by which it was asked; those from before observer are its own count's alone.
        assert_eq!(seen, u64::from(CONNECTIONS) + 1, "{criteria:?}, {accepts} by its own count");
    }
}

#[real_test]
fn whoever_is_in_a_cgroup_is_found() {
    let cgroup = Cgroup::new();
    let (wanted, other) = (Server::asyncio(), Server::asyncio());
    cgroup.take(wanted.pid());
    let observer = select(&["--cgroup", &cgroup.name()]);
    wanted.block("sleep", 100);
    let report = observer.finish();
    assert!(is_target(&report, wanted.pid()) && !is_target(&report, other.pid()));
    assert_eq!(report.listener(wanted.port)["accepts"], 1);
}

/// From its very first connection, whatever it is selected by.
#[real_test(alone)]
fn whoever_comes_is_observed_at_once() {
    for criteria in [&["--all"][..], &["--exe", "/usr/bin/python3*"]] {
        let observer = select(criteria);
        let mut acceptor = Acceptor::new("v4", "accept4", 64);
        assert_eq!(acceptor.tell(&format!("connect {CONNECTIONS}")), CONNECTIONS);
        assert_eq!(acceptor.tell(&format!("accept {CONNECTIONS}")), CONNECTIONS);
        // Until it is decided about.
        thread::sleep(Duration::from_secs(2));
        let report = observer.finish();
        report.assert_complete();
        let port = acceptor.place().parse().unwrap();
        assert_eq!(report.listener(port)["accepts"], CONNECTIONS, "{criteria:?}");
        assert_eq!(report.listener(port)["wait"]["count"], CONNECTIONS, "{criteria:?}");
    }
}

/// It is observed until observer has looked at it, and leaves nothing behind.
#[real_test(alone)]
fn whoever_is_not_wanted_is_let_go() {
    let observer = select(&["--port", &free_port().to_string()]);
    let kept = || ["TARGETS", "THREADS", "LISTENERS"].map(|map| observer.entries_of(map));
    let server = Server::asyncio();
    server.block("sleep", 60);
    wait_for("it to be let go", || (kept() == [0; 3]).then_some(()));
    // What it does later does not bring it back.
    for _ in 0..5 {
        server.block("sleep", 60);
    }
    assert_eq!(kept(), [0; 3]);
    let report = observer.finish();
    assert_eq!(report.0["targets"].as_array().unwrap().len(), 0, "{:#}", report.0);
}

/// A child of one that is selected is a target, though it would not be selected by itself.
#[real_test]
fn children_of_those_selected_are_followed() {
    let server = Server::nginx(2);
    let observer = select(&["--port", &server.port.to_string()]);
    http::get(server.port, "/");
    let report = observer.finish();
    let workers = crate::support::servers::children(server.pid());
    assert_eq!(workers.len(), 2);
    assert!(workers.iter().all(|&worker| is_target(&report, worker)), "{:#}", report.0);
}

/// What comes and goes: the shell's children, servers that are killed, programs that start others in their place.
fn storm(until: &AtomicBool) -> u64 {
    let mut rounds = 0_u64;
    let quiet = |command: &mut Command| -> Child {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    while !until.load(Ordering::Relaxed) {
        let mut children = vec![
            quiet(Command::new("sh").args(["-c", "for i in 1 2 3 4 5 6 7 8; do (true) & done; wait"])),
            quiet(Command::new("sh").args(["-c", "exec sh -c 'exec sleep 0.05'"])),
            quiet(Command::new("/usr/bin/python3").args(["-c", SHORT_LIVED])),
            quiet(Command::new("/usr/bin/python3").args(["-c", &format!("{SHORT_LIVED}; time.sleep(60)")])),
        ];
        thread::sleep(Duration::from_millis(rounds % 7 * 60));
        children[3].kill().unwrap();
        for mut child in children {
            child.wait().unwrap();
        }
        rounds += 1;
    }
    rounds
}

/// Listens, waits for events with several threads, and is gone.
const SHORT_LIVED: &str = "
import select, socket, threading, time
s = socket.create_server(('127.0.0.1', 0))
def wait():
    e = select.epoll(); e.register(s); e.poll(0.02)
for _ in range(4):
    threading.Thread(target=wait, daemon=True).start()
time.sleep(0.01)
";

/// Those that stay are counted exactly in the middle of it, and nothing of the others is kept.
#[real_test(alone)]
fn survivors_of_a_storm_are_exact() {
    let time = Duration::from_secs(if is_emulated() { 20 } else { 12 });
    let observer = Observer::start(&["--all", "--listen", "127.0.0.1:0"]);
    let end = AtomicBool::new(false);
    let (rounds, mut acceptors, redis, connections) = thread::scope(|scope| {
        let storms = [scope.spawn(|| storm(&end)), scope.spawn(|| storm(&end))];
        let begin = Instant::now();
        let mut acceptors: Vec<_> =
            ["v4", "v6", "unix"].map(|kind| Acceptor::new(kind, "accept4", 64)).into();
        let redis = Server::redis();
        let mut connections = 0;
        while begin.elapsed() < time {
            for acceptor in &mut acceptors {
                assert_eq!(acceptor.tell("connect 5"), 5);
                assert_eq!(acceptor.tell("accept 5"), 5);
            }
            connections += 5;
            http::connect(redis.port);
            thread::sleep(Duration::from_millis(100));
        }
        end.store(true, Ordering::Relaxed);
        (storms.map(|storm| storm.join().unwrap()), acceptors, redis, connections)
    });
    eprintln!("{rounds:?} rounds of processes that came and went, {connections} connections each");
    // Whoever asks for them is observed for a moment as well.
    let then = observed();
    wait_for("those that are gone to be forgotten", || {
        let now = observed();
        let is_there = |pid: &u32| Path::new(&format!("/proc/{pid}")).exists();
        then.iter().all(|pid| !now.contains(pid) || is_there(pid)).then_some(())
    });
    assert!(!observed().contains(&observer.pid()), "it observes itself");
    let accepts = redis.redis_accepts();
    let report = observer.finish();
    report.assert_complete();
    for acceptor in &mut acceptors {
        let place = acceptor.place();
        let address = match place.parse::<u16>() {
            Ok(_) if report.listeners(&format!("127.0.0.1:{place}")).len() == 1 => {
                format!("127.0.0.1:{place}")
            }
            Ok(_) => format!("[::1]:{place}"),
            Err(_) => format!("unix:{place}"),
        };
        let listeners = report.listeners(&address);
        assert_eq!(listeners.len(), 1, "{address} in {:#}", report.0);
        assert_eq!(listeners[0]["accepts"], connections, "{address}");
    }
    assert_eq!(report.listener(redis.port)["accepts"].as_u64(), Some(accepts));
}

/// Ids of the processes that the programs keep.
fn observed() -> Vec<u32> {
    let output = Command::new("bpftool").args(["-j", "map", "dump", "name", "TARGETS"]).output().unwrap();
    let entries: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let byte = |text: &serde_json::Value| u8::from_str_radix(&text.as_str().unwrap()[2..], 16).unwrap();
    let bytes =
        entries.iter().map(|entry| entry["key"].as_array().unwrap().iter().map(byte).collect::<Vec<_>>());
    bytes.map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())).collect()
}
