//! Trace contexts that processes publish: each link is compared with the context that the tracer gave the process. One
//! of the tracers is a third-party one.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use serde_json::Value;

use crate::support::{
    deferred::{DeferringServer, GROUND_TRUTH},
    example,
};

/// Number of tasks of each job of the server.
const TASKS_PER_JOB: usize = 10;

/// Maximum time from the start of a task, according to its link, until the server logs it, in nanoseconds.
const SLACK: f64 = 1e8;

/// A finished task, as observer reports it.
struct Link {
    request: String,
    task: String,
    start_ns: f64,
    context: Option<(String, String)>,
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn links(target: &Value) -> Vec<Link> {
    let mut all = Vec::new();
    for kind in target["deferred"].as_array().unwrap() {
        // A task that never ran is not one of the server's.
        let links = kind["links"].as_array().unwrap().iter();
        for link in links.filter(|link| link["run_seconds"].is_f64()) {
            let path = link["origin"]["path"].as_str().unwrap_or_default();
            let context = &link["context"];
            all.push(Link {
                request: path.strip_prefix("/job/").unwrap_or(path).to_owned(),
                task: text(&kind["task"]).unwrap(),
                start_ns: link["queued_ns"].as_f64().unwrap() + link["wait_seconds"].as_f64().unwrap() * 1e9,
                context: text(&context["trace_id"]).zip(text(&context["span_id"])),
            });
        }
    }
    all
}

/// The server publishes contexts itself, and the number of the trace is the number of the job.
#[real_test(links)]
fn context_of_a_native_program_is_linked() {
    let server = DeferringServer::start(Command::new(example("deferred_library")));
    let observer = server.observe_library();
    let jobs = 100;
    server.load(jobs, 4);
    let report = observer.finish();
    let mut spans = BTreeMap::<_, u32>::new();
    for link in links(report.target(server.pid())) {
        let job: u64 = link.request.parse().unwrap();
        let span = link.context.map(|(trace, span)| {
            assert_eq!(trace, format!("{job:032x}"));
            span
        });
        *spans.entry((job, span)).or_default() += 1;
    }
    for job in 0..jobs as u64 {
        // Trace number 0 means no trace, and an invalid context means none either.
        let [one, two] = ["0000000000000001", "0000000000000002"].map(|span| Some(span.to_owned()));
        let expected = if job == 0 { vec![(None, 4)] } else { vec![(None, 1), (one, 2), (two, 1)] };
        let found = spans.iter().filter(|((of, _), _)| *of == job);
        let found: Vec<_> = found.map(|((_, span), count)| (span.clone(), *count)).collect();
        assert_eq!(found, expected, "job {job}");
    }
}

/// The server's tracer wraps all callbacks of its event loop, so all of them have one name; those of other threads keep
/// their own. In the thread of the event loop, the task that logs itself is the one that started last.
#[real_test(links, host_only("guests do not have ddtrace"))]
fn links_have_the_trace_context_of_their_enqueue() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new("/usr/bin/python3");
    command.arg(manifest.join("tests/servers/context_ddtrace.py"));
    command.env("PYTHONPATH", manifest.parent().unwrap().join("target/tools/ddtrace"));
    let server = DeferringServer::start(command);
    let observer = server.observe("asyncio");
    let jobs = 300;
    server.load(jobs, TASKS_PER_JOB);
    let report = observer.finish();
    report.assert_complete();
    let links = links(report.target(server.pid()));

    let truth = fs::read_to_string(server.folder().join(GROUND_TRUTH)).unwrap();
    let (mut matched, mut without, mut wrong, mut unmatched) = (0, 0, 0, 0);
    for line in truth.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        let request = line["request"].as_str().unwrap().split('?').next().unwrap();
        let start = line["start"].as_f64().unwrap();
        let in_thread = line["class"] == "resize";
        let own = links.iter().filter(|link| link.request == request && (link.task == "resize") == in_thread);
        let own = own.filter(|link| (start - SLACK..=start).contains(&link.start_ns));
        let expected = text(&line["trace"]).zip(text(&line["span"]));
        match own.max_by(|a, b| a.start_ns.total_cmp(&b.start_ns)) {
            Some(link) if link.context == expected => {
                matched += 1;
                without += usize::from(expected.is_none());
            }
            Some(link) => {
                eprintln!("wrong: {:?}, not {line}", link.context);
                wrong += 1;
            }
            None => {
                eprintln!("unmatched: {line}");
                unmatched += 1;
            }
        }
    }
    let tasks = jobs * TASKS_PER_JOB;
    eprintln!(
        "| context | {tasks} tasks | {matched} matched, {without} of them without a context | {wrong} wrong | {unmatched} unmatched |"
    );
    assert_eq!(wrong, 0);
    assert!(matched * 1000 >= tasks * 999);
    // One task of each job is enqueued outside of any span.
    assert!(without * TASKS_PER_JOB >= matched - matched / 100);

    // Any other link with a context must have one of a trace of its own request.
    let mut foreign_links = 0;
    for link in &links {
        let Some((trace, _)) = &link.context else { continue };
        let is_own = truth
            .lines()
            .any(|line| line.contains(trace.as_str()) && line.contains(&format!("\"{}?", link.request)));
        foreign_links += usize::from(!is_own);
    }
    assert_eq!(foreign_links, 0, "links of traces of other requests");
}
