//! Traces pushed to OpenTelemetry collectors, compared with the logs of the servers.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufReader, Write as _},
    net::TcpListener,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::{
    otlp::{PROTOCOLS, metrics_of, url},
    support::{
        deferred::{DeferringServer, TaskRecord, read_response, send_request},
        http,
        observer::Observer,
        otlp::{Receiver, Rotel, attributes, certificate, for_each_point},
        servers::{Server, free_port},
        wait_for,
    },
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SENDER: &str = "b7ad6b7169203331";

/// Number of tasks of each job of the server.
const TASKS_PER_JOB: usize = 15;

/// Maximum error of a time, and of half of them.
const SLACK: Duration = Duration::from_millis(100);
const SLACK_MEDIAN: Duration = Duration::from_millis(2);

/// Interval of pushes, in milliseconds.
const DELAY: &str = "200";

fn trace(pid: u32, address: &str, protocol: &str, variables: &[(&str, &str)]) -> Observer {
    let pid = pid.to_string();
    let flags =
        ["--pid", &pid, "--listen", "127.0.0.1:0", "--otlp-endpoint", address, "--otlp-protocol", protocol];
    let often = [("OTEL_BSP_SCHEDULE_DELAY", DELAY), ("OTEL_METRIC_EXPORT_INTERVAL", "500")];
    Observer::start_with(&flags, &[variables, &often].concat())
}

/// Exports only stalls: the runtimes of the processes are not hooked.
fn trace_stalls(which: [&str; 2], address: &str, protocol: &str) -> Observer {
    let flags = ["--no-listen", "--profile", "none", "--otlp-endpoint", address, "--otlp-protocol", protocol];
    Observer::start(&[&which[..], &flags].concat())
}

/// Sends a request within a trace on a keep-alive connection.
fn send_request_in_trace(connection: &mut BufReader<std::net::TcpStream>, path: &str, traceparent: &str) {
    write!(
        connection.get_mut(),
        "GET {path} HTTP/1.1\r\nHost: test\r\ntraceparent: {traceparent}\r\nCookie: secret\r\n\r\n"
    )
    .unwrap();
    read_response(connection);
}

/// All spans, each with the attributes of its resource.
fn spans(requests: &[Value]) -> Vec<(BTreeMap<String, String>, Value)> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut all = Vec::new();
    for resource in requests.iter().flat_map(|request| list(&request["request"]["resourceSpans"])) {
        let resource_attributes = attributes(&resource["resource"]["attributes"]);
        for span in list(&resource["scopeSpans"]).iter().flat_map(|scope| list(&scope["spans"])) {
            all.push((resource_attributes.clone(), span));
        }
    }
    all
}

fn text<'s>(span: &'s Value, key: &str) -> &'s str {
    span[key].as_str().unwrap_or_default()
}

fn time(span: &Value, key: &str) -> u64 {
    text(span, key).parse().unwrap()
}

/// Wall-clock time at which the monotonic clock was 0.
fn offset() -> Duration {
    let monotonic: Duration = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap().into();
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    wall - monotonic
}

/// The task that enqueues each task of the server; `None` for those that the request enqueues itself.
fn parent_of(task: &str) -> Option<&'static str> {
    match task {
        "receipt" => Some("mail"),
        "archive" => Some("receipt"),
        "resize" => Some("thumbnail"),
        "notify" => Some("follow"),
        "store" => Some("index"),
        _ => None,
    }
}

