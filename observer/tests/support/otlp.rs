//! A third-party collector (rotel), OTLP receivers behind it, and samples in a form that can be compared with a scrape.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{LIMIT, Process, servers::free_port, wait_for};

/// Folder with the Python packages that xtask installs for these tests.
fn packages() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("target/tools/otlp");
    assert!(folder.exists(), "`cargo xtask test` fetches what this test needs");
    folder
}

/// Receives requests, decodes them and prints them; see `servers/otlp_receiver.py`.
pub(crate) struct Receiver {
    pub(crate) port: u16,
    process: Process,
    requests: mpsc::Receiver<Value>,
}

impl Receiver {
    /// Listens on any free port.
    pub(crate) fn start(protocol: &str, rest: &[&str]) -> Self {
        Self::start_at(0, protocol, rest)
    }

    /// Listens on this port.
    pub(crate) fn start_at(port: u16, protocol: &str, rest: &[&str]) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/otlp_receiver.py");
        let mut child = Command::new("/usr/bin/python3")
            .arg(script)
            .args([protocol.split('/').next().unwrap(), &port.to_string()])
            .args(rest)
            .env("PYTHONPATH", packages())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let process = Process(child);
        let port = lines.next().expect("the receiver prints its port").unwrap().parse().unwrap();
        let (sender, requests) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _receiver_dropped = sender.send(serde_json::from_str(&line).unwrap());
            }
        });
        Self { port, process, requests }
    }

    /// The next request with its headers.
    #[track_caller]
    pub(crate) fn next(&self) -> Value {
        self.requests.recv_timeout(LIMIT).expect("a request")
    }

    /// All requests that arrive within this time.
    pub(crate) fn within(&self, time: Duration) -> Vec<Value> {
        let end = Instant::now() + time;
        std::iter::from_fn(|| self.requests.recv_timeout(end.saturating_duration_since(Instant::now())).ok())
            .collect()
    }

    /// Stops the receiver, and returns the remaining requests.
    pub(crate) fn stop(self) -> Vec<Value> {
        drop(self.process);
        self.requests.iter().collect()
    }
}

/// A collector that forwards to a receiver, and the ports that it listens on.
pub(crate) struct Rotel {
    pub(crate) grpc: u16,
    pub(crate) http: u16,
    _process: Process,
}

impl Rotel {
    /// Starts a collector that forwards to this port.
    pub(crate) fn before(receiver: u16) -> Self {
        let (grpc, http) = (free_port(), free_port());
        let child = Command::new(packages().join("rotel/rotel-agent"))
            .args(["start", "--exporter", "otlp", "--otlp-exporter-protocol", "http"])
            .args(["--otlp-exporter-endpoint", &format!("http://127.0.0.1:{receiver}")])
            .args(["--otlp-grpc-endpoint", &format!("127.0.0.1:{grpc}")])
            .args(["--otlp-http-endpoint", &format!("127.0.0.1:{http}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let rotel = Self { grpc, http, _process: Process(child) };
        for port in [grpc, http] {
            wait_for("rotel", || TcpStream::connect(("127.0.0.1", port)).ok());
        }
        rotel
    }

    pub(crate) fn port(&self, protocol: &str) -> u16 {
        if protocol == "grpc" { self.grpc } else { self.http }
    }
}

/// A certificate for 127.0.0.1 and its key, in one file.
pub(crate) fn certificate(folder: &Path) -> PathBuf {
    let (key, file) = (folder.join("key"), folder.join("collector.pem"));
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=collector", "-addext", "subjectAltName=IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&file)
        .output()
        .expect("openssl is installed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    fs::write(&file, [fs::read(&file).unwrap(), fs::read(&key).unwrap()].concat()).unwrap();
    file
}

/// Samples by name and labels, as in Prometheus.
pub(crate) type Samples = BTreeMap<(String, BTreeMap<String, String>), f64>;

/// Samples of a scrape without the label `comm`, which OTLP has as an attribute of the resource.
pub(crate) fn parse_scrape(text: &str) -> Samples {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let mut labels = labels_of(labels.strip_suffix('}').unwrap());
            labels.remove("comm");
            if let Some(le) = labels.get_mut("le") {
                *le = bound(le.replace("+Inf", "inf").parse().unwrap());
            }
            ((name.to_owned(), labels), value.parse().unwrap())
        })
        .collect()
}

/// Parses `name="value",name="value"`, with escaped quotes in values.
fn labels_of(mut text: &str) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    while let Some((name, rest)) = text.split_once("=\"") {
        let mut value = String::new();
        let mut characters = rest.char_indices();
        let end = loop {
            match characters.next().unwrap() {
                (_, '\\') => value.push(characters.next().unwrap().1),
                (end, '"') => break end,
                (_, other) => value.push(other),
            }
        };
        labels.insert(name.trim_start_matches(',').to_owned(), value);
        text = &rest[end + 1..];
    }
    labels
}

