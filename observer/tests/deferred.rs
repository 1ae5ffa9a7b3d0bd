//! Deferred work, link by link against what the servers themselves write down: which request each piece belongs to.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    Process, example, http, is_emulated,
    observer::{Observer, Report},
    wait_for,
};

/// Clients at a time.
const CLIENTS: usize = 16;

/// How far a start that observer saw may be from the one that the server writes down: of any piece, which another thread
/// may have kept from its CPU in between, and of half of them; in seconds.
const SLACK: f64 = 0.1;
const SLACK_OF_HALF: f64 = 0.002;

/// A server that defers work and writes down for whom.
pub(crate) struct Deferring {
    process: Process,
    /// Kept open: what the server prints has to go somewhere.
    _output: BufReader<ChildStdout>,
    port: u16,
    pub(crate) truth: PathBuf,
    _files: TempDir,
}

/// What a server wrote down of one piece of work.
#[derive(Clone, Debug)]
struct Piece {
    request: String,
    task: String,
    /// Whether the profile of its runtime says that it cannot follow such work.
    is_lost: bool,
    start_ns: f64,
}

impl Deferring {
    /// Starts a server that takes the name of a file and prints its port.
    pub(crate) fn start(mut command: Command) -> Self {
        let files = tempfile::tempdir().unwrap();
        let truth = files.path().join("truth");
        let mut child: Child =
            command.arg(&truth).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("a runtime");
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let process = Process(child);
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let port = line.trim().parse().unwrap_or_else(|_| panic!("no port: {line:?}"));
        Self { process, _output: output, port, truth, _files: files }
    }

