//! Metrics pushed to OpenTelemetry collectors: they have the values of a scrape, and survive a collector that is slow,
//! away or refuses them.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;

use crate::support::{
    http,
    observer::{BINARY, Observer},
    otlp::{Receiver, Rotel, Samples, certificate, for_each_point, parse_pushes, parse_scrape},
    servers::{Server, free_port},
};

pub(crate) const PROTOCOLS: [&str; 2] = ["grpc", "http/protobuf"];

/// Interval of pushes.
const INTERVAL: Duration = Duration::from_millis(250);

/// observer on a server, with short intervals between pushes of metrics.
fn push(server: &Server, address: &str, protocol: &str, variables: &[(&str, &str)]) -> Observer {
    let pid = server.pid().to_string();
    let flags =
        ["--pid", &pid, "--listen", "127.0.0.1:0", "--otlp-endpoint", address, "--otlp-protocol", protocol];
    let interval = INTERVAL.as_millis().to_string();
    let others = [("OTEL_METRIC_EXPORT_INTERVAL", interval.as_str()), ("OTEL_TRACES_EXPORTER", "none")];
    Observer::start_with(&flags, &[variables, &others].concat())
}

pub(crate) fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos().try_into().unwrap()
}

/// A third-party collector forwards what observer pushes between two scrapes. Values that are the same in both scrapes
/// must be the same in between, and growing values must be between the two.
#[real_test(userspace, host_only("guests have no OTLP collector"))]
#[expect(clippy::too_many_lines, reason = "one scenario against one collector")]
fn collector_gets_the_values_of_a_scrape() {
    for protocol in PROTOCOLS {
        let receiver = Receiver::start("http", &[]);
        let rotel = Rotel::before(receiver.port);
        let server = Server::asyncio_with(&[("OTEL_SERVICE_NAME", "till")]);
        let before = now();
        let observer = push(&server, &url(rotel.port(protocol)), protocol, &[]);
        for _ in 0..5 {
            server.block("sleep", 60);
        }
        server.wait_until_idle();
        // Longer than the metrics of a scrape may be out of date.
        thread::sleep(INTERVAL * 2);
        let first = parse_scrape(&observer.scrape());
        let begin = now();
        thread::sleep(INTERVAL * 4);
        let end = now();
        thread::sleep(INTERVAL);
        let second = parse_scrape(&observer.scrape());
        let report = observer.finish();
        thread::sleep(INTERVAL * 4);
        let requests = receiver.stop();
        let pushes = parse_pushes(&requests);
        let between: Vec<_> = pushes.range(begin..end).map(|(_, samples)| samples).collect();
        assert!(between.len() >= 2, "{protocol}: {:?}", pushes.keys());
        let (mut compared, mut equal) = (0, 0);
        for samples in between {
            let series = |samples: &Samples| samples.keys().cloned().collect::<BTreeSet<_>>();
            assert_eq!(series(samples), series(&first), "{protocol}");
            for (key, value) in samples {
                let (least, most) = (first[key].min(second[key]), first[key].max(second[key]));
                // Parsing JSON may lose the last digits.
                let rounding = most * 1e-14;
                assert!(
                    (least - rounding..=most + rounding).contains(value),
                    "{protocol}: {key:?} is {value}, not in {least}..={most}"
                );
                compared += 1;
                equal += u32::from(least == most);
            }
        }
        eprintln!("{protocol}: {compared} samples compared, {equal} of them exactly");
        assert!(equal > compared / 2, "{protocol}: {equal} of {compared} did not change");

        // The last push has the timestamp of the report.
        let lag = &report.reactor(server.pid())["lag"];
        let (_, last) = pushes.last_key_value().unwrap();
        let mut of_lag =
            last.iter().filter(|((name, _), _)| name.starts_with("observer_reactor_lag_seconds_"));
        assert!(of_lag.clone().count() > 20);
        assert!(
            of_lag.any(|((name, _), value)| name.ends_with("_sum") && *value == lag["sum"].as_f64().unwrap())
        );

        let mut starts = BTreeSet::new();
        for_each_point(&requests, |resource, metric, kind, point| {
            let start: u64 = point["startTimeUnixNano"].as_str().unwrap_or("0").parse().unwrap();
            if kind == "gauge" {
                assert_eq!(start, 0, "{metric:#}");
            } else {
                starts.insert(start);
            }
            if resource["service.name"] == "till" {
                assert_eq!(resource["process.pid"], server.pid().to_string());
                assert!(resource["process.executable.name"].starts_with("python3"), "{resource:?}");
                assert!(resource["service.instance.id"].ends_with(&format!(":{}", server.pid())));
            } else {
                assert_eq!(resource["service.name"], "observer");
                let name = metric["name"].as_str().unwrap();
                assert!(name.starts_with("observer.self.") || name == "observer.build.info", "{name}");
            }
        });
        assert_eq!(starts.len(), 1, "all is counted since the programs were attached: {starts:?}");
        assert!((before..begin).contains(starts.first().unwrap()));
    }
}

