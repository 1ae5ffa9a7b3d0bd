//! Endurance: processes of many kinds start and exit at random, and process ids are reused. Meanwhile, servers that
//! stay are counted exactly. After that, observer must not keep anything of processes that have exited: no entries in
//! maps, no descriptors, no memory. OBSERVER_TEST_CHURN sets the duration.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, killpg},
    },
    unistd::Pid,
};
use serde_json::Value;

use crate::support::{
    LIMIT,
    acceptor::Acceptor,
    example, exit_within, http,
    interactive::Interactive,
    is_emulated, is_full,
    observer::Observer,
    servers::{Server, free_port},
    wait_for,
};

/// Load and duration of the test.
struct Scale {
    time: Duration,
    /// Number of concurrent processes that start and exit.
    crowd: usize,
    /// Number of event loops of the process that has many.
    loops: u64,
}

impl Scale {
    fn chosen() -> Self {
        match std::env::var("OBSERVER_TEST_CHURN") {
            Ok(time) => {
                let time =
                    humantime::parse_duration(&time).expect("OBSERVER_TEST_CHURN is a time, such as 10m");
                Self { time, crowd: 300, loops: 2_000 }
            }
            Err(_) if is_emulated() => Self { time: Duration::from_secs(30), crowd: 8, loops: 50 },
            Err(_) if is_full() => Self { time: Duration::from_secs(20), crowd: 60, loops: 500 },
            Err(_) => Self { time: Duration::from_secs(8), crowd: 40, loops: 200 },
        }
    }
}

/// Serves and connects to itself for ever.
const PYTHON: &str = "
import asyncio, gc, threading, select, socket
async def main():
    async def serve(reader, writer): writer.close()
    server = await asyncio.start_server(serve, '127.0.0.1', 0)
    port = server.sockets[0].getsockname()[1]
    while True:
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        await reader.read(); writer.close(); gc.collect(0)
        await asyncio.sleep(0.3)
asyncio.run(main())
";

const NODE: &str = "
const http = require('node:http');
const server = http.createServer((request, response) => setTimeout(() => response.end(), 5));
server.listen(0, '127.0.0.1', () => setInterval(() => http.get({ host: '127.0.0.1', port: server.address().port }, r => r.resume()), 300));
";

const RUBY: &str = "
require 'socket'
server = TCPServer.new('127.0.0.1', 0)
Thread.new { loop { TCPSocket.new('127.0.0.1', server.addr[1]).close; sleep 0.3 } }
loop { IO.select([server]); server.accept.close; GC.start }
";

const MANY_LOOPS: &str = "
import select, socket, threading, time
a, b = socket.socketpair()
threading.stack_size(65536)
def wait():
    e = select.epoll(); e.register(b, select.EPOLLIN)
    while True: e.poll(0.5)
for _ in range(30): threading.Thread(target=wait, daemon=True).start()
time.sleep(1000)
";

/// Number of kinds of processes that start and exit.
const KINDS: usize = 10;

