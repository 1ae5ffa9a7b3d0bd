//! Which threads are event loops: of each program the right ones, and no others, whatever else its threads wait for.

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

/// Rounds of whatever a program is made to do.
const ROUNDS: u32 = 23;

/// Thread ids of all event loops of all targets.
fn reactors(report: &Report) -> BTreeSet<u32> {
    let targets = report.0["targets"].as_array().unwrap().iter();
    let reactors = targets.flat_map(|target| target["reactors"].as_array().unwrap());
    reactors.map(|reactor| u32::try_from(reactor["tid"].as_u64().unwrap()).unwrap()).collect()
}

/// Observes a server while it works.
fn observe(server: &Server, work: impl FnOnce()) -> Report {
    let observer = Observer::of(server.pid());
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

/// The main thread has to be the only event loop, of several threads.
#[track_caller]
fn assert_only_main(report: &Report, pid: u32) {
    let threads = threads(pid);
    assert!(threads.len() > 1, "there is nothing to tell apart");
    assert_eq!(reactors(report), BTreeSet::from([pid]), "of {threads:?}: {:#}", report.0["targets"]);
}

/// The master waits for signals.
#[real_test]
fn nginx_has_one_in_each_worker() {
    let server = Server::nginx(2);
    let report = observe(&server, || (0..ROUNDS).for_each(|_| drop(http::get(server.port, "/"))));
    assert_eq!(reactors(&report), children(server.pid()).into_iter().collect(), "{:#}", report.0["targets"]);
}

/// Its other threads close files and free memory. Commands that take long are slices as long as they take.
#[real_test(alone)]
fn redis_has_one() {
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
    // Some of the time goes to sending them, in further slices.
    assert!(sum - longest > 0.25 * listing.as_secs_f64(), "listing took {listing:?}: {slice:#}");
}

/// The threads of its pool wait for work, not for events. V8 has a thread with a loop of its own, for what it wants to be
/// done later: that is an event loop, and an idle one.
#[real_test]
fn node_has_one_that_runs() {
    let server = Server::node();
    let report = observe(&server, || (0..ROUNDS).for_each(|_| drop(server.block("pool", 4))));
    let mut waiting = threads(server.pid());
    waiting.retain(|&tid| waits_for_events(server.pid(), tid));
    assert_eq!(reactors(&report), waiting, "{:#}", report.0["targets"]);
    let all = report.target(server.pid())["reactors"].as_array().unwrap().iter();
    let mut running = all.filter(|reactor| reactor["slices"] != 0).map(|reactor| &reactor["tid"]);
    assert_eq!((running.next().unwrap(), running.next()), (&server.pid().into(), None));
}

/// A second thread holds the lock that the first one waits for.
fn assert_has_one(server: &Server) {
    let report = observe(server, || (0..ROUNDS).for_each(|_| drop(server.block("futex", 20))));
    assert_eq!(reactors(&report), BTreeSet::from([server.pid()]), "{:#}", report.0["targets"]);
}

/// epoll itself, asyncio, and Ruby's async.
#[real_test]
fn native_python_and_ruby_loops_have_one() {
    for runtime in [Runtime::Native, Runtime::Python, Runtime::Ruby] {
        assert_has_one(&Server::causes(runtime));
    }
}

#[real_test]
fn uvloop_has_one() {
    assert_has_one(&Server::uvloop());
}

/// Workers take turns in waiting for events; the others sleep, as does the main thread. The pool for blocking calls
/// waits for work.
#[real_test]
fn tokio_has_those_workers_that_wait_for_events() {
    let server = Server::tokio();
    let mut blocking = BTreeSet::new();
    let report = observe(&server, || {
        for _ in 0..ROUNDS {
            let answer: Value = serde_json::from_str(&http::get(server.port, "/")).unwrap();
            blocking.insert(u32::try_from(answer["blocking"].as_u64().unwrap()).unwrap());
        }
    });
    let found = reactors(&report);
    let others = &blocking | &BTreeSet::from([server.pid()]);
    let workers = &threads(server.pid()) - &others;
    assert!(!found.is_empty(), "{:#}", report.0["targets"]);
    assert!(found.is_subset(&workers), "{found:?} of {workers:?}: {:#}", report.0["targets"]);
}

#[real_test]
fn an_io_uring_loop_has_one() {
    let mut acceptor = Acceptor::ring("v4", "single", 128);
    let observer = Observer::of(acceptor.pid());
    acceptor.tell(&format!("connect {ROUNDS}"));
    acceptor.tell(&format!("accept {ROUNDS}"));
    let report = observer.finish();
    report.assert_complete();
    assert_eq!(reactors(&report), BTreeSet::from([acceptor.pid()]), "{:#}", report.0["targets"]);
}

/// Where that is asked for.
#[real_test]
fn a_loop_that_polls_has_one() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/selector_loop.py");
    let mut command = Command::new("/usr/bin/python3");
    let child = command.arg(script).arg("PollSelector").stdin(Stdio::piped()).spawn().unwrap();
    let mut program = Process(child);
    let pid = program.pid().to_string();
    let observer = Observer::start(&["--no-listen", "--pid", &pid, "--reactor-calls", "poll"]);
    program.0.stdin.take().unwrap().write_all(b"go\n").unwrap();
    program.0.wait().unwrap();
    // It ends by itself, for its only target has.
    let report = observer.report();
    report.assert_complete();
    assert_eq!(reactors(&report), BTreeSet::from([program.pid()]), "{:#}", report.0["targets"]);
}

/// The most ids there can be, until it is dropped.
struct MoreIds(String);

impl MoreIds {
    const FILE: &str = "/proc/sys/kernel/pid_max";

    /// At least so many, if that can be changed here.
    fn at_least(ids: u32) -> io::Result<Self> {
        let before = fs::read_to_string(Self::FILE)?;
        if before.trim().parse::<u32>().is_ok_and(|most| most < ids) {
            fs::write(Self::FILE, ids.to_string())?;
        }
        Ok(Self(before))
    }
}

impl Drop for MoreIds {
    fn drop(&mut self) {
        let _there_was_one = fs::write(Self::FILE, &self.0);
    }
}

/// Programs look for a thread by the lower half of its id. Two that have that in common are two, also when one is gone.
#[real_test(alone)]
fn threads_whose_ids_have_half_in_common_are_told_apart() {
    const LAST: &str = "/proc/sys/kernel/ns_last_pid";
    let first = Server::asyncio();
    let id = first.pid() + 0x1_0000;
    let _more = MoreIds::at_least(id + 0x1000)
        .unwrap_or_else(|why| skip(format!("{} cannot be changed: {why}", MoreIds::FILE)));
    let mut tries = 0;
    let second = loop {
        fs::write(LAST, (id - 1).to_string()).unwrap();
        let second = Server::asyncio();
        if second.pid() == id {
            break second;
        }
        tries += 1;
        // Whoever else starts a process meanwhile may be quicker.
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
    // It was ended in one more wait.
    assert_eq!(report.reactor(id)["slices"], of_second, "{:#}", report.0["targets"]);
}