/// Asserts that these are the spans of one request, according to the server's log. Returns the error of each start.
#[track_caller]
fn assert_trace(spans: &[&Value], path: &str, records: &[TaskRecord], sender: Option<&str>) -> Vec<Duration> {
    let by_id: BTreeMap<&str, &Value> = spans.iter().map(|span| (text(span, "spanId"), *span)).collect();
    assert_eq!(by_id.len(), spans.len(), "a span came twice");
    let servers: Vec<_> = spans.iter().filter(|span| span["kind"] == "SPAN_KIND_SERVER").collect();
    assert_eq!(servers.len(), 1, "{servers:#?}");
    let server = servers[0];
    assert_eq!(server["name"], "GET");
    let reported = attributes(&server["attributes"]);
    assert_eq!((reported["http.request.method"].as_str(), reported["url.path"].as_str()), ("GET", path));
    assert_eq!(reported.len(), 2, "{reported:?}");
    assert_eq!(server.get("parentSpanId").and_then(Value::as_str), sender, "{server:#}");
    // Flags: sampled; whether the parent is remote is known, and it is, if there is one.
    assert_eq!(server["flags"], if sender.is_some() { 0x301 } else { 0x101 });
    let (begin, end) = (time(server, "startTimeUnixNano"), time(server, "endTimeUnixNano"));
    assert!(begin < end && end - begin < 100_000_000, "{server:#}");

    let tasks: BTreeSet<_> = records.iter().map(|record| record.task.as_str()).collect();
    let mut starts = BTreeMap::<&str, Vec<u64>>::new();
    // Contention for the CPU may cause a stall.
    let is_own = |span: &&&Value| span["kind"] != "SPAN_KIND_SERVER" && span["name"] != "stall";
    for span in spans.iter().filter(is_own) {
        assert_eq!(span["kind"], "SPAN_KIND_CONSUMER", "{span:#}");
        let (name, parent) = (text(span, "name"), text(span, "parentSpanId"));
        let parent = by_id.get(parent).unwrap_or_else(|| panic!("no parent of {span:#}"));
        let links = span["links"].as_array().unwrap();
        assert_eq!(links.len(), 1);
        assert_eq!((&links[0]["traceId"], &links[0]["spanId"]), (&span["traceId"], &parent["spanId"]));
        match parent_of(name) {
            // A task of the library itself, which the server does not log.
            _ if !tasks.contains(name) => continue,
            Some(expected) => assert_eq!(parent["name"], expected, "{span:#}"),
            // The task may re-enqueue itself to retry.
            None => {
                assert!(parent["name"] == "GET" || (name == "charge" && parent["name"] == name), "{span:#}")
            }
        }
        let (start, end) = (time(span, "startTimeUnixNano"), time(span, "endTimeUnixNano"));
        assert!(begin <= start && start <= end, "{span:#}");
        let wait = span["attributes"][0]["value"]["doubleValue"].as_f64().unwrap();
        assert_eq!(span["attributes"][0]["key"], "observer.deferred.wait");
        assert!((0.0..1.0).contains(&wait), "{span:#}");
        starts.entry(name).or_default().push(start);
    }
    let offset = offset();
    let mut off = Vec::new();
    for record in records {
        let start = offset + Duration::from_secs_f64(record.start_ns / 1e9);
        let start = u64::try_from(start.as_nanos()).unwrap();
        let found = starts.get_mut(record.task.as_str()).unwrap_or_else(|| panic!("no {}", record.task));
        let nearest =
            (0..found.len()).min_by_key(|&at| found[at].abs_diff(start)).expect("a start for each task");
        off.push(Duration::from_nanos(found.remove(nearest).abs_diff(start)));
    }
    assert!(starts.values().all(Vec::is_empty), "more than the server knows of: {starts:?}");
    off
}

