//! Runs the observer binary and parses its report.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::{Command, ExitStatus, Stdio},
    sync::mpsc,
    time::{SystemTime, UNIX_EPOCH},
};

use nix::sys::signal::Signal;
use serde_json::Value;

use super::{LIMIT, Process, exit_within, http, schema, wait_for};

/// The binary under test.
pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_observer");

/// A copy of the binary that every user can run: the repository may be in a home directory that only root can read.
pub(crate) struct PublicBinary(tempfile::TempDir);

impl PublicBinary {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(BINARY, folder.path().join("observer")).unwrap();
        Self(folder)
    }

    /// A command that runs it as an unprivileged user.
    pub(crate) fn as_nobody(&self) -> Command {
        const NOBODY: u32 = 65_534;
        let mut command = Command::new(self.0.path().join("observer"));
        command.uid(NOBODY).gid(NOBODY);
        command
    }
}

/// A running observer that will write a JSON report.
pub(crate) struct Observer {
    process: Process,
    /// Lines on standard error until it was ready.
    pub(crate) announcement: Vec<String>,
    /// Later lines on standard error.
    messages: mpsc::Receiver<String>,
}

impl Observer {
    /// Observes a process without a scrape endpoint. Returns when all programs are attached.
    pub(crate) fn attach(pid: u32) -> Self {
        Self::start(&["--pid", &pid.to_string(), "--no-listen"])
    }

    /// Starts observer with these arguments. Returns when all programs are attached.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_with(arguments, &[])
    }

    /// Starts observer with these arguments and environment variables.
    pub(crate) fn start_with(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::start_command(Command::new(BINARY), arguments, variables)
    }

    /// Starts observer through a command that executes it with the arguments.
    pub(crate) fn start_command(
        mut command: Command,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let mut child = command
            .args(arguments)
            .envs(variables.iter().copied())
            .args(["--format", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let process = Process(child);
        let (sender, messages) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                eprintln!("observer: {line}");
                let _receiver_dropped = sender.send(line);
            }
        });
        let mut announcement = Vec::new();
        while !announcement.last().is_some_and(|line: &String| line.starts_with("report ")) {
            let line = messages.recv_timeout(LIMIT).unwrap_or_else(|_| panic!("not ready: {announcement:?}"));
            announcement.push(line);
        }
        Self { process, announcement, messages }
    }

    /// Waits for the next message.
    #[track_caller]
    pub(crate) fn message(&self) -> String {
        self.messages.recv_timeout(LIMIT).expect("a message")
    }

    /// Messages that have arrived and were not read yet.
    pub(crate) fn messages(&self) -> Vec<String> {
        self.messages.try_iter().collect()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Port of the scrape endpoint, as announced.
    pub(crate) fn port(&self) -> u16 {
        let line = self.announcement.iter().find(|line| line.contains("/metrics")).expect("an endpoint");
        let address = line.split("http://").nth(1).unwrap().trim_end_matches("/metrics");
        address.parse::<std::net::SocketAddr>().unwrap().port()
    }

    /// Resident memory, in bytes.
    pub(crate) fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// How often the kernel skipped a program because it was already running on that CPU. 0 on kernels that do not
    /// report it.
    pub(crate) fn skipped_runs(&self) -> u64 {
        let folder = fs::read_dir(format!("/proc/{}/fdinfo", self.pid())).unwrap().flatten();
        let texts = folder.filter_map(|entry| fs::read_to_string(entry.path()).ok());
        let count = |text: &str| -> Option<u64> {
            text.lines().find_map(|line| line.strip_prefix("recursion_misses:"))?.trim().parse().ok()
        };
        texts.filter_map(|text| count(&text)).sum()
    }

    /// A scrape whose values were refreshed after this call.
    pub(crate) fn scrape(&self) -> String {
        let called = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        wait_for("a fresh scrape", || {
            let scrape = http::get(self.port(), "/metrics");
            let refreshed = value(&scrape, "observer_self_refreshed_timestamp_seconds");
            let is_off = value(&scrape, "observer_self_off") == Some(1.0);
            (is_off || refreshed.is_some_and(|time| time >= called)).then_some(scrape)
        })
    }

    /// Value of the only series with this name, in a fresh scrape.
    #[track_caller]
    pub(crate) fn metric(&self, name: &str) -> f64 {
        only_value(&self.scrape(), name)
    }

    /// Value of the only series with this name, in a scrape that may be a second old.
    #[track_caller]
    pub(crate) fn latest_metric(&self, name: &str) -> f64 {
        only_value(&http::get(self.port(), "/metrics"), name)
    }

    /// Sends SIGINT, like Ctrl-C.
    pub(crate) fn interrupt(&self) {
        self.signal(Signal::SIGINT);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Interrupts observer and returns its report.
    pub(crate) fn finish(self) -> Report {
        self.interrupt();
        self.report()
    }

    /// Interrupts observer and returns its report and all remaining messages.
    pub(crate) fn finish_with_messages(mut self) -> (Report, Vec<String>) {
        let messages = std::mem::replace(&mut self.messages, mpsc::channel().1);
        let report = self.finish();
        (report, messages.iter().collect())
    }

    /// Waits until observer ends without a signal, and returns its report.
    pub(crate) fn report(mut self) -> Report {
        let mut stdout = self.process.0.stdout.take().unwrap();
        // Read concurrently, because a report that does not fit into the pipe would block observer.
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).map(|_| text)
        });
        let status = exit_within(&mut self.process.0, LIMIT).expect("observer does not end");
        let text = reader.join().unwrap().unwrap();
        assert!(status.success(), "observer ended with {status}: {text}");
        let report = serde_json::from_str(&text).unwrap();
        schema::assert_valid(&report);
        Report(report)
    }

    /// Kills observer with SIGKILL.
    pub(crate) fn kill(mut self) -> ExitStatus {
        self.process.signal(Signal::SIGKILL);
        self.process.0.wait().unwrap()
    }
}

