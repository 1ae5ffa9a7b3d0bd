//! Targets in other namespaces and containers than observer, and targets that change: with another program after an
//! exec, with other names, with reused ids.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::skip;
use crate::{
    container::Container,
    support::{
        http,
        interactive::Interactive,
        observer::{Observer, Report},
        servers::{Server, children},
        wait_for,
    },
};

/// Number of connections of a test.
const CONNECTIONS: usize = 23;

/// Functions on the stack of the site with the largest share of the lag, in the main thread of a target.
fn functions(report: &Report, pid: u32) -> Vec<String> {
    let frames = report.reactor(pid)["stalls"]["sites"][0]["frames"].as_array().cloned().unwrap_or_default();
    frames.iter().map(|frame| frame["function"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Port that a server in a container has written to a file.
fn port(folder: &tempfile::TempDir) -> u16 {
    wait_for("a port", || fs::read_to_string(folder.path().join("port")).ok()?.trim().parse().ok())
}

/// CPython with asyncio in a container, with files and ids of its own, is observed like any other process.
#[real_test]
fn runtime_in_a_container_is_observed() {
    let folder = tempfile::tempdir().unwrap();
    let container = Container::running(
        "/usr/bin/python3 /scripts/asyncio_server.py /data/waits > /data/port",
        folder.path(),
    );
    let (port, pid) = (port(&folder), container.pid().unwrap());
    let observer = Observer::attach(pid);
    let get = |path: &str| {
        let url = format!("http://127.0.0.1:{port}/{path}");
        container.tool(&["busybox", "wget", "-q", "-O", "-", &url], "")
    };
    for number in 1..=CONNECTIONS {
        let answer: Value = serde_json::from_str(&get("")).unwrap();
        assert_eq!(answer["connections"], number);
    }
    get("sleep/1000");
    // This response shows that the slice has ended.
    get("");
    let report = observer.finish();
    report.assert_complete();
    let target = report.target(pid);
    assert_eq!(target["container"], container.id, "{target:#}");
    assert!(target["exe"].as_str().unwrap().starts_with("/usr/bin/python3"), "{target:#}");
    assert_eq!(report.listener(port)["accepts"], CONNECTIONS + 2, "{target:#}");
    assert_eq!(report.listener(port)["wait"]["count"], CONNECTIONS + 2, "{target:#}");
    let reactor = report.reactor(pid);
    assert_eq!(reactor["stalls"]["count"], 1, "{reactor:#}");
    assert_eq!(reactor["name"], "python3", "{reactor:#}");
    let functions = functions(&report, pid);
    assert!(functions.iter().any(|function| function.contains("block")), "{functions:?}");
    assert!(functions.iter().any(|function| function.contains("run_until_complete")), "{functions:?}");
}

/// Deferred tasks of a server in a container are linked with the same profile, and its collections are counted.
#[real_test(links)]
fn deferred_tasks_in_a_container_are_linked() {
    const JOBS: usize = 5;
    let folder = tempfile::tempdir().unwrap();
    let container = Container::running(
        "/usr/bin/python3 /scripts/deferred_asyncio.py /data/truth > /data/port",
        folder.path(),
    );
    let (port, pid) = (port(&folder), container.pid().unwrap());
    let observer =
        Observer::start(&["--pid", &pid.to_string(), "--no-listen", "--profile", "cpython,asyncio"]);
    for job in 0..JOBS {
        let url = format!("http://127.0.0.1:{port}/job/{job}");
        container.tool(&["busybox", "wget", "-q", "-O", "-", &url], "");
    }
    let truth = wait_for("the work to be done", || {
        let before = fs::read_to_string(folder.path().join("truth")).ok()?;
        thread::sleep(Duration::from_millis(500));
        let after = fs::read_to_string(folder.path().join("truth")).ok()?;
        (before == after && !after.is_empty()).then(|| after.lines().count())
    });
    let report = observer.finish();
    report.assert_complete();
    let deferred = report.target(pid)["deferred"].as_array().unwrap();
    let links: Vec<&Value> = deferred.iter().flat_map(|d| d["links"].as_array().unwrap()).collect();
    let of_jobs =
        links.iter().filter(|link| link["origin"]["path"].as_str().is_some_and(|p| p.starts_with("/job/")));
    let of_jobs = of_jobs.count();
    eprintln!("{truth} tasks by the server's own count, {of_jobs} links");
    assert!(of_jobs >= truth, "{deferred:#?}");
    assert!(report.target(pid)["gc"]["count"].as_u64().is_some(), "{:#}", report.target(pid)["gc"]);
}

#[real_test]
fn redis_in_a_container_is_counted_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let container =
        Container::running("/usr/bin/redis-server --port 6379 --save '' --appendonly no", folder.path());
    let pid = container.pid().unwrap();
    let send_command =
        |what: &str| container.tool(&["busybox", "nc", "127.0.0.1", "6379"], &format!("{what}\r\nQUIT\r\n"));
    wait_for("redis", || send_command("PING").contains("PONG").then_some(()));
    let count = || -> u64 {
        let answer = send_command("INFO stats");
        let line = answer.lines().find_map(|line| line.strip_prefix("total_connections_received:")).unwrap();
        line.trim().parse().unwrap()
    };
    let observer = Observer::attach(pid);
    let before = count();
    for _ in 0..CONNECTIONS {
        send_command("PING");
    }
    let after = count();
    let report = observer.finish();
    report.assert_complete();
    // Includes the connection of the first count.
    let listeners = report.target(pid)["listeners"].as_array().unwrap();
    let accepts: u64 = listeners.iter().map(|listener| listener["accepts"].as_u64().unwrap()).sum();
    assert_eq!(accepts, after - before + 1, "{listeners:#?}");
    assert!(report.target(pid)["exe"].as_str().unwrap().contains("redis"), "{:#}", report.0);
    assert_eq!(report.target(pid)["comm"], "redis-server");
}

/// pid, network, UTS, IPC and mount namespaces of its own, without a container.
#[real_test]
fn target_in_its_own_namespaces_is_counted_exactly() {
    let script = "ip link set lo up; exec /usr/bin/python3 \"$@\"";
    let server = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/asyncio_server.py");
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    command
        .args([
            "--fork",
            "--kill-child",
            "--pid",
            "--mount-proc",
            "--net",
            "--uts",
            "--ipc",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .arg(server)
        .arg(folder.path().join("waits"));
    let mut unshare = Interactive::start(&mut command);
    let port: u16 = unshare.next_line().parse().unwrap();
    let pid = children(unshare.pid())[0];
    let get = |path: &str| {
        let url = format!("http://127.0.0.1:{port}/{path}");
        let arguments = ["-t", &pid.to_string(), "-n", "busybox", "wget", "-q", "-O", "-", &url];
        assert!(Command::new("nsenter").args(arguments).stdout(Stdio::null()).status().unwrap().success());
    };
    for selector in [["--pid".to_owned(), pid.to_string()], ["--port".into(), port.to_string()]] {
        let selector: Vec<&str> = selector.iter().map(String::as_str).collect();
        let observer = Observer::start(&[&selector[..], &["--no-listen"]].concat());
        get("spin/150");
        // The first of these responses shows that the slice has ended.
        for _ in 1..CONNECTIONS {
            get("");
        }
        let report = observer.finish();
        report.assert_complete();
        assert_eq!(report.listener(port)["accepts"], CONNECTIONS, "{:#}", report.0);
        let reactor = report.reactor(pid);
        assert_eq!(reactor["stalls"]["count"], 1, "{reactor:#}");
        let functions = functions(&report, pid);
        assert!(functions.iter().any(|function| function.contains("block")), "{functions:?}");
    }
}

/// The second program has another name, garbage collector and functions. State of the first one does not interfere.
#[real_test]
fn program_after_an_exec_is_recognised() {
    const NODE: &str = "const http = require('node:http'); let n = 0; \
        const s = http.createServer((q, r) => { for (let i = 0; i < 3; i++) gc(); r.end(String(++n)); }); \
        s.listen(0, '127.0.0.1', () => console.log(s.address().port));";
    let script = format!(
        "import asyncio, gc, os, sys\n\
         async def main():\n    gc.collect(); await asyncio.sleep(0.01); gc.collect(); print('ready', flush=True)\n\
         \x20   await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)\n\
         \x20   gc.collect(); os.execvp('node', ['node', '--expose-gc', '-e', {NODE:?}])\n\
         asyncio.run(main())"
    );
    let mut process = Interactive::python(&script);
    process.next_line();
    let pid = process.pid();
    let observer = Observer::start(&["--pid", &pid.to_string(), "--listen", "127.0.0.1:0"]);
    let port: u16 = process.request("").parse().unwrap();
    wait_for("the runtime to be recognised", || {
        let scrape = observer.scrape();
        let start = format!("observer_gc_pause_seconds_count{{pid=\"{pid}\",comm=\"node\"");
        scrape.lines().any(|line| line.starts_with(&start)).then_some(())
    });
    for number in 1..=CONNECTIONS {
        assert_eq!(http::get(port, "/"), number.to_string());
    }
    let report = observer.finish();
    report.assert_complete();
    let target = report.target(pid);
    assert_eq!(target["comm"], "node", "{target:#}");
    assert!(target["exe"].as_str().unwrap().ends_with("node"), "{target:#}");
    assert_eq!(report.reactor(pid)["name"], "node");
    assert_eq!(report.listener(port)["accepts"], CONNECTIONS);
    // Only the collections of the second program, and at least those that were requested.
    let collections = target["gc"]["count"].as_u64().unwrap_or_else(|| panic!("no gc: {target:#}"));
    assert!(collections >= 3 * CONNECTIONS as u64, "{collections} collections");
}

#[real_test]
fn thread_has_its_latest_name() {
    let script = "
import select, socket, sys, threading
a, b = socket.socketpair()
def wait():
    epoll = select.epoll(); epoll.register(b, select.EPOLLIN)
    while True: epoll.poll(0.1)
thread = threading.Thread(target=wait, daemon=True); thread.start()
def rename(name):
    with open(f'/proc/self/task/{thread.native_id}/comm', 'w') as file: file.write(name)
rename('first'); print(thread.native_id, flush=True); sys.stdin.readline()
rename('second'); print(flush=True); sys.stdin.readline()
";
    let mut process = Interactive::python(script);
    let tid: u32 = process.next_line().parse().unwrap();
    let pid = process.pid();
    let observer = Observer::start(&["--pid", &pid.to_string(), "--listen", "127.0.0.1:0"]);
    let has_name = |name: &str| {
        let scrape = observer.scrape();
        scrape.lines().any(|line| line.contains(&format!("loop=\"{tid}\",reactor=\"{name}\"")))
    };
    wait_for("the first name of the thread", || has_name("first").then_some(()));
    process.request("");
    wait_for("the second name of the thread", || has_name("second").then_some(()));
    assert!(!has_name("first"));
    let report = observer.finish();
    let reactors = report.target(pid)["reactors"].as_array().unwrap();
    assert!(
        reactors.iter().any(|reactor| reactor["tid"] == tid && reactor["name"] == "second"),
        "{reactors:#?}"
    );
}

/// Two processes with the same pid, one after the other, have separate counts.
#[real_test(alone)]
fn process_with_a_reused_pid_is_a_new_target() {
    const LAST: &str = "/proc/sys/kernel/ns_last_pid";
    let observer = Observer::start(&["--all", "--listen", "127.0.0.1:0"]);
    let first = Server::asyncio();
    let (pid, first_port) = (first.pid(), first.port);
    http::get(first_port, "/");
    let is_reported = |port: u16, accepts: u64| {
        let scrape = observer.scrape();
        let end = format!("listener=\"127.0.0.1:{port}\"}} {accepts}");
        let family = "observer_accept_queue_accepts_total{";
        scrape.lines().any(|line| {
            line.starts_with(family) && line.contains(&format!("pid=\"{pid}\"")) && line.ends_with(&end)
        })
    };
    wait_for("the first to be reported", || is_reported(first_port, 1).then_some(()));
    first.process.signal(Signal::SIGKILL);
    drop(first);
    // Another process may take the pid first.
    let mut tries = 0;
    let second = loop {
        if fs::write(LAST, (pid - 1).to_string()).is_err() {
            skip(format!("cannot write {LAST}"));
        }
        let second = Server::asyncio();
        if second.pid() == pid {
            break second;
        }
        tries += 1;
        assert!(tries < 50, "others are always quicker");
    };
    http::get(second.port, "/");
    second.block("sleep", 100);
    wait_for("the second to be reported", || is_reported(second.port, 2).then_some(()));
    // The series of a process end with it, even if its pid is reused.
    assert!(!is_reported(first_port, 1));
    let report = observer.finish();
    let all = report.0["targets"].as_array().unwrap().iter().filter(|target| target["pid"] == pid);
    let (gone, there): (Vec<_>, Vec<_>) = all.partition(|target| target["exited"] == true);
    assert_eq!((gone.len(), there.len()), (1, 1), "{:#}", report.0);
    assert_eq!(gone[0]["listeners"][0]["accepts"], 1, "{:#}", gone[0]);
    assert_eq!(there[0]["listeners"][0]["accepts"], 2, "{:#}", there[0]);
    assert_eq!(there[0]["reactors"][0]["stalls"]["count"], 1, "{:#}", there[0]);
}