#[real_test(userspace, links, host_only("guests have no OTLP collector"))]
#[expect(clippy::too_many_lines, reason = "one scenario against one collector")]
fn request_and_its_deferred_tasks_are_one_trace() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start("http", &[]);
        let rotel = Rotel::before(receiver.port);
        let server = DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
        let observer = trace(server.pid(), &url(rotel.port(protocol)), protocol, &[]);
        let mut connection = BufReader::new(http::connect(server.port));
        send_request(&mut connection, "/job/0?token=secret");
        send_request_in_trace(&mut connection, "/job/1?token=secret", &format!("00-{TRACE}-{SENDER}-01"));
        // The sender of this request does not want it recorded.
        send_request_in_trace(
            &mut connection,
            "/job/2",
            &format!("00-{}-{SENDER}-00", TRACE.replace("0a", "0b")),
        );
        send_request(&mut connection, "/nothing");
        server.wait_for_tasks(3 * TASKS_PER_JOB);
        // An exemplar is pushed once, with the next push of metrics.
        thread::sleep(Duration::from_millis(1500));
        let pid = server.pid();
        observer.finish();
        thread::sleep(Duration::from_secs(1));
        let requests = receiver.stop();
        let all = spans(&requests);
        assert!(!format!("{all:?}").contains("secret"));
        let mut traces = BTreeMap::<&str, Vec<&Value>>::new();
        for (resource, span) in &all {
            assert_eq!(resource["process.pid"], pid.to_string());
            assert!(resource["process.executable.name"].starts_with("python3"), "{resource:?}");
            traces.entry(text(span, "traceId")).or_default().push(span);
        }
        let given = traces.remove(TRACE).expect("the trace of the client");
        assert_eq!(traces.len(), 1, "{:?}", traces.keys());
        let drawn = traces.into_values().next().unwrap();
        let records = server.records();
        let of = |request: &str| -> Vec<_> {
            records.iter().filter(|record| record.request == request).cloned().collect()
        };
        let mut off = assert_trace(&drawn, "/job/0", &of("0"), None);
        off.extend(assert_trace(&given, "/job/1", &of("1"), Some(SENDER)));
        off.sort();
        eprintln!(
            "{protocol}: {} starts, off by {:?}, at most {:?}",
            off.len(),
            off[off.len() / 2],
            off.last()
        );
        assert!(off[off.len() / 2] <= SLACK_MEDIAN && *off.last().unwrap() <= SLACK, "{off:?}");

        // Exemplars of metrics refer to these spans.
        let known: BTreeMap<_, _> =
            all.iter().map(|(_, span)| ((text(span, "traceId"), text(span, "spanId")), span)).collect();
        let mut found = BTreeSet::new();
        for_each_point(&requests, |_, metric, _, point| {
            for exemplar in point["exemplars"].as_array().into_iter().flatten() {
                let span = known[&(text(exemplar, "traceId"), text(exemplar, "spanId"))];
                let name = text(metric, "name");
                if name == "observer.reactor.slice" {
                    assert_eq!(span["kind"], "SPAN_KIND_SERVER");
                    continue;
                }
                assert_eq!(attributes(&point["attributes"])["task"], text(span, "name"));
                let value = exemplar["asDouble"].as_f64().unwrap();
                let (start, end) = (time(span, "startTimeUnixNano"), time(span, "endTimeUnixNano"));
                match name {
                    "observer.deferred.wait" => {
                        let wait = span["attributes"][0]["value"]["doubleValue"].as_f64().unwrap();
                        assert_eq!((value, time(exemplar, "timeUnixNano")), (wait, start));
                    }
                    "observer.deferred.run" => {
                        assert!((value - (end - start) as f64 / 1e9).abs() < 1e-6);
                        assert_eq!(time(exemplar, "timeUnixNano"), end);
                    }
                    other => panic!("an exemplar of {other}"),
                }
                found.insert((name.to_owned(), text(span, "name").to_owned()));
            }
        });
        for task in records.iter().map(|record| &record.task) {
            for name in ["observer.deferred.wait", "observer.deferred.run"] {
                assert!(found.contains(&(name.to_owned(), task.clone())), "{name} of {task}");
            }
        }
    }
}

/// Spans of requests are delivered even if the collector starts late.
#[real_test(links, userspace, host_only("guests have no OTLP collector"))]
fn spans_are_kept_until_the_collector_is_available() {
    for protocol in PROTOCOLS {
        let port = free_port();
        let server = DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
        let observer = trace(server.pid(), &url(port), protocol, &[("OTEL_METRICS_EXPORTER", "none")]);
        let mut connection = BufReader::new(http::connect(server.port));
        send_request(&mut connection, "/job/0");
        assert!(observer.message().contains("no traces to"));
        let mut receiver = Receiver::start_at(port, protocol, &[]);
        assert!(observer.message().contains("accepts traces again"));
        let mut all = receiver.within(Duration::from_secs(1));
        all.extend(receiver.stop());
        send_request(&mut connection, "/job/1");
        assert!(observer.message().contains("no traces to"));
        send_request(&mut connection, "/job/2");
        server.wait_for_tasks(3 * TASKS_PER_JOB);
        thread::sleep(Duration::from_secs(2));
        receiver = Receiver::start_at(port, protocol, &[]);
        assert!(observer.message().contains("accepts traces again"));
        all.extend(receiver.within(Duration::from_secs(1)));
        let metrics = metrics_of(&observer);
        assert_eq!(metrics["observer_self_otlp_dropped_total"], 0.0);
        let report = observer.finish();
        let reported = &report.0["self"]["otlp"];
        all.extend(receiver.within(Duration::from_secs(1)));
        let spans = spans(&all);
        assert_eq!(reported[0]["signal"], "traces");
        assert_eq!(reported[0]["delivered"].as_u64(), Some(spans.len() as u64), "{protocol}: {reported}");
        let records = server.records();
        for request in ["0", "1", "2"] {
            let path = format!("/job/{request}");
            let is_asked = |span: &Value| attributes(&span["attributes"]).get("url.path") == Some(&path);
            let (_, asked) = spans.iter().find(|(_, span)| is_asked(span)).expect("a span for each request");
            let trace = spans.iter().map(|(_, span)| span).filter(|span| span["traceId"] == asked["traceId"]);
            let of_request = |record: &&TaskRecord| record.request == request;
            let records: Vec<_> = records.iter().filter(of_request).cloned().collect();
            assert_eq!(assert_trace(&trace.collect::<Vec<_>>(), &path, &records, None).len(), TASKS_PER_JOB);
        }
    }
}