fn start(kind: usize, folder: &Path, number: u64) -> Child {
    let (python, unix) = ("/usr/bin/python3", folder.join(format!("{number}")));
    let mut command = match kind {
        0 => {
            let mut redis = Command::new("redis-server");
            let unix = unix.display().to_string();
            redis.args(["--port", "0", "--unixsocket", &unix, "--save", "", "--appendonly", "no"]);
            redis
        }
        1 => {
            let (dir, config) = (folder.display(), folder.join(format!("{number}.conf")));
            let text = format!(
                "daemon off; user root; worker_processes 2; pid {dir}/{number}.pid; error_log /dev/null;
                 events {{ }}
                 http {{
                   access_log off; client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy;
                   fastcgi_temp_path {dir}/fastcgi; uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
                   server {{ listen 127.0.0.1:{}; location / {{ return 200 'ok'; }} }}
                 }}",
                free_port()
            );
            fs::write(&config, text).unwrap();
            let mut nginx = Command::new("nginx");
            nginx.args(["-e", "/dev/null", "-c"]).arg(config);
            nginx
        }
        2 => script(python, "-c", PYTHON),
        3 => script("node", "-e", NODE),
        4 => script("/usr/bin/ruby", "-e", RUBY),
        5 => Command::new(example("tokio_server")),
        6 => script(python, "-c", MANY_LOOPS),
        7 => script("sh", "-c", "for i in 1 2 3 4 5 6 7 8; do (true) & done; wait"),
        // A process that replaces its program several times; the last program is a server.
        8 => {
            let mut chain = script("sh", "-c", "exec sh -c 'exec \"$0\" \"$@\"' \"$0\" \"$@\"");
            chain.args([python, "-c", PYTHON]);
            chain
        }
        _ => Command::new("true"),
    };
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // In a process group of its own, so that all of its descendants can be killed. It is killed when this thread ends.
    // SAFETY: makes one system call between fork and exec.
    unsafe { quiet.process_group(0).pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
    quiet.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn script(program: &str, flag: &str, text: &str) -> Command {
    let mut command = Command::new(program);
    command.args([flag, text]);
    command
}

/// Ends a process with all of its children: with SIGTERM if `is_graceful`, otherwise with SIGKILL.
fn end(mut child: Child, is_graceful: bool) {
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let is_over = is_graceful && {
        let _gone = killpg(group, Signal::SIGTERM);
        exit_within(&mut child, Duration::from_secs(3)).is_some()
    };
    let _gone = killpg(group, Signal::SIGKILL);
    if !is_over {
        child.wait().unwrap();
    }
}

/// Counts of processes that were started.
#[derive(Default)]
struct Tally {
    started: AtomicU64,
    /// Started with a process id that was used before.
    reused: AtomicU64,
    ids: Mutex<HashSet<u32>>,
}

/// Starts and ends processes at random until `stop`, up to `crowd` at a time.
fn churn(crowd: usize, folder: &Path, stop: &AtomicBool, tally: &Tally) {
    let mut alive: Vec<Child> = Vec::new();
    while !stop.load(Relaxed) {
        let number = tally.started.fetch_add(1, Relaxed);
        if number.is_multiple_of(4)
            && let Some(id) = tally.ids.lock().unwrap().iter().next().copied()
        {
            // Makes the next process reuse a process id, unless another process takes it first.
            let _not_here = fs::write("/proc/sys/kernel/ns_last_pid", (id - 1).to_string());
        }
        let child = start(fastrand::usize(..KINDS), folder, number);
        tally.reused.fetch_add((!tally.ids.lock().unwrap().insert(child.id())).into(), Relaxed);
        alive.push(child);
        if fastrand::u8(..4) == 0 {
            thread::sleep(Duration::from_millis(fastrand::u64(..100)));
        }
        while alive.len() > fastrand::usize(crowd / 2..=crowd) {
            end(alive.swap_remove(fastrand::usize(..alive.len())), fastrand::bool());
        }
    }
    alive.into_iter().for_each(|child| end(child, false));
}

/// A process with many event loops, each of which runs one slice per request.
struct Loops {
    program: Interactive,
}

impl Loops {
    fn new(count: u64) -> Self {
        let script = format!(
            "
import os, select, sys, threading, time
threading.stack_size(65536)
events, done = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range({count})], [0] * {count}
def run(number):
    epoll = select.epoll(); epoll.register(events[number], select.EPOLLIN)
    while True:
        epoll.poll(); os.eventfd_read(events[number]); done[number] += 1
for number in range({count}): threading.Thread(target=run, args=[number], daemon=True).start()
print(flush=True)
rounds = 0
for line in sys.stdin:
    rounds += 1
    for event in events: os.eventfd_write(event, 1)
    end = time.monotonic() + 60
    while min(done) < rounds:
        if time.monotonic() > end: os._exit(1)
        time.sleep(0.01)
    print(flush=True)
"
        );
        let mut program = Interactive::python(&script);
        program.next_line();
        Self { program }
    }

    /// Runs one slice in each loop.
    fn run_slices(&mut self) {
        self.program.request("");
    }
}

/// Resources that observer holds.
#[derive(Debug)]
struct Resources {
    /// Number of entries by map, for maps that grow with observed processes.
    maps: BTreeMap<String, usize>,
    descriptors: usize,
    memory: u64,
}

impl Resources {
    fn by(observer: &Observer) -> Self {
        let maps = maps().map(|(name, id)| (name, keys(id).len())).collect();
        let descriptors = fs::read_dir(format!("/proc/{}/fd", observer.pid())).unwrap().count();
        Self { maps, descriptors, memory: observer.memory() }
    }
}

fn bpftool(arguments: &[&str]) -> Vec<Value> {
    let output = Command::new("bpftool").arg("-j").args(arguments).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// Names and ids of the maps that grow with observed processes. The map of rejected processes is not included, because
/// it is an LRU map that stays full.
fn maps() -> impl Iterator<Item = (String, String)> {
    bpftool(&["map", "show"]).into_iter().filter(|map| map["type"] == "hash").map(|map| {
        let name = map["name"].as_str().unwrap_or_default().to_owned();
        (name, map["id"].to_string())
    })
}

/// First 32 bits of each key, which is the id of a process or thread in many maps.
fn keys(map: String) -> Vec<u32> {
    let byte = |text: &Value| u8::from_str_radix(&text.as_str().unwrap()[2..], 16).unwrap();
    let entries = bpftool(&["map", "dump", "id", &map]).into_iter();
    let keys =
        entries.map(|entry| entry["key"].as_array().unwrap().iter().take(4).map(byte).collect::<Vec<_>>());
    keys.map(|key| u32::from_le_bytes(key.try_into().unwrap())).collect()
}

/// Maps whose keys are ids of processes or threads.
const BY_ID: &[&str] = &[
    "TARGETS",
    "THREADS",
    "POOLS",
    "ACCEPTING",
    "CONNECTING",
    "WORK",
    "GC_BEGUN",
    "GC_PAUSES",
    "GC_TOTALS",
    "FOLLOWED",
];

/// Entries of maps whose process or thread no longer exists.
fn stale_entries() -> Vec<(String, u32)> {
    let by_id = maps().filter(|(name, _)| BY_ID.contains(&name.as_str()));
    let all = by_id.flat_map(|(name, id)| keys(id).into_iter().map(move |key| (name.clone(), key)));
    all.filter(|(_, key)| !Path::new(&format!("/proc/{key}")).exists()).collect()
}

/// CPU time of observer, in seconds.
fn cpu(observer: &Observer) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", observer.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u32 = fields[11..13].iter().map(|ticks| ticks.parse::<u32>().unwrap()).sum();
    f64::from(ticks) / 100.0
}

/// Tolerated growth: other processes of this machine start and exit as well, and the counters of a limited number of
/// exited processes are kept for the report.
const OTHER_PROCESSES: usize = 20;
const MEMORY_GROWTH: u64 = 96 << 20;

#[real_test(alone, userspace)]
#[expect(clippy::too_many_lines, reason = "one scenario with one load")]
fn process_churn_leaks_nothing() {
    let scale = Scale::chosen();
    let files = tempfile::tempdir().unwrap();
    let observer = Observer::start(&["--all", "--capacity", "4096", "--listen", "127.0.0.1:0"]);
    let (redis, nginx, node) = (Server::redis(), Server::nginx(2), Server::node());
    let mut acceptors: Vec<_> = ["v4", "v6", "unix"].map(|kind| Acceptor::new(kind, "accept4", 64)).into();
    let mut loops = Loops::new(scale.loops);
    let scrape = || observer.scrape();
    wait_for("the remaining servers to be observed", || {
        scrape().contains(&format!("pid=\"{}\"", loops.program.pid())).then_some(())
    });
    thread::sleep(Duration::from_secs(6));
    let (before, cpu_before) = (Resources::by(&observer), cpu(&observer));
    eprintln!("before: {before:?}");

    let (stop, tally, begin) = (AtomicBool::new(false), Tally::default(), Instant::now());
    let (mut rounds, mut node_connections) = (0_u64, 0);
    thread::scope(|scope| {
        let end = StopOnDrop(&stop);
        for _ in 0..2 {
            scope.spawn(|| churn(scale.crowd / 2, files.path(), &stop, &tally));
        }
        let mut shown = Instant::now();
        while begin.elapsed() < scale.time {
            for acceptor in &mut acceptors {
                assert_eq!(acceptor.request("connect 5"), 5);
                assert_eq!(acceptor.request("accept 5"), 5);
                acceptor.request("hang_up");
            }
            http::connect(redis.port);
            http::get(nginx.port, "/");
            http::get(node.port, "/");
            node_connections += 1;
            loops.run_slices();
            rounds += 1;
            if shown.elapsed() > scale.time / 20 {
                shown = Instant::now();
                let descriptors = fs::read_dir(format!("/proc/{}/fd", observer.pid())).unwrap().count();
                eprintln!(
                    "| {:.0} s | {} started | {} ids again | {:.1} % CPU | {} MiB | {descriptors} descriptors |",
                    begin.elapsed().as_secs_f64(),
                    tally.started.load(Relaxed),
                    tally.reused.load(Relaxed),
                    (cpu(&observer) - cpu_before) / begin.elapsed().as_secs_f64() * 100.0,
                    observer.memory() >> 20
                );
            }
            thread::sleep(Duration::from_millis(100));
        }
        drop(end);
    });
    let elapsed = begin.elapsed().as_secs_f64();
    let (started, reused) = (tally.started.into_inner(), tally.reused.into_inner());
    eprintln!(
        "{started} processes and their children in {elapsed:.0} s, {reused} of them with an id of one before"
    );

    // The kernel takes a while to remove the uprobes of each runtime. Other processes of this machine exit meanwhile,
    // too.
    let (patience, gone) = (Instant::now() + 2 * LIMIT, stale_entries());
    loop {
        let kept: Vec<_> = stale_entries().into_iter().filter(|entry| gone.contains(entry)).collect();
        if kept.is_empty() {
            break;
        }
        assert!(Instant::now() < patience, "kept of those that are gone: {kept:?}");
        thread::sleep(Duration::from_secs(1));
    }
    // A kernel under load takes up to a third of a second for each descriptor, and a long churn leaves a thousand.
    let mut held = usize::MAX;
    while held > before.descriptors + OTHER_PROCESSES {
        held = wait_for("the next uprobe to be detached", || {
            let descriptors = fs::read_dir(format!("/proc/{}/fd", observer.pid())).unwrap().count();
            (descriptors < held).then_some(descriptors)
        });
    }
    eprintln!("all forgotten {:.1} s after the last was ended", begin.elapsed().as_secs_f64() - elapsed);
    // This test listens, so it is observed itself. So is each bpftool that it starts, until the next refresh.
    let after = wait_for("maps and descriptors to return to their previous number", || {
        let after = Resources::by(&observer);
        eprintln!("after: {after:?}");
        let mut maps = after.maps.iter();
        let is_small = maps.all(|(map, entries)| *entries <= before.maps[map] + OTHER_PROCESSES)
            && after.descriptors <= before.descriptors + OTHER_PROCESSES;
        is_small.then_some(after)
    });
    assert!(after.memory <= before.memory + MEMORY_GROWTH, "{} bytes", after.memory);

    let (redis_accepts, nginx_accepts) = (redis.redis_accepts(), nginx.nginx_accepts());
    // Threads that have finished their slice may still be about to wait.
    thread::sleep(Duration::from_millis(500));
    let report = observer.finish();
    for lost in report.0["self"]["lost"].as_array().unwrap() {
        assert_eq!(lost["count"], 0, "{lost}");
    }
    assert_eq!(report.listener(redis.port)["accepts"], redis_accepts);
    assert_eq!(report.listener(nginx.port)["accepts"], nginx_accepts);
    assert_eq!(report.listener(node.port)["accepts"], node_connections);
    for (acceptor, before) in acceptors.iter().zip(["127.0.0.1:", "[::1]:", "unix:"]) {
        let address = format!("{before}{}", acceptor.address());
        let listeners = report.listeners(&address);
        assert_eq!(listeners.len(), 1, "{address}");
        assert_eq!(listeners[0]["accepts"], rounds * 5, "{address}");
    }
    let reactors = report.target(loops.program.pid())["reactors"].as_array().unwrap();
    let exact = reactors.iter().filter(|reactor| reactor["slices"] == rounds).count();
    assert_eq!(exact as u64, scale.loops, "of {} loops, each with {rounds} slices", reactors.len());
    eprintln!(
        "exact: {redis_accepts} of redis, {nginx_accepts} of nginx, {node_connections} of node, {rounds} slices of each of {exact} loops"
    );
}

/// Stops the churn when the test fails.
struct StopOnDrop<'s>(&'s AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
