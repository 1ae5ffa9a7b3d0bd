//! Deferred tasks of an application of Rage, which is not part of this repository. OBSERVER_RAGE names a folder with an
//! executable `run` that executes Ruby with the application and its arguments, and has the same /tmp as this process.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    ops::Range,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::skip;
use crate::support::{
    deferred::{CLIENTS, DeferringServer, GROUND_TRUTH, TaskRecord, assert_links_correct, compare},
    http,
    observer::{Observer, Report},
    servers::{children, free_port},
    wait_for,
};

/// Maximum differences between observed and logged waits and runs, in seconds: for half of the tasks, and for 99 % of
/// them, whose thread may have lost its CPU in between.
const SLACK: f64 = 0.002;
const SLACK_P99: f64 = 0.02;

/// Number of tasks of a job of kind `hold`.
const HELD: usize = 500;

/// Folder of Rage; skips the test if there is none.
fn folder() -> PathBuf {
    let folder = std::env::var_os("OBSERVER_RAGE").map(PathBuf::from);
    folder.unwrap_or_else(|| skip("OBSERVER_RAGE is not set"))
}

/// Starts the application with this number of workers, and with the state that a previous run left in its folder.
fn start(rage: &Path, files: Arc<TempDir>, workers: usize, options: &[(&str, String)]) -> DeferringServer {
    let mut command = Command::new(rage.join("run"));
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/deferred_rage.rb"))
        .arg(free_port().to_string())
        .arg(files.path().join(GROUND_TRUTH))
        .arg(workers.to_string())
        .arg(files.path().join("application"))
        .envs(options.iter().map(|(name, value)| (name, value)));
    let server = DeferringServer::start_in(files, command);
    wait_for("Rage", || TcpStream::connect(("127.0.0.1", server.port)).ok());
    if workers > 1 {
        wait_for("Rage's workers", || (children(server.pid()).len() >= workers).then_some(()));
    }
    server
}

fn start_new(rage: &Path, workers: usize) -> DeferringServer {
    start(rage, Arc::new(tempfile::tempdir().unwrap()), workers, &[])
}

/// Whether Rage supports bursts: before Ruby 3.2, features that it needs are incomplete, and it hangs in bursts.
fn supports_bursts(server: &DeferringServer) -> bool {
    let version = http::get(server.port, "/version");
    eprintln!("Rage on Ruby {version}");
    !version.starts_with("3.1")
}

/// Whether Rage's request ids are where the profile expects them, which is the case from Ruby 3.2 on.
fn has_request_ids(server: &DeferringServer) -> bool {
    !http::get(server.port, "/version").starts_with("3.1")
}

/// Kinds of jobs, and how many tasks each defers.
const KINDS: [(&str, usize); 10] = [
    ("now", 1),
    ("delay", 1),
    ("chain", 3),
    ("retry", 2),
    ("park", 3),
    ("late", 1),
    ("await", 2),
    ("lock", 1),
    ("after", 1),
    ("none", 0),
];

/// Kind of a job: some are bursts, or compact memory.
fn kind_of(job: usize, bursts: bool) -> (&'static str, usize) {
    if job % 97 == 13 {
        ("compact", 2)
    } else if job % 31 == 7 && bursts {
        ("burst", 50)
    } else {
        KINDS[job % KINDS.len()]
    }
}

/// Sends jobs that defer this number of tasks. If bursts are not supported, sends a tenth of that, one job at a time.
fn load(server: &DeferringServer, tasks: usize) {
    let bursts = supports_bursts(server);
    let wanted = if bursts { tasks } else { tasks / 10 };
    let (mut jobs, mut count) = (0, 0);
    while count < wanted {
        count += kind_of(jobs, bursts).1;
        jobs += 1;
    }
    server.send(0..jobs, if bursts { CLIENTS } else { 1 }, |job| kind_of(job, bursts).0);
    server.wait_for_tasks(count);
}

/// Compares links with the application's log.
fn assert_links(what: &str, report: &Report, pids: &[u32], server: &DeferringServer) {
    let records = server.records();
    let comparison = compare(report, pids, &records, true, |task| Some(task.to_owned()));
    assert_links_correct(what, report, pids, &comparison, records.len());
    let expected = if has_request_ids(server) { comparison.matched } else { 0 };
    assert_eq!(comparison.request_ids, expected, "{comparison:?}");
    for errors in [&comparison.waits, &comparison.runs] {
        assert!(errors.quantile(0.5) <= SLACK, "{comparison:?}");
        assert!(errors.quantile(0.99) <= SLACK_P99, "{comparison:?}");
    }
}

#[real_test(alone, links)]
fn tasks_are_linked_to_their_requests() {
    let rage = folder();
    let server = start_new(&rage, 1);
    let observer = server.observe("rage");
    load(&server, 10_000);
    assert_links("Rage", &observer.finish(), &[server.pid()], &server);
}