/// A JSON report.
#[derive(Debug)]
pub(crate) struct Report(pub(crate) Value);

impl Report {
    /// The target with this process id.
    #[track_caller]
    pub(crate) fn target(&self, pid: u32) -> &Value {
        let targets = self.0["targets"].as_array().unwrap();
        targets.iter().find(|t| t["pid"] == pid).unwrap_or_else(|| panic!("no target {pid} in {:#}", self.0))
    }

    /// All listeners of all targets with this address.
    pub(crate) fn listeners(&self, address: &str) -> Vec<&Value> {
        let targets = self.0["targets"].as_array().unwrap().iter();
        let listeners = targets.flat_map(|t| t["listeners"].as_array().unwrap());
        listeners.filter(|l| l["address"] == address).collect()
    }

    /// The only listener on this port of 127.0.0.1.
    #[track_caller]
    pub(crate) fn listener(&self, port: u16) -> &Value {
        let found = self.listeners(&format!("127.0.0.1:{port}"));
        assert_eq!(found.len(), 1, "listeners on {port} in {:#}", self.0);
        found[0]
    }

    /// The event loop in the main thread of this process: if there were several, the one that has not ended.
    #[track_caller]
    pub(crate) fn reactor(&self, pid: u32) -> &Value {
        let reactors = self.target(pid)["reactors"].as_array().unwrap();
        let mut main: Vec<_> = reactors.iter().filter(|reactor| reactor["tid"] == pid).collect();
        if main.len() > 1 {
            main.retain(|reactor| reactor["exited"] == false);
        }
        assert_eq!(main.len(), 1, "main reactors of {pid} in {:#}", self.0);
        main[0]
    }

    /// Number of events lost for this cause.
    #[track_caller]
    pub(crate) fn lost(&self, cause: &str) -> u64 {
        let lost = self.0["self"]["lost"].as_array().unwrap().iter().find(|lost| lost["cause"] == cause);
        lost.unwrap_or_else(|| panic!("no cause {cause}"))["count"].as_u64().unwrap()
    }

    /// Asserts that no events were lost.
    #[track_caller]
    pub(crate) fn assert_complete(&self) {
        for lost in self.0["self"]["lost"].as_array().unwrap() {
            assert_eq!(lost["count"], 0, "{}", lost["cause"]);
        }
    }
}

/// Number of durations in `(above, up_to]` seconds; both have to be bounds of buckets.
pub(crate) fn count_between(histogram: &Value, above: f64, up_to: f64) -> u64 {
    let at = |bound: f64| {
        let buckets = histogram["buckets"].as_array().unwrap().iter();
        let mut below = buckets.filter(|bucket| bucket[0].as_f64().unwrap() <= bound * (1.0 + 1e-9));
        below.next_back().map_or(0, |bucket| bucket[1].as_u64().unwrap())
    };
    at(up_to) - at(above)
}

/// Value of a metric without labels in a scrape.
pub(crate) fn value(scrape: &str, name: &str) -> Option<f64> {
    scrape.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?.parse().ok()
}

/// Value of the only series with this name in a scrape.
#[track_caller]
pub(crate) fn only_value(scrape: &str, name: &str) -> f64 {
    let series: Vec<_> = scrape.lines().filter(|line| line.starts_with(&format!("{name}{{"))).collect();
    assert_eq!(series.len(), 1, "{name} in {scrape}");
    series[0].rsplit(' ').next().unwrap().parse().unwrap()
}
