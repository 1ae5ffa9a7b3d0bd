//! Stalls of real servers: each is reported once, with the cause that was provoked and the code that caused it.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::support::{
    assert_close, http, is_asleep, is_emulated,
    observer::{Observer, Report, count_between},
    servers::Server,
    wait_for, waits_for_events,
};

/// Number of stalls of a test.
const STALLS: u64 = 23;

/// Sends redis commands one after another, each of which is answered by one line.
fn command(server: &Server, commands: impl Iterator<Item = String>) {
    let mut connection = BufReader::new(http::connect(server.port));
    for command in commands {
        writeln!(connection.get_mut(), "{command}\r").unwrap();
        let mut answer = String::new();
        connection.read_line(&mut answer).unwrap();
        assert!(!answer.starts_with('-'), "{command}: {answer}");
    }
}

fn stalls(report: &Report, pid: u32) -> &Value {
    report.assert_complete();
    &report.reactor(pid)["stalls"]
}

/// Number of recent stalls with this cause.
fn count_of(stalls: &Value, cause: &str) -> usize {
    let recent = stalls["recent"].as_array().unwrap();
    recent.iter().filter(|stall| stall["cause"] == cause).count()
}

#[real_test(quiet, contract)]
fn sleeping_redis_has_cause_sleep() {
    let server = Server::redis();
    let observer = Observer::attach(server.pid());
    command(&server, (0..STALLS).map(|_| "DEBUG SLEEP 0.15".into()));
    command(&server, ["PING".into()].into_iter());
    let report = observer.finish();
    let stalls = stalls(&report, server.pid());
    assert_eq!(stalls["count"], STALLS, "{stalls:#}");
    assert_eq!(count_of(stalls, "sleep"), 23, "{stalls:#}");
    // These cause nearly all of the lag.
    let site = &stalls["sites"][0];
    assert!(site["lag_share"].as_f64().unwrap() > 0.5, "{stalls:#}");
    assert!(site["frames"][0]["function"].as_str().unwrap().contains("nanosleep"), "{stalls:#}");
    assert_eq!(site["syscall"], "clock_nanosleep", "{stalls:#}");
}

/// A single client that waits for its responses sends nothing during a stall.
#[real_test(quiet, contract)]
fn stalls_without_waiting_events_are_no_evidence() {
    let server = Server::redis();
    let pid = server.pid();
    let observer = Observer::attach(pid);
    for _ in 0..STALLS {
        command(&server, ["DEBUG SLEEP 0.1".into()].into_iter());
        wait_for("redis to wait", || waits_for_events(pid, pid).then_some(()));
    }
    let report = observer.finish();
    let stalls = stalls(&report, pid);
    // An emulated redis may be preempted for as long in between.
    assert_eq!(count_of(stalls, "sleep"), 23, "{stalls:#}");
    // The client may close its connection before redis looks again.
    let [waited, nothing_waited, unknown] = evidence(stalls);
    assert_eq!(waited, 0, "{stalls:#}");
    assert!(is_emulated() || nothing_waited > unknown, "{stalls:#}");
    assert_eq!(stalls["late"], 0, "{stalls:#}");
}

/// A second client whose command arrives during the sleep is counted each time.
#[real_test(quiet, contract)]
fn events_that_waited_during_stalls_are_counted() {
    // Longer than any other slice, and long enough for two checks by observer, which gets little CPU time on an emulated
    // machine.
    let (rounds, seconds, longer_than) =
        if is_emulated() { (8, 5.0, 4.294_967_296) } else { (STALLS, 0.2, 0.150_994_944) };
    let server = Server::redis();
    let pid = server.pid();
    let mut waiting = BufReader::new(http::connect(server.port));
    let mut ping = || {
        waiting.get_mut().write_all(b"PING\r\n").unwrap();
        waiting.read_line(&mut String::new()).unwrap();
    };
    ping();
    let observer = Observer::attach(pid);
    for _ in 0..rounds {
        thread::scope(|scope| {
            scope.spawn(|| command(&server, [format!("DEBUG SLEEP {seconds}")].into_iter()));
            wait_for("redis to sleep", || is_asleep(pid, pid).then_some(()));
            ping();
        });
        wait_for("redis to wait", || waits_for_events(pid, pid).then_some(()));
    }
    let report = observer.finish();
    let (stalls, reactor) = (stalls(&report, pid), report.reactor(pid));
    let expected = usize::try_from(rounds).unwrap();
    assert_eq!(count_of(stalls, "sleep"), expected, "{stalls:#}");
    assert_eq!(count_between(&reactor["event_delay"], longer_than, f64::MAX), rounds, "{reactor:#}");
    assert!(reactor["events_delayed"].as_u64().unwrap() >= rounds, "{reactor:#}");
    assert_eq!(evidence(stalls), [expected, 0, 0], "{stalls:#}");
    // An emulated redis may be preempted for as long in between, and then be late as well.
    let recent = stalls["recent"].as_array().unwrap();
    let late = recent.iter().filter(|stall| stall["events_waited"] == true).count();
    assert_eq!(stalls["late"], late, "{stalls:#}");
    assert!(late == expected || is_emulated(), "{stalls:#}");
}