#[real_test(alone, links)]
fn client_request_ids_are_complete_or_missing() {
    let rage = folder();
    let server = start_new(&rage, 1);
    if !has_request_ids(&server) {
        skip("this Rage has no request ids");
    }
    let observer = server.observe("rage");
    let uuid = "f81d4fae-7dec-11d0-a765-00a0c91e6bf6".to_owned();
    let ids = [uuid, "a".into(), "b".repeat(46), "c".repeat(47), "d".repeat(200), "e".repeat(300)];
    for (job, id) in ids.iter().enumerate() {
        let mut connection = http::connect(server.port);
        let head =
            format!("GET /job/{job}?how=now HTTP/1.1\r\nHost: test\r\nConnection: close\r\nX-Request-Id: ");
        write!(connection, "{head}{id}\r\n\r\n").unwrap();
        connection.read_to_end(&mut Vec::new()).unwrap();
    }
    server.wait_for_tasks(ids.len());
    let report = observer.finish();
    let records = server.records();
    let comparison = compare(&report, &[server.pid()], &records, true, |task| Some(task.to_owned()));
    assert_links_correct("Rage's clients' request ids", &report, &[server.pid()], &comparison, ids.len());
    assert!(records.iter().any(|record| record.request_id.as_ref() == Some(&ids[0])), "{records:?}");
    assert_eq!((comparison.request_ids, comparison.missing_request_ids), (3, 3), "{comparison:?}");
}

#[real_test(alone, links)]
fn tasks_of_several_workers_are_linked() {
    let rage = folder();
    let server = start_new(&rage, 2);
    let workers = children(server.pid());
    let observer = server.observe("rage");
    load(&server, 10_000);
    assert_links("Rage with two workers", &observer.finish(), &workers, &server);
}

#[real_test(alone, links)]
fn two_runtimes_do_not_disturb_each_other() {
    let folder = folder();
    let rage = start_new(&folder, 1);
    let python = DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
    let (pid, other) = (rage.pid().to_string(), python.pid().to_string());
    let observer =
        Observer::start(&["--pid", &pid, "--pid", &other, "--no-listen", "--profile", "rage,asyncio"]);
    thread::scope(|scope| {
        let port = python.port;
        scope.spawn(move || (0..200).for_each(|job| http::get_many(port, &format!("/job/{job}"), 1)));
        load(&rage, 2000);
    });
    python.wait_for_tasks(200 * 15);
    let report = observer.finish();
    assert_links("Rage beside asyncio", &report, &[rage.pid()], &rage);
    let records = python.records();
    let comparison = compare(&report, &[python.pid()], &records, false, |task| Some(task.to_owned()));
    assert_links_correct("asyncio beside Rage", &report, &[python.pid()], &comparison, records.len());
}

/// Waits until the application pauses for the given time; returns its own count of pending tasks then.
fn backlog(server: &DeferringServer, time: usize) -> u64 {
    wait_for("the application to pause", || {
        let text = fs::read_to_string(server.folder().join(format!("{GROUND_TRUTH}.backlog"))).ok()?;
        text.lines().nth(time)?.parse().ok()
    })
}