    fn script(program: &str, name: &str) -> Self {
        let mut command = Command::new(program);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers").join(name));
        Self::start(command)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What it has written down so far.
    fn pieces(&self) -> Vec<Piece> {
        let text = fs::read_to_string(&self.truth).unwrap_or_default();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines
            .map(|line| Piece {
                // Servers that write down the query know more than observer may.
                request: line["request"].as_str().unwrap().split('?').next().unwrap().to_owned(),
                task: line["class"].as_str().or(line["name"].as_str()).unwrap_or_default().to_owned(),
                is_lost: line["through"].as_str().is_some_and(|through| through != "native"),
                start_ns: line["start"].as_f64().unwrap(),
            })
            .collect()
    }

    /// Sends so many jobs, from many clients at once, and waits until all that they left behind has started.
    pub(crate) fn load(&self, jobs: usize, pieces_of_job: usize) {
        thread::scope(|scope| {
            for client in 0..CLIENTS {
                scope.spawn(move || {
                    let mut connection = BufReader::new(http::connect(self.port));
                    for job in (client..jobs).step_by(CLIENTS) {
                        // Whatever else is asked in between has no part in it.
                        ask(&mut connection, &format!("/job/{job}?secret=1"));
                        if job % 7 == 0 {
                            ask(&mut connection, "/nothing");
                        }
                    }
                });
            }
        });
        let mut seen = 0;
        wait_for("the work that was put off", || {
            let now = self.pieces().len();
            // An emulated machine takes longer than any wait for all of them at once.
            assert!(now >= seen);
            seen = now;
            (seen >= jobs * pieces_of_job).then_some(())
        });
        assert_eq!(seen, jobs * pieces_of_job, "the server's own count");
        // What has started has to end, too.
        thread::sleep(Duration::from_millis(500));
    }
}

/// One request on a connection that is kept alive.
fn ask(connection: &mut BufReader<TcpStream>, path: &str) {
    write!(connection.get_mut(), "GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    let mut length = 0;
    loop {
        let mut line = String::new();
        connection.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the server hung up");
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    connection.read_exact(&mut vec![0; length]).unwrap();
}

/// What came of a comparison.
#[derive(Debug, Default, PartialEq)]
struct Verdict {
    matched: usize,
    wrong: usize,
    unmatched: usize,
    /// By how much half of the starts are off, and how much the worst is, in seconds.
    off: (f64, f64),
}

/// Compares every link with what the server wrote down, one by one: those of the tasks that it names, or all of them
/// where `task_of` names none.
fn compare(report: &Report, pid: u32, pieces: &[Piece], task_of: impl Fn(&str) -> Option<String>) -> Verdict {
    let names: BTreeSet<_> = pieces.iter().filter_map(|piece| task_of(&piece.task)).collect();
    let mut seen = BTreeMap::<(String, String), Vec<f64>>::new();
    for kind in report.target(pid)["deferred"].as_array().unwrap() {
        let task = kind["task"].as_str().unwrap();
        if !names.is_empty() && !names.contains(task) {
            continue;
        }
        let task = if names.is_empty() { "" } else { task };
        for link in kind["links"].as_array().unwrap() {
            let path = link["origin"]["path"].as_str().unwrap_or_default();
            assert!(!path.contains("secret"), "{link}");
            let request = path.strip_prefix("/job/").unwrap_or(path);
            let start = link["queued_ns"].as_f64().unwrap() + link["wait_seconds"].as_f64().unwrap() * 1e9;
            seen.entry((request.to_owned(), task.to_owned())).or_default().push(start);
        }
    }
    let mut truth = BTreeMap::<(String, String), Vec<f64>>::new();
    for piece in pieces {
        truth
            .entry((piece.request.clone(), task_of(&piece.task).unwrap_or_default()))
            .or_default()
            .push(piece.start_ns);
    }
    let mut verdict = Verdict::default();
    let mut errors = Vec::new();
    for (key, starts) in &mut truth {
        let mut found = seen.remove(key).unwrap_or_default();
        found.sort_by(f64::total_cmp);
        starts.sort_by(f64::total_cmp);
        for start in starts {
            let limit = SLACK * 1e9 * if is_emulated() { 10.0 } else { 1.0 };
            let nearest = (0..found.len())
                .min_by(|&a, &b| (found[a] - *start).abs().total_cmp(&(found[b] - *start).abs()));
            match nearest.filter(|&at| (found[at] - *start).abs() <= limit) {
                Some(at) => {
                    errors.push((found.remove(at) - *start).abs() / 1e9);
                    verdict.matched += 1;
                }
                None => {
                    let who = pieces.iter().find(|piece| piece.start_ns.to_bits() == start.to_bits());
                    eprintln!("unmatched: {key:?}: {who:?}");
                    verdict.unmatched += 1;
                }
            }
        }
        if !found.is_empty() {
            eprintln!("wrong: {key:?} {found:?}");
        }
        verdict.wrong += found.len();
    }
    // Links of these tasks to requests that know nothing of them.
    for ((request, task), starts) in &seen {
        eprintln!("wrong: {task} for {request} at {starts:?}");
        verdict.wrong += starts.len();
    }
    errors.sort_by(f64::total_cmp);
    let quantile = |at: usize| errors.get(at).copied().unwrap_or_default();
    verdict.off = (quantile(errors.len() / 2), quantile(errors.len().saturating_sub(1)));
    verdict
}

/// Asserts that no link is wrong and hardly any is missing.
fn assert_true(what: &str, report: &Report, pid: u32, verdict: &Verdict, pieces: usize) {
    let target = report.target(pid);
    eprintln!(
        "| {what} | {pieces} pieces | {verdict:?} | {} not known | {:#} |",
        target["unmatched"], target["hooks"]
    );
    report.assert_complete();
    assert_eq!(verdict.wrong, 0, "{verdict:?}");
    assert!(verdict.matched * 1000 >= pieces * 999, "{verdict:?} of {pieces}");
    assert_eq!(verdict.matched + verdict.unmatched, pieces);
    assert!(is_emulated() || verdict.off.0 <= SLACK_OF_HALF, "{verdict:?}");
}

/// How many jobs make for so many pieces, fewer where everything is slow.
fn jobs_for(pieces: usize, of_job: usize) -> usize {
    (if is_emulated() { pieces / 20 } else { pieces }).div_ceil(of_job)
}

#[test]
fn asyncio_links_each_piece_to_its_request() {
    let of_job = 15;
    let server = Deferring::script("/usr/bin/python3", "deferred_asyncio.py");
    let observer = Observer::of(server.pid());
    let jobs = jobs_for(10_000, of_job);
    server.load(jobs, of_job);
    let report = observer.finish();
    let pieces = server.pieces();
    let verdict = compare(&report, server.pid(), &pieces, |task| Some(task.to_owned()));
    assert_true("asyncio", &report, server.pid(), &verdict, pieces.len());
}

/// Of tokio only the types of futures tell tasks apart, which programs without debug information do not name: requests
/// are compared.
fn tokio_links(flavour: &str) {
    let of_job = 7;
    let mut command = Command::new(example("deferred_tokio"));
    command.arg(flavour);
    let server = Deferring::start(command);
    let observer = Observer::of(server.pid());
    server.load(jobs_for(10_000, of_job), of_job);
    let report = observer.finish();
    let pieces = server.pieces();
    let verdict = compare(&report, server.pid(), &pieces, |_| None);
    assert_true(flavour, &report, server.pid(), &verdict, pieces.len());
}

#[test]
fn tokio_links_each_task_of_one_thread() {
    tokio_links("current");
}

#[test]
fn tokio_links_each_task_of_several_threads() {
    tokio_links("multi");
}

#[test]
fn node_links_what_its_pool_of_threads_does() {
    let of_job = 17;
    let server = Deferring::script("node", "deferred_node.js");
    let observer = Observer::of(server.pid());
    server.load(jobs_for(20_000, of_job), of_job);
    let report = observer.finish();
    // What timers and promises handed on has no link to anything.
    let pieces: Vec<_> = server.pieces().into_iter().filter(|piece| !piece.is_lost).collect();
    let verdict = compare(&report, server.pid(), &pieces, |_| None);
    assert_true("node", &report, server.pid(), &verdict, pieces.len());
}

#[test]
fn a_library_of_ones_own_is_named_on_the_command_line() {
    let of_job = 4;
    let server = Deferring::start(Command::new(example("deferred_library")));
    let pid = server.pid().to_string();
    let hooks = [
        "--snapshot",
        "deferred_lib:context_snapshot:arg0",
        "--restore",
        "deferred_lib:context_restore:arg0",
    ];
    let observer = Observer::start(&[&["--pid", &pid, "--no-listen"], &hooks[..]].concat());
    server.load(jobs_for(10_000, of_job), of_job);
    let report = observer.finish();
    let pieces = server.pieces();
    let verdict = compare(&report, server.pid(), &pieces, |_| None);
    assert_true("a library", &report, server.pid(), &verdict, pieces.len());
    let kind = &report.target(server.pid())["deferred"][0];
    assert_eq!(kind["enqueued"], pieces.len(), "{kind:#}");
    assert_eq!((&kind["started"], &kind["finished"]), (&kind["enqueued"], &kind["enqueued"]), "{kind:#}");
}

#[test]
fn connections_from_before_are_known_as_well() {
    let server = Deferring::start(Command::new(example("deferred_library")));
    let mut connection = BufReader::new(http::connect(server.port));
    ask(&mut connection, "/job/before");
    let pid = server.pid().to_string();
    let hooks = [
        "--snapshot",
        "deferred_lib:context_snapshot:arg0",
        "--restore",
        "deferred_lib:context_restore:arg0",
    ];
    let observer = Observer::start(&[&["--pid", &pid, "--no-listen"], &hooks[..]].concat());
    ask(&mut connection, "/job/after");
    wait_for("the tasks", || (server.pieces().len() == 8).then_some(()));
    let report = observer.finish();
    let pieces: Vec<_> = server.pieces().into_iter().filter(|piece| piece.request == "after").collect();
    let verdict = compare(&report, server.pid(), &pieces, |_| None);
    assert_eq!((verdict.matched, verdict.wrong, verdict.unmatched), (4, 0, 0));
}

#[test]
fn requests_that_overlap_are_nobodys() {
    let server = Deferring::start(Command::new(example("deferred_library")));
    let pid = server.pid().to_string();
    let hooks = [
        "--snapshot",
        "deferred_lib:context_snapshot:arg0",
        "--restore",
        "deferred_lib:context_restore:arg0",
    ];
    let observer = Observer::start(&[&["--pid", &pid, "--no-listen"], &hooks[..]].concat());
    let mut connection = http::connect(server.port);
    // Two in one go: the server, which looks at the first alone, works for one of them.
    let two = "GET /job/1 HTTP/1.1\r\nHost: test\r\n\r\n".repeat(2);
    connection.write_all(two.as_bytes()).unwrap();
    wait_for("the tasks", || (server.pieces().len() >= 4).then_some(()));
    let report = observer.finish();
    let links = &report.target(server.pid())["deferred"][0]["links"];
    let links = links.as_array().unwrap();
    assert_eq!(links.len(), 4, "{links:?}");
    // It is known when they came, but not which it was.
    assert!(links.iter().all(|link| link["origin"]["path"].is_null()), "{links:?}");
}
