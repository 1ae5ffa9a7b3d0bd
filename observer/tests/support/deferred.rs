//! Servers that defer tasks and log the request of each, and the comparison of that log with observer's links.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt, fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    iter,
    net::TcpStream,
    ops::Range,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use super::{
    Process, http, is_emulated, is_full,
    observer::{Observer, Report},
    servers::end,
    wait_for,
};

/// Number of concurrent clients.
pub(crate) const CLIENTS: usize = 16;

/// Maximum difference between the start of a task as observed and as logged, in seconds: for all tasks, whose thread
/// may have lost its CPU in between, and for half of them.
const SLACK: f64 = 0.1;
const SLACK_MEDIAN: f64 = 0.002;

/// Name of the file that a server logs its tasks to.
pub(crate) const GROUND_TRUTH: &str = "truth";

/// A server that defers tasks and logs the request of each.
pub(crate) struct DeferringServer {
    process: Process,
    /// Kept open, because the server may print to it.
    _output: BufReader<ChildStdout>,
    pub(crate) port: u16,
    files: Arc<TempDir>,
}

/// A task as the server logged it.
#[derive(Clone, Debug)]
pub(crate) struct TaskRecord {
    pub(crate) request: String,
    pub(crate) task: String,
    /// Number of tasks in its chain including itself, if the server logs it.
    depth: Option<u64>,
    /// The runtime's own id of the request, if the server logs it.
    pub(crate) request_id: Option<String>,
    /// Whether the profile of the runtime documents that such tasks cannot be followed.
    pub(crate) is_lost: bool,
    pub(crate) start_ns: f64,
    /// Time in the queue and run time, if the server logs them.
    wait_ns: Option<f64>,
    run_ns: Option<f64>,
}

impl DeferringServer {
    /// Starts a server that takes the path of its log as an argument and prints its port.
    pub(crate) fn start(mut command: Command) -> Self {
        let files = Arc::new(tempfile::tempdir().unwrap());
        command.arg(files.path().join(GROUND_TRUTH));
        Self::start_in(files, command)
    }

    /// Starts a server that prints its port and logs to a file with this name in the folder.
    pub(crate) fn start_in(files: Arc<TempDir>, mut command: Command) -> Self {
        let mut child: Child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("a runtime");
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let process = Process(child);
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let port = line.trim().parse().unwrap_or_else(|_| panic!("no port: {line:?}"));
        Self { process, _output: output, port, files }
    }