/// A handler that waits for a child process with a loop of its own (libuv's `spawnSync`) blocks the loop that it runs on.
#[real_test(quiet)]
fn loop_inside_a_handler_blocks_the_loop_of_the_server() {
    const BLOCKS: u32 = 10;
    let server = Server::node();
    let pid = server.pid();
    let observer = Observer::attach(pid);
    let blocks = (0..BLOCKS).map(|_| server.block("child", 300)["wall"].as_f64().unwrap());
    let truth: f64 = blocks.sum();
    wait_for("the loop to wait", || waits_for_events(pid, pid).then_some(()));
    let report = observer.finish();
    let reactor = report.reactor(pid);
    let stalls = stalls(&report, pid);
    assert_eq!(count_between(&reactor["slice"], 0.268_435_456, f64::MAX), u64::from(BLOCKS), "{reactor:#}");
    // The slice begins before the handler and ends after it.
    let slack = if is_emulated() { 0.08 } else { 0.01 };
    assert_close("the stalls", stalls["seconds"].as_f64().unwrap(), truth, 0.02, slack * f64::from(BLOCKS));
    let blocked = reactor["split_seconds"]["blocked"]["other"].as_f64().unwrap();
    assert!(blocked > 0.9 * 0.3 * f64::from(BLOCKS), "{reactor:#}");
    let names = |site: &Value| site["frames"].to_string();
    assert!(names(&stalls["sites"][0]).contains("SyncProcessRunner"), "{stalls:#}");
}

/// Numbers of recent stalls that slept during which events waited, none waited, and for which that is unknown.
fn evidence(stalls: &Value) -> [usize; 3] {
    let recent = stalls["recent"].as_array().unwrap();
    [Value::Bool(true), Value::Bool(false), Value::Null].map(|waited| {
        let slept = recent.iter().filter(|stall| stall["cause"] == "sleep");
        slept.filter(|stall| stall["events_waited"] == waited).count()
    })
}

/// Native code that uses the CPU is sampled by the kernel's clock, even if it is stripped.
#[real_test(alone)]
fn redis_listing_a_million_keys_has_cause_cpu() {
    let keys = if is_emulated() { 100_000 } else { 1_000_000 };
    let server = Server::redis();
    command(&server, [format!("DEBUG POPULATE {keys}")].into_iter());
    let threshold = "20ms";
    let pid = server.pid().to_string();
    let observer = Observer::start(&["--pid", &pid, "--no-listen", "--stall-threshold", threshold]);
    for _ in 0..3 {
        // The reply to `KEYS` itself would be a million lines.
        let mut connection = http::connect(server.port);
        connection.write_all(b"EVAL \"return #redis.call('KEYS','*')\" 0\r\n").unwrap();
        BufReader::new(connection).read_line(&mut String::new()).unwrap();
    }
    command(&server, ["PING".into()].into_iter());
    let report = observer.finish();
    let stalls = stalls(&report, server.pid());
    assert!(stalls["count"].as_u64().unwrap() >= 3, "{stalls:#}");
    let computing = count_of(stalls, "cpu") + count_of(stalls, "runqueue");
    assert!(computing >= 3, "{stalls:#}");
    // On an emulated machine, symbolising functions for the first time takes longer than until the next stall.
    let mut frames =
        stalls["sites"].as_array().unwrap().iter().flat_map(|site| site["frames"].as_array().unwrap());
    let is_own = |frame: &Value| frame["module"].as_str().is_some_and(|module| module.starts_with("redis"));
    assert!(frames.any(is_own), "{stalls:#}");
}