/// Headers, compression, TLS and attributes of the environment apply to spans as they do to metrics.
#[real_test(userspace, host_only("guests have no collector"))]
fn spans_have_headers_and_a_trusted_connection() {
    let files = tempfile::tempdir().unwrap();
    let pem = certificate(files.path());
    let pem = pem.to_str().unwrap();
    let server = DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(protocol, &[pem]);
        let variables = [
            ("OTEL_METRICS_EXPORTER", "none"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x,x-tenant=a=b"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", pem),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test"),
        ];
        let address = format!("https://127.0.0.1:{}", receiver.port);
        let observer = trace(server.pid(), &address, protocol, &variables);
        send_request(&mut BufReader::new(http::connect(server.port)), "/job/0");
        let request = receiver.next();
        observer.finish();
        let headers = &request["headers"];
        assert_eq!((&headers["authorization"], &headers["x-tenant"]), (&"Bearer x".into(), &"a=b".into()));
        // grpcio does not show the encoding.
        assert!(protocol == "grpc" || headers["content-encoding"] == "gzip", "{headers}");
        for (resource, _) in spans(std::slice::from_ref(&request)) {
            assert_eq!(resource["deployment.environment.name"], "test");
        }
    }
}

/// Spans that a collector refuses or rejects are counted, and so is a failure that was retried.
#[real_test(userspace, host_only("guests have no collector"))]
fn spans_that_are_not_accepted_are_counted() {
    let server = DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
    for (protocol, answers) in
        [("grpc", ["14", "3", "partial=2"]), ("http/protobuf", ["503", "400", "partial=2"])]
    {
        let receiver = Receiver::start(protocol, &answers);
        let observer =
            trace(server.pid(), &url(receiver.port), protocol, &[("OTEL_METRICS_EXPORTER", "none")]);
        let mut connection = BufReader::new(http::connect(server.port));
        send_request(&mut connection, "/job/0");
        let message = observer.message();
        assert!(message.contains("no traces to") && message.contains("refused"), "{message}");
        send_request(&mut connection, "/job/1");
        let mut received = vec![receiver.next()];
        let metrics = wait_for("the delivery of all spans", || {
            received.extend(receiver.within(Duration::from_millis(500)));
            let metrics = metrics_of(&observer);
            let accepted = spans(&received).len() as f64 - 2.0;
            (metrics["observer_self_otlp_delivered_total"] == accepted).then_some(metrics)
        });
        // The first request failed twice: it was retried, and then refused.
        assert_eq!(metrics["observer_self_otlp_failures_total"], 2.0, "{protocol}");
        assert!(metrics["observer_self_otlp_dropped_total"] > 2.0, "{protocol}: {metrics:?}");
        observer.finish();
    }
}

/// Spans that are not delivered in time are reported, and observer ends without waiting for them.
#[real_test(quiet, userspace, host_only("guests have no OTLP collector"))]
fn undelivered_spans_are_reported() {
    let server = DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
    let none = [("OTEL_METRICS_EXPORTER", "none")];
    let observer = trace(server.pid(), &url(free_port()), "http/protobuf", &none);
    let mut connection = BufReader::new(http::connect(server.port));
    send_request(&mut connection, "/job/0");
    server.wait_for_tasks(TASKS_PER_JOB);
    assert!(observer.message().contains("no traces to"));
    thread::sleep(Duration::from_secs(1));
    let begin = Instant::now();
    let (report, messages) = observer.finish_with_messages();
    // Four seconds for the last attempt, and what the removal of the hooks takes. Retries would go on for minutes.
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert_eq!(report.0["self"]["otlp"][0]["delivered"], 0);
    let reported = messages
        .iter()
        .find_map(|message| message.strip_suffix(": the collector did not accept them in time"));
    let reported = reported.unwrap_or_else(|| panic!("{messages:?}"));
    let lost = reported.strip_suffix(" spans were not delivered").unwrap().rsplit(' ').next().unwrap();
    assert!(lost.parse::<usize>().unwrap() > TASKS_PER_JOB, "{reported}");
}

/// observer waits at its end for a collector that accepts connections and never responds, but not after a second
/// signal.
#[real_test(quiet, userspace)]
fn second_signal_ends_without_waiting_for_the_collector() {
    let server = Server::asyncio();
    let deaf = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = url(deaf.local_addr().unwrap().port());
    let observer = trace_stalls(["--pid", &server.pid().to_string()], &address, "http/protobuf");
    server.block("sleep", 120);
    thread::sleep(Duration::from_secs(1));
    observer.interrupt();
    thread::sleep(Duration::from_secs(1));
    let begin = Instant::now();
    let (_, messages) = observer.finish_with_messages();
    // Without the second signal, it would take nearly four seconds more.
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    assert!(messages.iter().any(|message| message.contains("spans were not delivered")), "{messages:?}");
}