fn bound(le: f64) -> String {
    format!("{le:e}")
}

/// Samples of requests by their timestamp, in nanoseconds.
pub(crate) fn parse_pushes(requests: &[Value]) -> BTreeMap<u64, Samples> {
    let mut all = BTreeMap::<u64, Samples>::new();
    for_each_point(requests, |resource, metric, kind, point| {
        let attributes = attributes(&point["attributes"]);
        let labels = labels(resource, &attributes, metric["name"] == "observer.target.info");
        let mut name = metric["name"].as_str().unwrap().replace('.', "_");
        match metric["unit"].as_str() {
            Some("s") if !name.ends_with("_seconds") => name += "_seconds",
            Some("By") => name += "_bytes",
            Some("1") => name += "_ratio",
            _ => {}
        }
        let moment = point["timeUnixNano"].as_str().unwrap().parse().unwrap();
        let samples = all.entry(moment).or_default();
        let mut add = |name: String, labels: BTreeMap<String, String>, value: f64| {
            let last = samples.insert((name, labels), value);
            assert_eq!(last, None, "two samples at the same time: {point:#}");
        };
        match kind {
            "gauge" => add(name, labels, value(point)),
            "sum" => {
                assert_eq!(metric["sum"]["isMonotonic"], true);
                add(name + "_total", labels, value(point));
            }
            _ => {
                let bounds = point["explicitBounds"].as_array().unwrap().iter().map(number);
                let counts = point["bucketCounts"].as_array().unwrap().iter().map(number);
                let mut below = 0.0;
                for (le, count) in bounds.chain([f64::INFINITY]).zip(counts) {
                    below += count;
                    let mut labels = labels.clone();
                    labels.insert("le".into(), bound(le));
                    add(format!("{name}_bucket"), labels, below);
                }
                add(format!("{name}_count"), labels.clone(), number(&point["count"]));
                add(format!("{name}_sum"), labels, number(&point["sum"]));
            }
        }
    });
    all
}

/// Calls `see` for each data point, with the attributes of its resource, its metric and the kind of the metric.
pub(crate) fn for_each_point(
    requests: &[Value],
    mut visit: impl FnMut(&BTreeMap<String, String>, &Value, &str, &Value),
) {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    for resource in requests.iter().flat_map(|request| list(&request["request"]["resourceMetrics"])) {
        let resource_attributes = attributes(&resource["resource"]["attributes"]);
        for metric in list(&resource["scopeMetrics"]).iter().flat_map(|scope| list(&scope["metrics"])) {
            let kind =
                ["gauge", "sum", "histogram"].into_iter().find(|kind| metric.get(kind).is_some()).unwrap();
            assert_eq!(
                metric[kind].get("aggregationTemporality").map_or("", |kind| kind.as_str().unwrap()),
                if kind == "gauge" { "" } else { "AGGREGATION_TEMPORALITY_CUMULATIVE" }
            );
            assert!(!metric["description"].as_str().unwrap().is_empty());
            for point in list(&metric[kind]["dataPoints"]) {
                visit(&resource_attributes, &metric, kind, &point);
            }
        }
    }
}

/// Labels that the data point has in Prometheus.
fn labels(
    resource: &BTreeMap<String, String>,
    attributes: &BTreeMap<String, String>,
    is_info: bool,
) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for (name, value) in attributes {
        let name = match name.as_str() {
            "observer.loop" => "loop",
            "thread.name" => "reactor",
            "comm" => continue,
            other => other,
        };
        labels.insert(name.to_owned(), value.clone());
    }
    if resource["service.name"] != "observer" {
        let mut add = |label: &str, attribute| {
            labels.insert(label.into(), resource.get(attribute).cloned().unwrap_or_default());
        };
        add("pid", "process.pid");
        add("container", "container.id");
        add("pod", "k8s.pod.name");
        if is_info {
            add("exe", "process.executable.path");
            add("namespace", "k8s.namespace.name");
            add("container_name", "k8s.container.name");
            add("pod_uid", "k8s.pod.uid");
            add("unit", "systemd.unit.name");
        }
    }
    labels
}

pub(crate) fn attributes(list: &Value) -> BTreeMap<String, String> {
    let list = list.as_array().map_or(&[][..], Vec::as_slice);
    let pairs = list.iter().map(|attribute| {
        let value = &attribute["value"];
        let text = value["stringValue"].as_str().or_else(|| value["intValue"].as_str()).unwrap_or_default();
        (attribute["key"].as_str().unwrap().to_owned(), text.to_owned())
    });
    pairs.collect()
}

fn value(point: &Value) -> f64 {
    number(point.get("asInt").unwrap_or(&point["asDouble"]))
}

/// Protobuf JSON has 64-bit integers as strings, and may omit a zero.
fn number(value: &Value) -> f64 {
    value.as_f64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default()
}
