//! What is pushed to OpenTelemetry collectors: that it is what a scrape tells, and what becomes of it when a collector is
//! slow, away or will not have it.

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
    otlp::{Figures, Receiver, Rotel, certificate, for_each_point, pushed, scraped},
    servers::{Server, free_port},
};

pub(crate) const PROTOCOLS: [&str; 2] = ["grpc", "http/protobuf"];

/// Between two pushes.
const INTERVAL: Duration = Duration::from_millis(250);

/// observer at work on a server, pushing metrics often.
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

/// A collector that nobody here wrote takes what observer pushes between two scrapes and hands it on. Whatever is the
/// same in both scrapes must be the same in between, and whatever grows must be between the two.
#[real_test(userspace, host_only("guests have no collector"))]
fn a_collector_gets_the_figures_of_a_scrape() {
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
        // Longer than a scrape's figures may be old.
        thread::sleep(INTERVAL * 2);
        let first = scraped(&observer.scrape());
        let begin = now();
        thread::sleep(INTERVAL * 4);
        let end = now();
        thread::sleep(INTERVAL);
        let second = scraped(&observer.scrape());
        let report = observer.finish();
        thread::sleep(INTERVAL * 4);
        let requests = receiver.stop();
        let pushed = pushed(&requests);
        let between: Vec<_> = pushed.range(begin..end).map(|(_, figures)| figures).collect();
        assert!(between.len() >= 2, "{protocol}: {:?}", pushed.keys());
        let (mut compared, mut equal) = (0, 0);
        for figures in between {
            let series = |figures: &Figures| figures.keys().cloned().collect::<BTreeSet<_>>();
            assert_eq!(series(figures), series(&first), "{protocol}");
            for (key, value) in figures {
                let (least, most) = (first[key].min(second[key]), first[key].max(second[key]));
                // JSON is read to some digits less.
                let rounding = most * 1e-14;
                assert!(
                    (least - rounding..=most + rounding).contains(value),
                    "{protocol}: {key:?} is {value}, not in {least}..={most}"
                );
                compared += 1;
                equal += u32::from(least == most);
            }
        }
        eprintln!("{protocol}: {compared} figures compared, {equal} of them exactly");
        assert!(equal > compared / 2, "{protocol}: {equal} of {compared} did not change");

        // The last push is of the moment of the report.
        let lag = &report.reactor(server.pid())["lag"];
        let (_, last) = pushed.last_key_value().unwrap();
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

#[real_test(userspace, host_only("guests have no collector"))]
fn headers_and_secrets_arrive() {
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
        // grpcio keeps the encoding to itself.
        assert!(protocol == "grpc" || headers[encoding] == "gzip", "{headers}");
        for_each_point(&[request], |resource, _, _, _| {
            assert_eq!(resource["deployment.environment.name"], "test")
        });

        // Whoever cannot be trusted gets nothing.
        let observer = push(&server, &address, protocol, &variables[..2]);
        let message = observer.message();
        assert!(message.contains("invalid peer certificate"), "{message}");
        observer.finish();
    }
}

/// What a collector asks to send again arrives, and not before the time that it asked for.
#[real_test(quiet, userspace, host_only("guests have no collector"))]
fn a_collector_may_ask_to_wait() {
    let server = Server::asyncio();
    // Unavailable, and exhausted with a time to wait, without which that would be for good.
    for (protocol, answers) in [("grpc", ["14=2", "8=2"]), ("http/protobuf", ["503=2", "429=2"])] {
        let receiver = Receiver::start(protocol, &answers);
        let observer = push(&server, &url(receiver.port), protocol, &[]);
        let begin = Instant::now();
        let message = observer.message();
        assert!(message.contains("no metrics to") && message.contains("sent again"), "{message}");
        let first = receiver.next();
        assert!(begin.elapsed() >= Duration::from_millis(3900), "{protocol}: after {:?}", begin.elapsed());
        assert!(observer.message().contains("takes metrics again"));
        let figures = figures_of(&observer);
        assert_eq!(figures["observer_self_otlp_failures_total"], 2.0);
        assert_eq!(figures["observer_self_otlp_dropped_total"], 0.0);
        observer.finish();
        thread::sleep(INTERVAL);
        let all = [vec![first], receiver.stop()].concat();
        assert_unbroken(&all, begin);
    }
}

