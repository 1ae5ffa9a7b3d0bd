//! Event loops that several threads or processes wait on: nobody waits for them while one thread looks.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{
    assert_close, example, http,
    interactive::Interactive,
    is_emulated,
    observer::{Observer, Report},
    servers::Server,
};

/// Number of times that all threads are busy.
const STALLS: u32 = 23;

/// `thread_pool.rs`, and its own account as of its last response.
struct ThreadPool {
    program: Interactive,
    unattended: Duration,
    long: u32,
}

impl ThreadPool {
    fn start(threads: u32) -> Self {
        let mut command = Command::new(example("thread_pool"));
        let mut program = Interactive::start(command.arg(threads.to_string()));
        program.next_line();
        Self { program, unattended: Duration::ZERO, long: 0 }
    }

    /// Has so many threads work for so long.
    fn run(&mut self, count: u32, milliseconds: u32) {
        let account = self.program.request(&format!("{count} {milliseconds}"));
        let (unattended, long) = account.split_once(' ').unwrap();
        self.unattended = Duration::from_nanos(unattended.parse().unwrap());
        self.long = long.parse().unwrap();
    }
}

/// The only event loop of a report.
fn only_loop(report: &Report) -> &Value {
    let targets = report.0["targets"].as_array().unwrap().iter();
    let all: Vec<_> = targets.flat_map(|target| target["reactors"].as_array().unwrap()).collect();
    assert_eq!(all.len(), 1, "{:#}", report.0["targets"]);
    all[0]
}

/// Asserts that the time with and without waiting threads adds up to the time of observation. Threads that wait already
/// are found shortly after that has begun.
fn assert_adds_up(reactor: &Value, report: &Report) {
    let sum = reactor["wait_seconds"].as_f64().unwrap() + reactor["busy_seconds"].as_f64().unwrap();
    let wall = report.0["duration_seconds"].as_f64().unwrap();
    eprintln!("attended and unattended: {sum:.4} s of {wall:.4} s");
    let slack = if is_emulated() { 0.4 } else { 0.05 };
    assert_close("attended and unattended", sum, wall, 0.01, slack);
}

#[real_test(quiet contract)]
fn a_thread_pool_stalls_only_while_all_threads_work() {
    let mut pool = ThreadPool::start(4);
    let observer = Observer::attach(pool.program.pid());
    for _ in 0..10 {
        pool.run(3, 150);
    }
    for _ in 0..STALLS {
        pool.run(4, 150);
    }
    let report = observer.finish();
    report.assert_complete();
    let reactor = only_loop(&report);
    assert_eq!((&reactor["threads"], &reactor["tid"]), (&4.into(), &Value::Null), "{reactor:#}");
    // A busy machine may delay a thread of its own accord.
    assert!(pool.long >= STALLS, "{}", pool.long);
    assert_eq!(reactor["stalls"]["count"], pool.long, "{reactor:#}");
    let recent = reactor["stalls"]["recent"].as_array().unwrap();
    assert_eq!(
        recent.iter().filter(|stall| stall["cause"] == "sleep").count(),
        STALLS as usize,
        "{reactor:#}"
    );
    let busy = reactor["busy_seconds"].as_f64().unwrap();
    assert_close("unattended", busy, pool.unattended.as_secs_f64(), 0.02, 0.02);
    assert_adds_up(reactor, &report);
}

/// Eight threads, with jobs of all lengths and in all numbers.
fn assert_account_is_right(duration: Duration) {
    let mut pool = ThreadPool::start(8);
    let observer = Observer::attach(pool.program.pid());
    let began = Instant::now();
    for n in 0.. {
        if began.elapsed() > duration {
            break;
        }
        pool.run(1 + n * 5 % 8, n * 7 % 31);
    }
    let report = observer.finish();
    report.assert_complete();
    let reactor = only_loop(&report);
    let slack = if is_emulated() { 0.1 } else { 0.03 };
    let busy = reactor["busy_seconds"].as_f64().unwrap();
    eprintln!("unattended: {busy:.4} s, by its own account {:.4} s", pool.unattended.as_secs_f64());
    assert_close("unattended", busy, pool.unattended.as_secs_f64(), 0.03, slack);
    assert_adds_up(reactor, &report);
}

#[real_test(quiet)]
fn attended_and_unattended_time_add_up() {
    assert_account_is_right(Duration::from_secs(8));
}

#[real_test(quiet full)]
fn attended_and_unattended_time_add_up_for_a_minute() {
    assert_account_is_right(Duration::from_secs(60));
}

/// A set that a process inherits is one loop, reported with the process that waited first. While the child waits, the
/// parent may be busy.
#[real_test]
fn a_set_of_two_processes_is_one_event_loop() {
    let script = "import os, select, sys, time\n\
         readable, writable = os.pipe(); epoll = select.epoll(); epoll.register(readable, select.EPOLLIN)\n\
         child = os.fork()\n\
         if not child:\n    os.close(writable); epoll.poll(); os._exit(0)\n\
         epoll.poll(0.1); print(flush=True)\n\
         for _ in sys.stdin:\n    epoll.poll(0.02); time.sleep(0.3); epoll.poll(0.02); print(flush=True)";
    let mut program = Interactive::python(script);
    program.next_line();
    let observer = Observer::attach(program.pid());
    for _ in 0..5 {
        program.request("");
    }
    let report = observer.finish();
    report.assert_complete();
    let reactor = only_loop(&report);
    assert_eq!((&reactor["threads"], &reactor["stalls"]["count"]), (&2.into(), &0.into()), "{reactor:#}");
    assert_adds_up(reactor, &report);
}

/// With `block_in_place`, the thread that waited on the set sleeps, but another one has taken its place. The same sleep
/// without it keeps everybody waiting.
#[real_test]
fn a_tokio_worker_that_hands_its_place_on_delays_nobody() {
    let server = Server::tokio(1);
    let observer = Observer::attach(server.pid());
    for _ in 0..STALLS {
        http::get(server.port, "/handed-over/150");
    }
    for _ in 0..STALLS {
        http::get(server.port, "/sleep/150");
    }
    let report = observer.finish();
    report.assert_complete();
    let reactor = only_loop(&report);
    assert_eq!(reactor["stalls"]["count"], STALLS, "{reactor:#}");
    let sites = reactor["stalls"]["sites"].as_array().unwrap();
    assert!(sites.iter().all(|site| site["cause"] == "sleep"), "{reactor:#}");
}