#[real_test(userspace, host_only("guests have no OTLP collector"))]
fn headers_compression_and_certificates_are_used() {
    let files = tempfile::tempdir().unwrap();
    let pem = certificate(files.path());
    let pem = pem.to_str().unwrap();
    let server = Server::asyncio();
    for protocol in PROTOCOLS {
        let receiver = Receiver::start(protocol, &[pem]);
        let address = format!("https://127.0.0.1:{}", receiver.port);
        let variables = [
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x,x-tenant=a"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", pem),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test"),
        ];
        let observer = push(&server, &address, protocol, &variables);
        let request = receiver.next();
        observer.finish();
        let headers = &request["headers"];
        assert_eq!((&headers["authorization"], &headers["x-tenant"]), (&"Bearer x".into(), &"a".into()));
        assert!(headers["user-agent"].as_str().unwrap().starts_with("observer/"), "{headers}");
        let encoding = if protocol == "grpc" { "grpc-encoding" } else { "content-encoding" };
        // grpcio does not expose the encoding.
        assert!(protocol == "grpc" || headers[encoding] == "gzip", "{headers}");
        for_each_point(&[request], |resource, _, _, _| {
            assert_eq!(resource["deployment.environment.name"], "test")
        });

        // Nothing is sent to a server whose certificate is not trusted.
        let observer = push(&server, &address, protocol, &variables[..2]);
        let message = observer.message();
        assert!(message.contains("invalid peer certificate"), "{message}");
        observer.finish();
    }
}

/// A push that a collector asks to retry arrives, and not before the requested time.
#[real_test(quiet, userspace, host_only("guests have no OTLP collector"))]
fn retry_delay_of_the_collector_is_respected() {
    let server = Server::asyncio();
    // Unavailable; and exhausted with a delay, which without one would be final.
    for (protocol, answers) in [("grpc", ["14=2", "8=2"]), ("http/protobuf", ["503=2", "429=2"])] {
        let receiver = Receiver::start(protocol, &answers);
        let observer = push(&server, &url(receiver.port), protocol, &[]);
        let begin = Instant::now();
        let message = observer.message();
        assert!(message.contains("no metrics to") && message.contains("retries"), "{message}");
        let first = receiver.next();
        assert!(begin.elapsed() >= Duration::from_millis(3900), "{protocol}: after {:?}", begin.elapsed());
        assert!(observer.message().contains("accepts metrics again"));
        let metrics = metrics_of(&observer);
        assert_eq!(metrics["observer_self_otlp_failures_total"], 2.0);
        assert_eq!(metrics["observer_self_otlp_dropped_total"], 0.0);
        observer.finish();
        thread::sleep(INTERVAL);
        let all = [vec![first], receiver.stop()].concat();
        assert_no_push_missing(&all, begin);
    }
}

/// observer's own metrics by name, summed over labels.
pub(crate) fn metrics_of(observer: &Observer) -> BTreeMap<String, f64> {
    let mut metrics = BTreeMap::new();
    for ((name, _), value) in parse_scrape(&observer.scrape()) {
        *metrics.entry(name).or_default() += value;
    }
    metrics
}

/// Asserts that no push is missing.
#[track_caller]
fn assert_no_push_missing(requests: &[Value], since: Instant) {
    let moments: Vec<_> = parse_pushes(requests).into_keys().collect();
    for pair in moments.windows(2) {
        let gap = Duration::from_nanos(pair[1] - pair[0]);
        assert!(gap < INTERVAL * 3, "nothing for {gap:?}");
    }
    let expected = since.elapsed().div_duration_f64(INTERVAL);
    assert!(moments.len() as f64 > expected / 2.0, "{} pushes instead of {expected}", moments.len());
}

