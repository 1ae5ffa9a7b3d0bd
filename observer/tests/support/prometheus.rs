//! A Prometheus that scrapes every second, with the repository's rules changed to short time ranges.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

use super::{Process, http, servers::free_port, wait_for};

/// Replacement for the time ranges of rules and dashboards, and for the `for` of alerts.
pub(crate) const RANGE: &str = "10s";
const ALERT_FOR: &str = "2s";

/// Folder of the dashboards and rules.
pub(crate) fn dashboards() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("dashboards")
}

/// Prometheus and the port of its API.
pub(crate) struct Prometheus {
    _process: Process,
    port: u16,
    _files: TempDir,
}

impl Prometheus {
    /// Scrapes these ports as job `observer`.
    pub(crate) fn scraping(ports: &[u16]) -> Self {
        let files = tempfile::tempdir().unwrap();
        let rules = fs::read_to_string(dashboards().join("rules.yml")).unwrap();
        let rules = rules.replace("[5m]", &format!("[{RANGE}]")).replace("[2m]", &format!("[{RANGE}]"));
        let rules = rules.replace("for: 5m", &format!("for: {ALERT_FOR}"));
        let rules = rules.replace("for: 1m", &format!("for: {ALERT_FOR}"));
        assert!(
            !rules.contains("m]") && !rules.contains("m\n        labels"),
            "a time range that was not replaced: {rules}"
        );
        fs::write(files.path().join("rules.yml"), rules).unwrap();
        let targets: Vec<_> = ports.iter().map(|port| format!("'127.0.0.1:{port}'")).collect();
        let config = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [rules.yml]\n\
             scrape_configs: [{{ job_name: observer, static_configs: [{{ targets: [{}] }}] }}]\n",
            targets.join(", ")
        );
        fs::write(files.path().join("prometheus.yml"), config).unwrap();
        let port = free_port();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", files.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", files.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--log.level=error")
            .stdin(Stdio::null())
            .spawn()
            .expect("prometheus is installed");
        let prometheus = Self { _process: Process(child), port, _files: files };
        wait_for("Prometheus", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok());
        wait_for("Prometheus to be ready", || prometheus.get("/-/ready").0.contains(" 200 ").then_some(()));
        wait_for("Prometheus to scrape", || {
            let up = prometheus.query("sum(up)");
            (up.len() == 1 && up[0].1 == f64::from(u32::try_from(ports.len()).unwrap())).then_some(())
        });
        prometheus
    }

    /// Labels and value of each series that a query returns now.
    #[track_caller]
    pub(crate) fn query(&self, query: &str) -> Vec<(Value, f64)> {
        let encoded: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let (head, body) = self.get(&format!("/api/v1/query?query={encoded}"));
        let answer: Value =
            serde_json::from_str(&body).unwrap_or_else(|_| panic!("{query} is answered by {head} {body}"));
        assert_eq!(answer["status"], "success", "{query}: {answer:#}");
        let result = answer["data"]["result"].as_array().unwrap().iter();
        let value = |one: &Value| one["value"][1].as_str().unwrap().parse().unwrap();
        result.map(|one| (one["metric"].clone(), value(one))).collect()
    }

    /// Names of the alerts that are firing now.
    pub(crate) fn firing(&self) -> Vec<String> {
        let alerts = self.query("ALERTS{alertstate='firing'}");
        let mut names: Vec<_> =
            alerts.iter().map(|(labels, _)| labels["alertname"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// HTTP/1.0 avoids chunked responses.
    fn get(&self, path: &str) -> (String, String) {
        let mut connection = http::connect(self.port);
        write!(connection, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer to {path}"));
        (head.to_owned(), body.to_owned())
    }
}
