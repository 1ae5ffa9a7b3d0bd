//! Which threads count as event loops: the right ones of each program and no others, whatever else its threads wait
//! for.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::harness::skip;
use crate::support::{
    Process,
    acceptor::Acceptor,
    http, is_emulated,
    observer::{Observer, Report},
    servers::{Runtime, Server, children},
    waits_for_events,
};

/// Number of requests of a test.
const ROUNDS: u32 = 23;

/// Thread ids of all event loops of all targets.
fn reactors(report: &Report) -> BTreeSet<u32> {
    let targets = report.0["targets"].as_array().unwrap().iter();
    let reactors = targets.flat_map(|target| target["reactors"].as_array().unwrap());
    reactors.map(|reactor| u32::try_from(reactor["tid"].as_u64().unwrap()).unwrap()).collect()
}

/// Observes a server during `work`.
fn observe(server: &Server, work: impl FnOnce()) -> Report {
    let observer = Observer::attach(server.pid());
    work();
    let report = observer.finish();
    report.assert_complete();
    report
}

/// Threads of a process, as the kernel lists them.
fn threads(pid: u32) -> BTreeSet<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
}

/// Asserts that the main thread is the only event loop of a process with several threads.
#[track_caller]
fn assert_only_main(report: &Report, pid: u32) {
    let threads = threads(pid);
    assert!(threads.len() > 1, "there is nothing to tell apart");
    assert_eq!(reactors(report), BTreeSet::from([pid]), "of {threads:?}: {:#}", report.0["targets"]);
}

/// The master waits only for signals.
#[real_test]
fn each_nginx_worker_has_one_event_loop() {
    let server = Server::nginx(2);
    let report = observe(&server, || (0..ROUNDS).for_each(|_| drop(http::get(server.port, "/"))));
    assert_eq!(reactors(&report), children(server.pid()).into_iter().collect(), "{:#}", report.0["targets"]);
}

/// redis's other threads close files and free memory. Long commands are slices of the same length.
#[real_test(alone)]
fn redis_has_one_event_loop() {
    let keys = if is_emulated() { 100_000 } else { 1_000_000 };
    let server = Server::redis();
    let run = |commands: &str| {
        let mut connection = http::connect(server.port);
        let began = Instant::now();
        connection.write_all(format!("{commands}\r\nQUIT\r\n").as_bytes()).unwrap();
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).unwrap();
        (answer, began.elapsed())
    };
    run(&format!("DEBUG POPULATE {keys}"));
    let mut listing = Duration::ZERO;
    let report = observe(&server, || {
        let (answer, took) = run("KEYS *");
        assert!(answer.starts_with(format!("*{keys}\r\n").as_bytes()), "these are not all keys");
        listing = took;
        run("DEBUG SLEEP 1");
        run("FLUSHALL ASYNC");
    });
    assert_only_main(&report, server.pid());
    let slice = &report.reactor(server.pid())["slice"];
    let (longest, sum) = (slice["max"].as_f64().unwrap(), slice["sum"].as_f64().unwrap());
    assert!((1.0..1.5).contains(&longest), "{slice:#}");
    // Part of the time is spent on sending the keys, in other slices.
    assert!(sum - longest > 0.25 * listing.as_secs_f64(), "listing took {listing:?}: {slice:#}");
}

/// The threads of Node's pool wait for work, not for events. V8 has a thread with an event loop for delayed tasks,
/// which is idle.
#[real_test]
fn node_has_one_active_event_loop() {
    let server = Server::node();
    let report = observe(&server, || (0..ROUNDS).for_each(|_| drop(server.block("pool", 4))));
    let mut waiting = threads(server.pid());
    waiting.retain(|&tid| waits_for_events(server.pid(), tid));
    assert_eq!(reactors(&report), waiting, "{:#}", report.0["targets"]);
    let all = report.target(server.pid())["reactors"].as_array().unwrap().iter();
    let mut running = all.filter(|reactor| reactor["slices"] != 0).map(|reactor| &reactor["tid"]);
    assert_eq!((running.next().unwrap(), running.next()), (&server.pid().into(), None));
}

/// Asserts that the main thread is the only event loop while it waits for a lock that another thread holds.
fn assert_one_event_loop(server: &Server) {
    let report = observe(server, || (0..ROUNDS).for_each(|_| drop(server.block("futex", 20))));
    assert_eq!(reactors(&report), BTreeSet::from([server.pid()]), "{:#}", report.0["targets"]);
}

/// epoll itself, asyncio, and Ruby's async.
#[real_test]
fn native_python_and_ruby_servers_have_one_event_loop() {
    for runtime in [Runtime::Native, Runtime::Python, Runtime::Ruby] {
        assert_one_event_loop(&Server::causes(runtime));
    }
}

#[real_test]
fn uvloop_has_one_event_loop() {
    assert_one_event_loop(&Server::uvloop());
}