#[real_test(userspace, host_only("guests have no OTLP collector"))]
fn refused_pushes_are_counted() {
    let server = Server::asyncio();
    for (protocol, answers) in [("grpc", ["3", "8"]), ("http/protobuf", ["400", "500"])] {
        let receiver = Receiver::start(protocol, &answers);
        let observer = push(&server, &url(receiver.port), protocol, &[]);
        let message = observer.message();
        assert!(message.contains("refused"), "{message}");
        receiver.next();
        let metrics = metrics_of(&observer);
        assert!(metrics["observer_self_otlp_dropped_total"] > 0.0, "{protocol}: {metrics:?}");
        assert_eq!(metrics["observer_self_otlp_failures_total"], 2.0);
        observer.finish();
    }
}

/// A collector that starts late and is killed later gets all pushes in the end.
#[real_test(quiet, userspace, host_only("guests have no OTLP collector"))]
fn pushes_are_retried_while_the_collector_is_away() {
    let server = Server::asyncio();
    for protocol in PROTOCOLS {
        let port = free_port();
        let begin = Instant::now();
        let observer = push(&server, &url(port), protocol, &[]);
        let message = observer.message();
        assert!(message.contains("Connection refused"), "{message}");
        let receiver = Receiver::start_at(port, protocol, &[]);
        assert!(observer.message().contains("accepts metrics again"));
        let mut all = receiver.within(INTERVAL * 4);
        all.extend(receiver.stop());
        assert!(observer.message().contains("no metrics to"));
        thread::sleep(Duration::from_secs(3));
        let receiver = Receiver::start_at(port, protocol, &[]);
        assert!(observer.message().contains("accepts metrics again"));
        all.extend(receiver.within(INTERVAL * 4));
        let metrics = metrics_of(&observer);
        assert_eq!(metrics["observer_self_otlp_dropped_total"], 0.0);
        let report = observer.finish();
        thread::sleep(INTERVAL);
        all.extend(receiver.stop());
        assert_no_push_missing(&all, begin);
        let stats = &report.0["self"]["otlp"][0];
        assert!(stats["failures"].as_u64().unwrap() > 0, "{stats}");
        assert!(stats["delivered"].as_f64().unwrap() >= metrics["observer_self_otlp_delivered_total"]);
    }
}

/// observer never waits for a collector: not at the start, not in between, and at the end only for a limited time.
#[real_test(quiet, userspace, host_only("guests have no OTLP collector"))]
fn unresponsive_collector_delays_nothing() {
    let server = Server::asyncio();
    for protocol in PROTOCOLS {
        // The kernel establishes connections, but no process accepts them.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let observer = push(&server, &url(port), protocol, &[("OTEL_EXPORTER_OTLP_TIMEOUT", "400")]);
        assert!(observer.message().contains("no answer within 400ms"));
        for _ in 0..5 {
            let begin = Instant::now();
            http::get(observer.port(), "/metrics");
            assert!(begin.elapsed() < Duration::from_secs(1), "a scrape took {:?}", begin.elapsed());
        }
        let begin = Instant::now();
        observer.finish();
        assert!(begin.elapsed() < Duration::from_secs(10), "the end took {:?}", begin.elapsed());
    }
}

#[real_test(userspace)]
fn invalid_endpoint_is_an_error() {
    let fails = |arguments: &[&str], variables: &[(&str, &str)], what: &str| {
        let me = std::process::id().to_string();
        let output = Command::new(BINARY)
            .args(["--pid", &me, "--no-listen", "--duration", "1s"])
            .args(arguments)
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.lines().count(), 2, "{stderr}");
        assert!(stderr.contains(what), "{stderr}");
    };
    let me = std::process::id().to_string();
    let flag = ["--pid", &me, "--no-listen", "--duration", "1s", "--otlp-endpoint", "localhost:4317"];
    let output = Command::new(BINARY).args(flag).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not the URL of a collector"));
    fails(&[], &[("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://x")], "OTEL_EXPORTER_OTLP_ENDPOINT");
    let https = ["--otlp-endpoint", "https://127.0.0.1:1"];
    fails(&https, &[("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem")], "/nowhere.pem");
    fails(&https, &[("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/json")], "http/json");
}
