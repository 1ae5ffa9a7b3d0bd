//! Selection of processes by criteria: existing ones are found, new ones are noticed, and others are released.

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

/// Number of connections of a test.
const CONNECTIONS: u32 = 23;

fn select(criteria: &[&str]) -> Observer {
    Observer::start(&[criteria, &["--no-listen"]].concat())
}

fn is_target(report: &Report, pid: u32) -> bool {
    report.0["targets"].as_array().unwrap().iter().any(|target| target["pid"] == pid)
}

/// A new cgroup that is removed when it is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Skips the test if cgroup v2 is not mounted.
    fn new() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let root = mounts.find(|mount| mount[2] == "cgroup2").map(|mount| mount[1].to_owned());
        let root = root.unwrap_or_else(|| skip("cgroup v2 is not mounted"));
        let path = Path::new(&root).join(format!("observer-test-{}", std::process::id()));
        fs::create_dir_all(path.join("inner")).unwrap();
        Self(path)
    }

    fn take(&self, pid: u32) {
        fs::write(self.0.join("inner/cgroup.procs"), pid.to_string()).unwrap();
    }

    /// Its path in `/proc/PID/cgroup`.
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
fn existing_processes_are_selected() {
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
        // Including the connection of the count. Connections from before observer attached are only in the server's own
        // count.
        assert_eq!(seen, u64::from(CONNECTIONS) + 1, "{criteria:?}, {accepts} by its own count");
    }
}

#[real_test]
fn processes_in_a_cgroup_are_selected() {
    let cgroup = Cgroup::new();
    let (wanted, other) = (Server::asyncio(), Server::asyncio());
    cgroup.take(wanted.pid());
    let observer = select(&["--cgroup", &cgroup.name()]);
    wanted.block("sleep", 100);
    let report = observer.finish();
    assert!(is_target(&report, wanted.pid()) && !is_target(&report, other.pid()));
    assert_eq!(report.listener(wanted.port)["accepts"], 1);
}

/// A new process is observed from its first connection on, whatever the criterion.
#[real_test(alone)]
fn new_process_is_observed_from_its_first_connection() {
    for criteria in [&["--all"][..], &["--exe", "/usr/bin/python3*"]] {
        let observer = select(criteria);
        let mut acceptor = Acceptor::new("v4", "accept4", 64);
        assert_eq!(acceptor.request(&format!("connect {CONNECTIONS}")), CONNECTIONS);
        assert_eq!(acceptor.request(&format!("accept {CONNECTIONS}")), CONNECTIONS);
        // Until the process has been evaluated.
        thread::sleep(Duration::from_secs(2));
        let report = observer.finish();
        report.assert_complete();
        let port = acceptor.address().parse().unwrap();
        assert_eq!(report.listener(port)["accepts"], CONNECTIONS, "{criteria:?}");
        assert_eq!(report.listener(port)["wait"]["count"], CONNECTIONS, "{criteria:?}");
    }
}

/// A candidate is observed until it has been evaluated. No entries of it stay.
#[real_test(alone)]
fn rejected_process_is_released() {
    let observer = select(&["--port", &free_port().to_string()]);
    let kept = || ["TARGETS", "THREADS", "LISTENERS"].map(|map| observer.map_entries(map));
    let server = Server::asyncio();
    server.block("sleep", 60);
    wait_for("the process to be released", || (kept() == [0; 3]).then_some(()));
    // Later activity does not make it a candidate again.
    for _ in 0..5 {
        server.block("sleep", 60);
    }
    assert_eq!(kept(), [0; 3]);
    let report = observer.finish();
    assert_eq!(report.0["targets"].as_array().unwrap().len(), 0, "{:#}", report.0);
}