/// Sum of all pending tasks in a fresh scrape.
fn pending(observer: &Observer) -> u64 {
    // Metrics may be slightly out of date.
    thread::sleep(Duration::from_millis(300));
    let scrape = observer.scrape();
    let series = scrape.lines().filter(|line| line.starts_with("observer_deferred_pending{"));
    series.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

/// Starts an application that a test will request a burst of tasks from; skips the test if bursts are not supported.
fn start_for_burst() -> (PathBuf, DeferringServer) {
    let rage = folder();
    let server = start_new(&rage, 1);
    if !supports_bursts(&server) {
        skip("Rage hangs in bursts on this Ruby, with or without observer");
    }
    (rage, server)
}

/// Requests a burst of tasks; the response arrives on the connection.
fn burst(server: &DeferringServer) -> TcpStream {
    let mut connection = http::connect(server.port);
    connection.write_all(b"GET /job/0?how=hold HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    connection
}

#[real_test(alone, links)]
fn pending_tasks_equal_the_backlog_of_rage() {
    let (_, server) = start_for_burst();
    let observer = Observer::start(&["--pid", &server.pid().to_string(), "--listen", "127.0.0.1:0"]);
    let _connection = burst(&server);
    let all = backlog(&server, 0);
    assert_eq!(pending(&observer), all);
    let rest = backlog(&server, 1);
    assert_eq!(pending(&observer), rest);
    eprintln!("| pending | {all} when all were enqueued, {rest} halfway | both as Rage counts them |");
    assert_eq!(all, HELD as u64);
    assert!((1..all).contains(&rest), "{rest}");
    server.wait_for_tasks(HELD);
    assert_eq!(pending(&observer), 0);
    assert_links("a burst of Rage's", &observer.finish(), &[server.pid()], &server);
}

/// Sum of a field over all kinds of tasks.
fn sum(report: &Report, pid: u32, field: &str) -> u64 {
    let kinds = report.target(pid)["deferred"].as_array().unwrap();
    kinds.iter().map(|kind| kind[field].as_u64().unwrap()).sum()
}

#[real_test(alone, links)]
fn tasks_that_never_start_are_orphaned_and_have_no_link_after_a_restart() {
    let (rage, server) = start_for_burst();
    let observer = server.observe("rage");
    for job in LATER {
        http::get(server.port, &format!("/job/{job}?how=later"));
    }
    // Until they are stored on disk.
    thread::sleep(Duration::from_secs(1));
    let _connection = burst(&server);
    backlog(&server, 0);
    let rest = backlog(&server, 1);
    let pid = server.pid();
    let files = server.kill();
    let report = observer.report();
    report.assert_complete();
    let orphaned = sum(&report, pid, "orphaned");
    // Tasks with a delay are not in the backlog.
    let never_started = rest + LATER.count() as u64;
    eprintln!("| killed | {orphaned} orphans, {never_started} had not started |");
    assert_eq!(orphaned, never_started);
    assert_eq!(sum(&report, pid, "pending"), 0);
    let kinds = report.target(pid)["deferred"].as_array().unwrap().iter();
    let links = kinds.flat_map(|kind| kind["links"].as_array().unwrap());
    let never_ran = links.filter(|link| link["run_seconds"].is_null()).count();
    assert_eq!(never_ran as u64, never_started);

    // Tasks that were stored on disk run now. Their requests are not known any more.
    let again = start(&rage, files, 1, &[]);
    let observer = again.observe("rage");
    again.send(NEW, CLIENTS, |_| "now");
    wait_for("the last task of the previous run", || {
        let records = again.records();
        let is_done = |job| records.iter().any(|record: &TaskRecord| record.request == format!("{job}"));
        LATER.chain(NEW).all(is_done).then_some(())
    });
    thread::sleep(Duration::from_millis(500));
    let report = observer.finish();
    let new: Vec<_> = again.records().into_iter().filter(|record| is_among(record, NEW)).collect();
    let comparison = compare(&report, &[again.pid()], &new, true, |task| Some(task.to_owned()));
    assert_links_correct("Rage started again", &report, &[again.pid()], &comparison, NEW.count());
    let unmatched = report.target(again.pid())["unmatched"].as_u64().unwrap();
    eprintln!("| restarted | {unmatched} tasks of the previous run are unmatched |");
    assert!(unmatched >= LATER.count() as u64, "{unmatched}");
    let names: Vec<_> = report.target(again.pid())["deferred"].as_array().unwrap().iter().collect();
    assert!(names.iter().all(|kind| kind["task"] == "Short" || kind["links"] == json!([])), "{names:?}");
}

/// Jobs whose tasks are left for the next run, and jobs of the next run.
const LATER: Range<usize> = 1..6;
const NEW: Range<usize> = 100..116;

fn is_among(record: &TaskRecord, jobs: Range<usize>) -> bool {
    record.request.parse().is_ok_and(|job| jobs.contains(&job))
}

#[real_test(alone, programs(&["strip"]))]
fn without_symbols_only_deferred_tasks_are_missing() {
    let rage = folder();
    let files = Arc::new(tempfile::tempdir().unwrap());
    let whole = start_new(&rage, 1);
    let extension = http::get(whole.port, "/extension");
    let library = Path::new(&extension).ancestors().nth(2).unwrap();
    let library = format!("/proc/{}/root{}", whole.pid(), library.display());
    let copied = files.path().join("lib");
    assert!(Command::new("cp").arg("-r").arg(library).arg(&copied).status().unwrap().success());
    assert!(Command::new("strip").arg(copied.join("iodine/iodine_ext.so")).status().unwrap().success());
    let first = files.path().join("first.rb");
    fs::write(&first, format!("$LOAD_PATH.unshift({:?})", copied.display().to_string())).unwrap();
    let server = start(&rage, files, 1, &[("RUBYOPT", format!("-r{}", first.display()))]);
    assert!(Path::new(&http::get(server.port, "/extension")).starts_with(&copied));

    let observer = server.observe("rage");
    for job in NEW {
        http::get(server.port, &format!("/job/{job}?how=now"));
    }
    let report = observer.finish();
    report.assert_complete();
    let missing = report.0["self"]["missing"].as_array().unwrap();
    let of_rage = |missing: &Value| {
        missing["source"].as_str().is_some_and(|source| source.starts_with("deferred tasks of rage"))
    };
    let missing = missing.iter().find(|missing| of_rage(missing)).unwrap();
    eprintln!("| without symbols | {missing} |");
    let reason = missing["reason"].as_str().unwrap();
    assert!(reason.contains("iodine_ext.so") && reason.contains("stripped"), "{reason}");
    assert_eq!(report.target(server.pid())["hooks"], json!([]));
    let listener = report.listener(server.port);
    assert_eq!(listener["accepts"], NEW.count(), "{listener:#}");
    assert_eq!(listener["wait"]["count"], NEW.count(), "{listener:#}");
    let slices = report.reactor(server.pid())["slices"].as_u64().unwrap();
    assert!(slices >= NEW.count() as u64, "{slices}");
}