/// The lag of a loop that never returns grows within two refreshes, in all outputs.
#[real_test(alone)]
fn lag_of_a_stuck_loop_grows_while_it_is_stuck() {
    let server = Server::asyncio();
    let flame = tempfile::Builder::new().suffix(".svg").tempfile().unwrap();
    let pid = server.pid().to_string();
    let observer = Observer::start(&[
        "--pid",
        &pid,
        "--listen",
        "127.0.0.1:0",
        "--flame",
        flame.path().to_str().unwrap(),
    ]);
    let mut client = http::connect(server.port);
    client.write_all(b"GET /spin/600000 HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    let began = Instant::now();
    thread::sleep(Duration::from_secs(1));
    let sum = || observer.latest_metric("observer_reactor_lag_seconds_sum");
    let first = sum();
    assert!(first > 0.0);
    wait_for("the lag to grow", || (sum() > first).then_some(()));
    assert!(
        is_emulated() || began.elapsed() < Duration::from_millis(2500),
        "it grows after {:?}",
        began.elapsed()
    );
    thread::sleep(Duration::from_millis(500));
    let report = observer.finish();
    let age = began.elapsed().as_secs_f64();
    let reactor = report.reactor(server.pid());
    let longest = reactor["lag"]["max"].as_f64().unwrap();
    assert!(longest > 1.4 && longest < age, "{longest} s, stuck for {age} s: {reactor:#}");
    let site = &reactor["stalls"]["sites"][0];
    assert_eq!(site["frames"][0]["function"], "block", "{reactor:#}");
    assert!(site["lag_share"].as_f64().unwrap() > 0.9, "{reactor:#}");
    // That function is nearly all of the lag-weighted flame graph.
    let graph = std::fs::read_to_string(flame.path()).unwrap();
    assert!(graph.contains("us of mean lag") && graph.contains("block ("), "{graph}");
}

/// Slices below the threshold are not stalls.
#[real_test(quiet)]
fn stall_threshold_is_respected() {
    let server = Server::asyncio();
    let pid = server.pid().to_string();
    for (threshold, count) in [("1s", 0), ("60ms", 5)] {
        let observer = Observer::start(&["--pid", &pid, "--no-listen", "--stall-threshold", threshold]);
        for _ in 0..5 {
            server.block("sleep", 120);
        }
        server.block("none", 0);
        let report = observer.finish();
        assert_eq!(stalls(&report, server.pid())["count"], count, "{:#}", report.0);
    }
}

/// While tokio is idle, one worker waits for events and the others are parked, which delays nothing. While a worker waits
/// for a mutex, none looks for events.
#[real_test(quiet)]
fn tokio_workers_are_blocked_at_a_mutex_but_not_when_parked() {
    const PAUSES: u32 = 8;
    let pause = Duration::from_millis(300);
    let server = Server::tokio(3);
    let observer = Observer::attach(server.pid());
    for _ in 0..PAUSES {
        // Several at once, so that different workers run.
        thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| http::get(server.port, "/")))));
        thread::sleep(pause);
    }
    // Now and then tokio has another worker wait meanwhile. Then nobody is delayed, and there is no stall: a second client
    // shows which it was.
    let delays_others = |_: &u64| {
        thread::scope(|scope| {
            scope.spawn(|| http::get(server.port, "/lock/150"));
            thread::sleep(Duration::from_millis(50));
            let begin = Instant::now();
            http::get(server.port, "/");
            begin.elapsed() >= Duration::from_millis(50)
        })
    };
    let delayed = (0..STALLS).filter(delays_others).count();
    let report = observer.finish();
    report.assert_complete();
    let reactors = report.target(server.pid())["reactors"].as_array().unwrap();
    let [reactor] = &reactors[..] else { panic!("the workers share one loop: {reactors:#?}") };
    assert!(reactor["threads"].as_u64().unwrap() > 1, "workers took no turns: {reactor:#}");
    let locked = count_of(&reactor["stalls"], "lock");
    assert!(locked > 0);
    assert_eq!(locked, delayed, "{reactor:#}");
    let blocked = reactor["split_seconds"]["blocked"]["lock"].as_f64().unwrap();
    let (least, rest) =
        (0.15 * f64::from(u32::try_from(locked).unwrap()), (PAUSES * pause).as_secs_f64() / 4.0);
    assert!((least..least + rest).contains(&blocked), "{blocked} s blocked: {reactor:#}");
    eprintln!("{locked} stalls, {blocked:.3} s blocked by a lock for {least} s");
}

/// A stall of two requests: a known one causes little of it, and one of a connection older than observer causes nearly
/// all.
#[real_test(quiet, links)]
fn stall_is_not_attributed_to_a_request_with_a_small_part() {
    const ROUNDS: usize = 8;
    let server = Server::asyncio();
    let mut older: Vec<_> = (0..2 * ROUNDS).map(|_| http::connect(server.port)).collect();
    // This response shows that they have been accepted.
    http::get(server.port, "/");
    let observer = Observer::attach(server.pid());
    let send = |mut connection: &TcpStream, path: &str| {
        write!(connection, "GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    };
    for pair in older.chunks_mut(2) {
        let mut newer = http::connect(server.port);
        thread::sleep(Duration::from_millis(50));
        send(&pair[0], "/sleep/300");
        thread::sleep(Duration::from_millis(100));
        // Both are read in one slice after that, and continue in the next one.
        send(&newer, "/sleep/20");
        send(&pair[1], "/sleep/120");
        for connection in pair.iter_mut().chain([&mut newer]) {
            connection.read_to_end(&mut Vec::new()).unwrap();
        }
    }
    http::get(server.port, "/sleep/120");
    let report = observer.finish();
    let recent = stalls(&report, server.pid())["recent"].as_array().unwrap();
    // Other stalls of a busy machine are shorter.
    let long = || recent.iter().filter(|stall| stall["seconds"].as_f64().unwrap() >= 0.1);
    assert_eq!(long().count(), 2 * ROUNDS + 1, "{recent:#?}");
    let named: Vec<_> = long().filter_map(|stall| stall["origin"]["path"].as_str()).collect();
    assert_eq!(named, ["/sleep/120"], "{recent:#?}");
}