    pub(crate) fn script(program: &str, name: &str) -> Self {
        let mut command = Command::new(program);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers").join(name));
        Self::start(command)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Observes the server with this profile, without the limit on overhead.
    pub(crate) fn observe(&self, profile: &str) -> Observer {
        Observer::start(&["--pid", &self.pid().to_string(), "--no-listen", "--profile", profile])
    }

    /// Observes `deferred_library` by the names of its functions.
    pub(crate) fn observe_library(&self) -> Observer {
        let (snapshot, restore) = ("deferred_lib:context_snapshot:arg0", "deferred_lib:context_restore:arg0");
        let pid = self.pid().to_string();
        Observer::start(&["--pid", &pid, "--no-listen", "--snapshot", snapshot, "--restore", restore])
    }

    /// Folder of its log.
    pub(crate) fn folder(&self) -> &Path {
        self.files.path()
    }

    /// Kills the server with SIGKILL; the folder stays.
    pub(crate) fn kill(mut self) -> Arc<TempDir> {
        self.process.signal(Signal::SIGKILL);
        self.process.0.wait().unwrap();
        Arc::clone(&self.files)
    }

    /// All tasks logged so far.
    pub(crate) fn records(&self) -> Vec<TaskRecord> {
        let text = fs::read_to_string(self.folder().join(GROUND_TRUTH)).unwrap_or_default();
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines
            .map(|line| TaskRecord {
                // observer does not report the query string, so it is removed.
                request: line["request"].as_str().unwrap().split('?').next().unwrap().to_owned(),
                task: line["class"].as_str().or(line["name"].as_str()).unwrap_or_default().to_owned(),
                is_lost: line["through"].as_str().is_some_and(|through| through != "native"),
                depth: line["depth"].as_u64(),
                request_id: line["request_id"].as_str().map(str::to_owned),
                start_ns: line["start"].as_f64().unwrap(),
                wait_ns: line["enqueued"].as_f64().map(|queued| line["start"].as_f64().unwrap() - queued),
                run_ns: line["run"].as_f64(),
            })
            .collect()
    }

    /// Sends jobs from several clients at once, and waits until all of their tasks have started.
    pub(crate) fn load(&self, jobs: usize, tasks_per_job: usize) {
        self.send(0..jobs, CLIENTS, |_| "");
        self.wait_for_tasks(jobs * tasks_per_job);
    }

    /// Sends the jobs with these numbers from several clients at once; `kind_of` returns the kind of a job.
    pub(crate) fn send(
        &self,
        jobs: Range<usize>,
        clients: usize,
        kind_of: impl Fn(usize) -> &'static str + Sync,
    ) {
        let port = self.port;
        thread::scope(|scope| {
            for client in 0..clients {
                let (jobs, kind_of) = (jobs.clone(), &kind_of);
                scope.spawn(move || {
                    let mut connection = BufReader::new(http::connect(port));
                    for job in jobs.skip(client).step_by(clients) {
                        // Unrelated requests in between must not be linked.
                        send_request(&mut connection, &format!("/job/{job}?how={}&secret=1", kind_of(job)));
                        if job % 7 == 0 {
                            send_request(&mut connection, "/nothing");
                        }
                    }
                });
            }
        });
    }

    /// Waits until this number of tasks has started, and for the last ones to finish.
    pub(crate) fn wait_for_tasks(&self, tasks: usize) {
        let mut seen = 0;
        wait_for("the deferred tasks to start", || {
            seen = self.records().len();
            (seen >= tasks).then_some(())
        });
        assert_eq!(seen, tasks, "the server's own count");
        thread::sleep(Duration::from_millis(500));
    }
}

/// Workers do not end with their parent.
impl Drop for DeferringServer {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// Sends a request on a keep-alive connection and reads the response.
pub(crate) fn send_request(connection: &mut BufReader<TcpStream>, path: &str) {
    write!(connection.get_mut(), "GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    read_response(connection);
}

/// Reads a whole response.
pub(crate) fn read_response(connection: &mut BufReader<TcpStream>) {
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

/// Result of a comparison.
#[derive(Debug, Default)]
pub(crate) struct Comparison {
    pub(crate) matched: usize,
    pub(crate) wrong: usize,
    pub(crate) unmatched: usize,
    /// Links with the right, a wrong, and no request id.
    pub(crate) request_ids: usize,
    pub(crate) wrong_request_ids: usize,
    pub(crate) missing_request_ids: usize,
    /// Differences between observed and logged times.
    pub(crate) starts: Errors,
    pub(crate) waits: Errors,
    pub(crate) runs: Errors,
}

/// Errors in seconds.
#[derive(Default)]
pub(crate) struct Errors(Vec<f64>);

impl Errors {
    fn add(&mut self, seen_ns: f64, true_ns: f64) {
        self.0.push((seen_ns - true_ns).abs() / 1e9);
    }

    /// The error that this share of all errors is below.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut errors = self.0.clone();
        errors.sort_by(f64::total_cmp);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a position in a list"
        )]
        let at = (share * errors.len() as f64) as usize;
        errors.get(at.min(errors.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

impl fmt::Debug for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [half, most, nearly_all, all] = [0.5, 0.99, 0.999, 1.0].map(|share| self.quantile(share) * 1e3);
        write!(f, "{half:.3} ms, p99 {most:.3}, p99.9 {nearly_all:.3}, max {all:.3}")
    }
}

/// Identifies a task: request, kind of task and, if compared, depth of its chain.
type Identity = (String, String, Option<u64>);

/// A link as observer reported it.
#[derive(Debug)]
struct ObservedLink {
    start_ns: f64,
    wait_ns: f64,
    run_ns: Option<f64>,
    request_id: Option<String>,
}

/// Compares each link of these processes with the server's log. `task_of` maps the name of a task in the log to the
/// name that observer reports; if it returns `None`, links are compared regardless of their task. With `by_depth`, the
/// depth of the chain must match, too.
pub(crate) fn compare(
    report: &Report,
    pids: &[u32],
    records: &[TaskRecord],
    by_depth: bool,
    task_of: impl Fn(&str) -> Option<String>,
) -> Comparison {
    let names: BTreeSet<_> = records.iter().filter_map(|record| task_of(&record.task)).collect();
    let mut seen = links(report, pids, &names, by_depth);
    let mut truth = BTreeMap::<Identity, Vec<&TaskRecord>>::new();
    for record in records {
        let task = task_of(&record.task).unwrap_or_default();
        truth
            .entry((record.request.clone(), task, record.depth.filter(|_| by_depth)))
            .or_default()
            .push(record);
    }
    let limit = SLACK * 1e9 * if is_emulated() { 10.0 } else { 1.0 };
    let mut comparison = Comparison::default();
    for (identity, records) in &mut truth {
        let mut found = seen.remove(identity).unwrap_or_default();
        found.sort_by(|one, other| one.start_ns.total_cmp(&other.start_ns));
        records.sort_by(|one, other| one.start_ns.total_cmp(&other.start_ns));
        let mut is_whole = found.len() == records.len();
        for record in records {
            let off = |at: usize| -> f64 { (found[at].start_ns - record.start_ns).abs() };
            // If all links are present, they are in the same order.
            let nearest =
                if is_whole { Some(0) } else { (0..found.len()).min_by(|&a, &b| off(a).total_cmp(&off(b))) };
            match nearest.filter(|&at| off(at) <= limit) {
                Some(at) => {
                    comparison.matched += 1;
                    comparison.add(&found.remove(at), record);
                }
                None => {
                    is_whole = false;
                    eprintln!("unmatched: {record:?}");
                    comparison.unmatched += 1;
                }
            }
        }
        if !found.is_empty() {
            eprintln!("wrong: {identity:?} {found:?}");
        }
        comparison.wrong += found.len();
    }
    // Links of these tasks to requests that did not cause them.
    for (identity, links) in &seen {
        eprintln!("wrong: {identity:?} {links:?}");
        comparison.wrong += links.len();
    }
    comparison
}

/// All links of tasks with these names, or of all tasks if there are no names.
fn links(
    report: &Report,
    pids: &[u32],
    names: &BTreeSet<String>,
    by_depth: bool,
) -> BTreeMap<Identity, Vec<ObservedLink>> {
    let kinds = || pids.iter().flat_map(|&pid| report.target(pid)["deferred"].as_array().unwrap());
    let all = kinds().flat_map(|kind| kind["links"].as_array().unwrap());
    let parents: HashMap<&str, Option<&str>> =
        all.map(|link| (link["id"].as_str().unwrap(), link["parent"].as_str())).collect();
    let mut seen = BTreeMap::<_, Vec<_>>::new();
    for kind in kinds() {
        let task = kind["task"].as_str().unwrap();
        if !names.is_empty() && !names.contains(task) {
            continue;
        }
        let task = if names.is_empty() { "" } else { task };
        for link in kind["links"].as_array().unwrap() {
            let path = link["origin"]["path"].as_str().unwrap_or_default();
            assert!(!path.contains("secret"), "{link}");
            let request = path.strip_prefix("/job/").unwrap_or(path);
            let chain = iter::successors(link["id"].as_str(), |id| parents.get(id).copied().flatten());
            let depth = by_depth.then(|| chain.count() as u64);
            let wait_ns = link["wait_seconds"].as_f64().unwrap() * 1e9;
            seen.entry((request.to_owned(), task.to_owned(), depth)).or_default().push(ObservedLink {
                start_ns: link["queued_ns"].as_f64().unwrap() + wait_ns,
                wait_ns,
                run_ns: link["run_seconds"].as_f64().map(|seconds| seconds * 1e9),
                request_id: link["request_id"].as_str().map(str::to_owned),
            });
        }
    }
    seen
}

impl Comparison {
    fn add(&mut self, seen: &ObservedLink, record: &TaskRecord) {
        match (&seen.request_id, &record.request_id) {
            (None, None) => {}
            (None, Some(_)) => self.missing_request_ids += 1,
            (seen, known) if seen == known => self.request_ids += 1,
            _ => {
                eprintln!("wrong request id: {seen:?} {record:?}");
                self.wrong_request_ids += 1;
            }
        }
        self.starts.add(seen.start_ns, record.start_ns);
        if let Some(wait_ns) = record.wait_ns {
            self.waits.add(seen.wait_ns, wait_ns);
        }
        if let (Some(seen), Some(run_ns)) = (seen.run_ns, record.run_ns) {
            self.runs.add(seen, run_ns);
        }
    }
}

/// Asserts that no link is wrong and at most 0.1 % are missing.
pub(crate) fn assert_links_correct(
    what: &str,
    report: &Report,
    pids: &[u32],
    comparison: &Comparison,
    tasks: usize,
) {
    eprintln!("| {what} | {tasks} tasks | {comparison:?} |");
    for target in pids.iter().map(|&pid| report.target(pid)) {
        eprintln!("| {} | {} unmatched | {:#} |", target["pid"], target["unmatched"], target["hooks"]);
    }
    report.assert_complete();
    assert_eq!((comparison.wrong, comparison.wrong_request_ids), (0, 0), "{comparison:?}");
    assert!(comparison.matched * 1000 >= tasks * 999, "{comparison:?} of {tasks}");
    assert_eq!(comparison.matched + comparison.unmatched, tasks);
    assert!(is_emulated() || comparison.starts.quantile(0.5) <= SLACK_MEDIAN, "{comparison:?}");
}

/// Number of jobs that defer this number of tasks; fewer on slow machines.
pub(crate) fn jobs_for(tasks: usize, per_job: usize) -> usize {
    let tasks = match (is_emulated(), is_full()) {
        (true, _) => tasks / 20,
        (_, false) => tasks / 4,
        (_, true) => tasks,
    };
    tasks.div_ceil(per_job)
}
