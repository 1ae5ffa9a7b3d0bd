//! The trace contexts that a process publishes, link by link against what its tracer told the process itself. One tracer is
//! one that nobody here wrote.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use serde_json::Value;

use crate::support::{
    deferred::{Deferring, TRUTH},
    example,
};

/// Pieces of work that each job of the server makes.
const OF_JOB: usize = 10;

/// How long before the server writes down a piece of work its link may start, in nanoseconds.
const SLACK: f64 = 1e8;

/// A piece of work that is over, as observer has it.
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
        // What never started was no piece of work of the server's.
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

/// The server is the program itself, and says by the trace's number which job it is.
#[real_test(links)]
fn a_programs_own_variable_is_read_on_every_kernel() {
    let server = Deferring::start(Command::new(example("deferred_library")));
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
        // A trace of number 0 is none; neither is one that is not valid.
        let [one, two] = ["0000000000000001", "0000000000000002"].map(|span| Some(span.to_owned()));
        let expected = if job == 0 { vec![(None, 4)] } else { vec![(None, 1), (one, 2), (two, 1)] };
        let found = spans.iter().filter(|((of, _), _)| *of == job);
        let found: Vec<_> = found.map(|((_, span), count)| (span.clone(), *count)).collect();
        assert_eq!(found, expected, "job {job}");
    }
}

/// The server's tracer wraps whatever its event loop calls, so that all of it has one name; what runs in other threads keeps
/// its own. In the event loop's thread a piece has started last when it writes itself down.
#[real_test(links, host_only("guests have no tracer"))]
fn links_have_the_context_of_the_place_where_work_was_put_off() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new("/usr/bin/python3");
    command.arg(manifest.join("tests/servers/context_ddtrace.py"));
    command.env("PYTHONPATH", manifest.parent().unwrap().join("target/tools/ddtrace"));
    let server = Deferring::start(command);
    let observer = server.observe("asyncio");
    let jobs = 300;
    server.load(jobs, OF_JOB);
    let report = observer.finish();
    report.assert_complete();
    let links = links(report.target(server.pid()));

    let truth = fs::read_to_string(server.folder().join(TRUTH)).unwrap();
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
    let pieces = jobs * OF_JOB;
    eprintln!(
        "| context | {pieces} pieces | {matched} matched, {without} of them without a context | {wrong} wrong | {unmatched} unmatched |"
    );
    assert_eq!(wrong, 0);
    assert!(matched * 1000 >= pieces * 999);
    // One of each job is put off outside of any span.
    assert!(without * OF_JOB >= matched - matched / 100);

    // Whatever else has a context, it is one of a trace of its own request.
    let mut strangers = 0;
    for link in &links {
        let Some((trace, _)) = &link.context else { continue };
        let is_own = truth
            .lines()
            .any(|line| line.contains(trace.as_str()) && line.contains(&format!("\"{}?", link.request)));
        strangers += usize::from(!is_own);
    }
    assert_eq!(strangers, 0, "links of traces of other requests");
}