/// Children of selected processes are targets, even if they do not match.
#[real_test]
fn children_of_selected_processes_are_targets() {
    let server = Server::nginx(2);
    let observer = select(&["--port", &server.port.to_string()]);
    http::get(server.port, "/");
    let report = observer.finish();
    let workers = crate::support::servers::children(server.pid());
    assert_eq!(workers.len(), 2);
    assert!(workers.iter().all(|&worker| is_target(&report, worker)), "{:#}", report.0);
}

/// Starts and ends processes: children of a shell, servers that are killed, and processes that exec other programs.
fn churn(until: &AtomicBool) -> u64 {
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

/// Listens, waits for events with several threads, and exits.
const SHORT_LIVED: &str = "
import select, socket, threading, time
s = socket.create_server(('127.0.0.1', 0))
def wait():
    e = select.epoll(); e.register(s); e.poll(0.02)
for _ in range(4):
    threading.Thread(target=wait, daemon=True).start()
time.sleep(0.01)
";

/// Servers that stay are counted exactly meanwhile, and no entries of the others stay.
#[real_test(alone)]
fn remaining_servers_are_exact_during_process_churn() {
    let time = Duration::from_secs(if is_emulated() { 20 } else { 12 });
    let observer = Observer::start(&["--all", "--listen", "127.0.0.1:0"]);
    let end = AtomicBool::new(false);
    let (rounds, mut acceptors, redis, connections) = thread::scope(|scope| {
        let churns = [scope.spawn(|| churn(&end)), scope.spawn(|| churn(&end))];
        let begin = Instant::now();
        let mut acceptors: Vec<_> =
            ["v4", "v6", "unix"].map(|kind| Acceptor::new(kind, "accept4", 64)).into();
        let redis = Server::redis();
        let mut connections = 0;
        while begin.elapsed() < time {
            for acceptor in &mut acceptors {
                assert_eq!(acceptor.request("connect 5"), 5);
                assert_eq!(acceptor.request("accept 5"), 5);
            }
            connections += 5;
            http::connect(redis.port);
            thread::sleep(Duration::from_millis(100));
        }
        end.store(true, Ordering::Relaxed);
        (churns.map(|churn| churn.join().unwrap()), acceptors, redis, connections)
    });
    eprintln!("{rounds:?} rounds of processes that came and went, {connections} connections each");
    // The processes that read the map are observed for a moment as well.
    let then = target_pids();
    wait_for("targets that have exited to be removed", || {
        let now = target_pids();
        let is_there = |pid: &u32| Path::new(&format!("/proc/{pid}")).exists();
        then.iter().all(|pid| !now.contains(pid) || is_there(pid)).then_some(())
    });
    assert!(!target_pids().contains(&observer.pid()), "it observes itself");
    let accepts = redis.redis_accepts();
    let report = observer.finish();
    report.assert_complete();
    for acceptor in &mut acceptors {
        let port_or_path = acceptor.address();
        let address = match port_or_path.parse::<u16>() {
            Ok(_) if report.listeners(&format!("127.0.0.1:{port_or_path}")).len() == 1 => {
                format!("127.0.0.1:{port_or_path}")
            }
            Ok(_) => format!("[::1]:{port_or_path}"),
            Err(_) => format!("unix:{port_or_path}"),
        };
        let listeners = report.listeners(&address);
        assert_eq!(listeners.len(), 1, "{address} in {:#}", report.0);
        assert_eq!(listeners[0]["accepts"], connections, "{address}");
    }
    assert_eq!(report.listener(redis.port)["accepts"].as_u64(), Some(accepts));
}

/// Pids in the map of targets.
fn target_pids() -> Vec<u32> {
    let output = Command::new("bpftool").args(["-j", "map", "dump", "name", "TARGETS"]).output().unwrap();
    let entries: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let byte = |text: &serde_json::Value| u8::from_str_radix(&text.as_str().unwrap()[2..], 16).unwrap();
    let bytes =
        entries.iter().map(|entry| entry["key"].as_array().unwrap().iter().map(byte).collect::<Vec<_>>());
    bytes.map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())).collect()
}