/// observer's own figures by name; those of several reasons added up.
pub(crate) fn figures_of(observer: &Observer) -> BTreeMap<String, f64> {
    let mut figures = BTreeMap::new();
    for ((name, _), value) in scraped(&observer.scrape()) {
        *figures.entry(name).or_default() += value;
    }
    figures
}

/// Asserts that no push is missing.
#[track_caller]
fn assert_unbroken(requests: &[Value], since: Instant) {
    let moments: Vec<_> = pushed(requests).into_keys().collect();
    for pair in moments.windows(2) {
        let gap = Duration::from_nanos(pair[1] - pair[0]);
        assert!(gap < INTERVAL * 3, "nothing for {gap:?}");
    }
    let expected = since.elapsed().div_duration_f64(INTERVAL);
    assert!(moments.len() as f64 > expected / 2.0, "{} pushes instead of {expected}", moments.len());
}

#[real_test(userspace, host_only("guests have no collector"))]
fn what_a_collector_refuses_is_counted() {
    let server = Server::asyncio();
    for (protocol, answers) in [("grpc", ["3", "8"]), ("http/protobuf", ["400", "500"])] {
        let receiver = Receiver::start(protocol, &answers);
        let observer = push(&server, &url(receiver.port), protocol, &[]);
        let message = observer.message();
        assert!(message.contains("refused"), "{message}");
        receiver.next();
        let figures = figures_of(&observer);
        assert!(figures["observer_self_otlp_dropped_total"] > 0.0, "{protocol}: {figures:?}");
        assert_eq!(figures["observer_self_otlp_failures_total"], 2.0);
        observer.finish();
    }
}

/// A collector that is not there at first, and killed later, gets all in the end.
#[real_test(quiet, userspace, host_only("guests have no collector"))]
fn a_collector_may_come_and_go() {
    let server = Server::asyncio();
    for protocol in PROTOCOLS {
        let port = free_port();
        let begin = Instant::now();
        let observer = push(&server, &url(port), protocol, &[]);
        let message = observer.message();
        assert!(message.contains("Connection refused"), "{message}");
        let receiver = Receiver::start_at(port, protocol, &[]);
        assert!(observer.message().contains("takes metrics again"));
        let mut all = receiver.within(INTERVAL * 4);
        all.extend(receiver.stop());
        assert!(observer.message().contains("no metrics to"));
        thread::sleep(Duration::from_secs(3));
        let receiver = Receiver::start_at(port, protocol, &[]);
        assert!(observer.message().contains("takes metrics again"));
        all.extend(receiver.within(INTERVAL * 4));
        let figures = figures_of(&observer);
        assert_eq!(figures["observer_self_otlp_dropped_total"], 0.0);
        let report = observer.finish();
        thread::sleep(INTERVAL);
        all.extend(receiver.stop());
        assert_unbroken(&all, begin);
        let told = &report.0["self"]["otlp"][0];
        assert!(told["failures"].as_u64().unwrap() > 0, "{told}");
        assert!(told["delivered"].as_f64().unwrap() >= figures["observer_self_otlp_delivered_total"]);
    }
}

/// Nobody who observes waits for a collector: not at the start, not in between, and at the end only so long.
#[real_test(quiet, userspace, host_only("guests have no collector"))]
fn a_collector_that_says_nothing_holds_nobody_up() {
    let server = Server::asyncio();
    for protocol in PROTOCOLS {
        // Connections are made by the kernel, and nobody accepts them.
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
fn what_is_wrong_with_an_address_is_told_at_once() {
    let fails = |arguments: &[&str], variables: &[(&str, &str)], what: &str| {
        let me = std::process::id().to_string();
        let output = Command::new(BINARY)
            .args(["--pid", &me, "--no-listen", "--duration", "1s"])
            .args(arguments)
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(said.lines().count(), 2, "{said}");
        assert!(said.contains(what), "{said}");
    };
    let me = std::process::id().to_string();
    let flag = ["--pid", &me, "--no-listen", "--duration", "1s", "--otlp-endpoint", "localhost:4317"];
    let output = Command::new(BINARY).args(flag).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no address of a collector"));
    fails(&[], &[("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://x")], "OTEL_EXPORTER_OTLP_ENDPOINT");
    let https = ["--otlp-endpoint", "https://127.0.0.1:1"];
    fails(&https, &[("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere.pem")], "/nowhere.pem");
    fails(&https, &[("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/json")], "http/json");
}