/// A stall is an event of the request that it affected.
#[real_test(links, quiet, userspace, host_only("guests have no OTLP collector"))]
fn stall_is_an_event_of_its_request() {
    let server = Server::asyncio();
    let receiver = Receiver::start("http", &[]);
    let observer = trace(server.pid(), &url(receiver.port), "http/protobuf", &[]);
    server.block("sleep", 120);
    thread::sleep(Duration::from_secs(2));
    observer.finish();
    let requests = receiver.stop();
    let all = spans(&requests);
    let (_, server) = all.iter().find(|(_, span)| span["kind"] == "SPAN_KIND_SERVER").expect("a request");
    let own = all.iter().map(|(_, span)| span).find(|span| span["name"] == "stall");
    let (begin, seconds, reported) = match (&server["events"][0], own) {
        (event, None) => {
            assert_eq!(event["name"], "stall", "{all:#?}");
            let reported = event["attributes"].as_array().unwrap();
            let seconds = reported.iter().find(|one| one["key"] == "observer.stall.duration").unwrap();
            (
                time(event, "timeUnixNano"),
                seconds["value"]["doubleValue"].as_f64().unwrap(),
                &event["attributes"],
            )
        }
        (_, Some(span)) => {
            assert_eq!(span["parentSpanId"], server["spanId"]);
            assert_eq!(span["traceId"], server["traceId"]);
            let begin = time(span, "startTimeUnixNano");
            (begin, (time(span, "endTimeUnixNano") - begin) as f64 / 1e9, &span["attributes"])
        }
    };
    assert!((0.12..0.2).contains(&seconds), "{seconds}");
    assert_eq!(attributes(reported)["observer.stall.cause"], "sleep");
    assert!(begin.abs_diff(time(server, "startTimeUnixNano")) < 100_000_000, "{server:#}");
    let mut exemplars = 0;
    for_each_point(&requests, |_, metric, _, point| {
        for exemplar in point["exemplars"].as_array().into_iter().flatten() {
            if metric["name"] == "observer.reactor.slice" {
                assert_eq!(
                    (&exemplar["traceId"], &exemplar["spanId"]),
                    (&server["traceId"], &server["spanId"])
                );
                assert!((exemplar["asDouble"].as_f64().unwrap() - seconds).abs() < 1e-6);
                exemplars += 1;
            }
        }
    });
    assert_eq!(exemplars, 1);
}

/// Without profiles, requests are not followed, so a stall is a trace of its own.
#[real_test(quiet, userspace, host_only("guests have no OTLP collector"))]
fn stall_without_a_request_is_a_trace_of_its_own() {
    let server = Server::asyncio();
    let receiver = Receiver::start("grpc", &[]);
    let observer = trace_stalls(["--pid", &server.pid().to_string()], &url(receiver.port), "grpc");
    server.block("sleep", 120);
    thread::sleep(Duration::from_secs(1));
    observer.finish();
    let all = spans(&receiver.stop());
    let long = |span: &&Value| time(span, "endTimeUnixNano") - time(span, "startTimeUnixNano") >= 120_000_000;
    let found: Vec<_> = all.iter().map(|(_, span)| span).filter(long).collect();
    assert_eq!(found.len(), 1, "{all:#?}");
    let stall = found[0];
    assert_eq!((&stall["name"], &stall["kind"]), (&json!("stall"), &json!("SPAN_KIND_INTERNAL")));
    assert_eq!(stall.get("parentSpanId").and_then(Value::as_str).unwrap_or_default(), "", "{stall:#}");
    assert_eq!(attributes(&stall["attributes"])["observer.stall.cause"], "sleep");
}

/// A candidate is observed until it has been evaluated. Its stalls until then are not exported if it is rejected.
#[real_test(quiet, userspace, host_only("guests have no OTLP collector"))]
fn stall_of_a_rejected_candidate_is_not_exported() {
    let receiver = Receiver::start("http", &[]);
    let port = free_port().to_string();
    let observer = trace_stalls(["--port", &port], &url(receiver.port), "http/protobuf");
    let server = Server::asyncio();
    server.block("sleep", 120);
    thread::sleep(Duration::from_secs(2));
    observer.finish();
    let reported = spans(&receiver.stop());
    assert!(reported.is_empty(), "{reported:#?}");
}