/// The workers take turns in waiting for events, so they are one loop. The pool for blocking calls waits for work.
#[real_test]
fn tokio_workers_share_one_event_loop() {
    let server = Server::tokio(3);
    let mut blocking = BTreeSet::new();
    let report = observe(&server, || {
        for _ in 0..ROUNDS {
            let answer: Value = serde_json::from_str(&http::get(server.port, "/")).unwrap();
            blocking.insert(u32::try_from(answer["blocking"].as_u64().unwrap()).unwrap());
        }
    });
    let found = report.target(server.pid())["reactors"].as_array().unwrap();
    let others = &blocking | &BTreeSet::from([server.pid()]);
    let workers = &threads(server.pid()) - &others;
    let [reactor] = &found[..] else { panic!("{found:#?}") };
    let first: u32 = reactor["id"].as_str().unwrap().parse().unwrap();
    assert!(workers.contains(&first), "{first} of {workers:?}: {reactor:#}");
    let count = reactor["threads"].as_u64().unwrap();
    assert!((1..=workers.len() as u64).contains(&count), "{count} of {workers:?}: {reactor:#}");
}

#[real_test]
fn io_uring_server_has_one_event_loop() {
    let mut acceptor = Acceptor::ring("v4", "single", 128);
    let observer = Observer::attach(acceptor.pid());
    acceptor.request(&format!("connect {ROUNDS}"));
    acceptor.request(&format!("accept {ROUNDS}"));
    let report = observer.finish();
    report.assert_complete();
    assert_eq!(reactors(&report), BTreeSet::from([acceptor.pid()]), "{:#}", report.0["targets"]);
}

/// `poll` counts as a wait only with `--reactor-calls poll`.
#[real_test]
fn poll_loop_is_an_event_loop_on_request() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/selector_loop.py");
    let mut command = Command::new("/usr/bin/python3");
    let child = command.arg(script).arg("PollSelector").stdin(Stdio::piped()).spawn().unwrap();
    let mut program = Process(child);
    let pid = program.pid().to_string();
    let observer = Observer::start(&["--no-listen", "--pid", &pid, "--reactor-calls", "poll"]);
    program.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
    program.0.wait().unwrap();
    // observer ends because its only target has exited.
    let report = observer.report();
    report.assert_complete();
    assert_eq!(reactors(&report), BTreeSet::from([program.pid()]), "{:#}", report.0["targets"]);
}

/// Raises the maximum pid until it is dropped.
struct PidMax(String);

impl PidMax {
    const FILE: &str = "/proc/sys/kernel/pid_max";

    /// Raises the maximum to at least `ids`.
    fn at_least(ids: u32) -> io::Result<Self> {
        let before = fs::read_to_string(Self::FILE)?;
        if before.trim().parse::<u32>().is_ok_and(|most| most < ids) {
            fs::write(Self::FILE, ids.to_string())?;
        }
        Ok(Self(before))
    }
}

impl Drop for PidMax {
    fn drop(&mut self) {
        let _ignored = fs::write(Self::FILE, &self.0);
    }
}

/// Programs find a thread by the lower half of its id. Two threads with the same lower half are distinguished, also after
/// one has exited.
#[real_test(alone)]
fn threads_with_the_same_lower_id_bits_are_distinguished() {
    const LAST: &str = "/proc/sys/kernel/ns_last_pid";
    let first = Server::asyncio();
    let id = first.pid() + 0x1_0000;
    let _more = PidMax::at_least(id + 0x1000)
        .unwrap_or_else(|why| skip(format!("{} cannot be changed: {why}", PidMax::FILE)));
    let mut tries = 0;
    let second = loop {
        fs::write(LAST, (id - 1).to_string()).unwrap();
        let second = Server::asyncio();
        if second.pid() == id {
            break second;
        }
        tries += 1;
        // Another process may take the pid first.
        assert!(tries < 50, "others are always quicker");
    };
    let servers = [&first, &second];
    servers.iter().for_each(|server| server.wait_until_idle());
    let [before, before_second] = servers.map(Server::waits);
    let pids = [first.pid(), id].map(|pid| pid.to_string());
    let observer = Observer::start(&["--pid", &pids[0], "--pid", &pids[1], "--listen", "127.0.0.1:0"]);
    for round in 0..ROUNDS {
        servers[usize::from(round % 3 == 0)].block("none", 0);
    }
    second.wait_until_idle();
    let of_second = second.waits() - before_second;
    drop(second);
    for _ in 0..ROUNDS {
        first.block("none", 0);
    }
    first.wait_until_idle();
    let of_first = first.waits() - before;
    let report = observer.finish();
    report.assert_complete();
    assert_eq!(report.reactor(first.pid())["waits"], of_first, "{:#}", report.0["targets"]);
    // It was killed during one more wait.
    assert_eq!(report.reactor(id)["slices"], of_second, "{:#}", report.0["targets"]);
}
