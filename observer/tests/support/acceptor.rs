//! A server that accepts connections only on request; see `servers/acceptor.py` and `servers/ring_acceptor.rs`.

use std::{
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::harness::skip;

use super::{example, interactive::Interactive, observer::Observer};

/// The server and its address.
pub(crate) struct Acceptor {
    program: Interactive,
    endpoint: String,
    in_own_namespace: bool,
    /// Folder of its socket, if the socket has a path.
    _files: TempDir,
}

impl Acceptor {
    /// Listens on one socket of this kind, and accepts with this method.
    pub(crate) fn new(kind: &str, method: &str, backlog: u32) -> Self {
        Self::start(Command::new("/usr/bin/python3"), kind, method, backlog, 1)
    }

    /// Accepts with io_uring. Skips the test if the kernel does not support the method.
    pub(crate) fn ring(kind: &str, method: &str, backlog: u32) -> Self {
        let mut program = Command::new(example("ring_acceptor"));
        program.args([kind, method, &backlog.to_string()]);
        let mut acceptor = Self::serve(program);
        // Accept one connection before observation starts.
        acceptor.request("connect 1");
        if acceptor.request("accept 1") == 0 {
            skip(format!("this kernel's io_uring does not accept by {method}"));
        }
        acceptor
    }

    /// Listens on an SO_REUSEPORT group.
    pub(crate) fn group(members: u32) -> Self {
        Self::start(Command::new("/usr/bin/python3"), "v4", "accept4", 128, members)
    }

    /// Listens in a new network namespace, where nothing else drops connections.
    pub(crate) fn in_own_namespace(backlog: u32) -> Self {
        Self::in_own_namespace_with("accept4", backlog)
    }

    /// The same with another method.
    pub(crate) fn in_own_namespace_with(method: &str, backlog: u32) -> Self {
        let mut command = Command::new("unshare");
        command.args(["-n", "sh", "-c", "ip link set lo up; exec /usr/bin/python3 \"$@\"", "sh"]);
        let acceptor = Self::start(command, "v4", method, backlog, 1);
        Self { in_own_namespace: true, ..acceptor }
    }

    /// Listens in the network namespace of another acceptor.
    pub(crate) fn in_namespace_of(other: &Self, backlog: u32) -> Self {
        let mut command = Command::new("nsenter");
        command.args(["-t", &other.pid().to_string(), "-n", "/usr/bin/python3"]);
        let acceptor = Self::start(command, "v4", "accept4", backlog, 1);
        Self { in_own_namespace: true, ..acceptor }
    }

    fn start(mut command: Command, kind: &str, method: &str, backlog: u32, members: u32) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/acceptor.py");
        command.arg(script).args([kind, method, &backlog.to_string(), &members.to_string()]);
        Self::serve(command)
    }

    /// Starts a program that reads commands.
    fn serve(mut command: Command) -> Self {
        let files = tempfile::tempdir().unwrap();
        let mut program = Interactive::start(command.env("TMPDIR", files.path()));
        let endpoint = program.next_line();
        Self { program, endpoint, in_own_namespace: false, _files: files }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.program.pid()
    }

    /// Port or path.
    pub(crate) fn address(&self) -> &str {
        &self.endpoint
    }

    /// Runs a command and returns the number that it replies with.
    pub(crate) fn request(&mut self, command: &str) -> u32 {
        let answer = self.program.request(command);
        answer.parse().unwrap_or_else(|_| panic!("{command} is answered by {answer:?}"))
    }

    /// Length and limit of the accept queue according to `ss`, summed over an SO_REUSEPORT group.
    pub(crate) fn ss(&self) -> (u32, u32) {
        let output = self.tool("ss", &["-Hltn"]) + &self.tool("ss", &["-Hlx"]);
        let here = |line: &&str| {
            line.split_whitespace()
                .any(|word| word.ends_with(&format!(":{}", self.endpoint)) || word == self.endpoint)
        };
        let rows = output.lines().filter(here).map(|line| {
            let numbers: Vec<u32> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            (numbers[0], numbers[1])
        });
        rows.fold((0, 0), |sum, row| (sum.0 + row.0, sum.1 + row.1))
    }

    /// A counter of the acceptor's network namespace according to `nstat`.
    pub(crate) fn nstat(&self, name: &str) -> u64 {
        let output = self.tool("nstat", &["-asz", name]);
        let line = output.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{output}"));
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Output of a tool in the acceptor's network namespace.
    pub(crate) fn tool(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = if self.in_own_namespace {
            let mut command = Command::new("nsenter");
            command.args(["-t", &self.pid().to_string(), "-n", program]);
            command
        } else {
            Command::new(program)
        };
        String::from_utf8(command.args(arguments).output().unwrap().stdout).unwrap()
    }
}

/// A fixed number of connections, and how long they stay in the queue.
pub(crate) const CONNECTIONS: u32 = 23;
const HOLD: Duration = Duration::from_millis(200);

/// Leaves connections in the queue, reads the queue with `ss`, and accepts all of them. Returns the listener as
/// reported. `client` is the address family of the client. `address` is the expected address of the listener, in which
/// PLACE stands for the acceptor's port or path.
pub(crate) fn hold_and_accept(mut acceptor: Acceptor, what: &str, client: &str, address: &str) -> Value {
    let observer = Observer::attach(acceptor.pid());
    let before_connect = Instant::now();
    assert_eq!(acceptor.request(&format!("connect {CONNECTIONS} {client}")), CONNECTIONS);
    let after_connect = Instant::now();
    thread::sleep(HOLD);
    let (depth, limit) = acceptor.ss();
    let shortest = after_connect.elapsed().as_secs_f64();
    assert_eq!(acceptor.request(&format!("accept {CONNECTIONS}")), CONNECTIONS);
    let longest = before_connect.elapsed().as_secs_f64();

    let report = observer.finish();
    report.assert_complete();
    let found = report.listeners(&address.replace("PLACE", acceptor.address()));
    assert_eq!(found.len(), 1, "{address} in {:#}", report.0);
    let listener = found[0];
    assert_eq!(listener["accepts"], CONNECTIONS, "{listener:#}");
    assert_eq!(listener["arrivals"], CONNECTIONS, "{listener:#}");
    assert_eq!(listener["peak"], depth, "ss saw {depth}: {listener:#}");
    assert_eq!(listener["limit"], limit, "ss saw {limit}: {listener:#}");
    assert_eq!(listener["depth"], 0, "{listener:#}");
    assert_eq!(listener["depth_on_accept"]["sum"], (1..=CONNECTIONS).sum::<u32>(), "{listener:#}");
    let waits = &listener["wait"];
    if waits["count"] != 0 {
        let (min, max) = (waits["min"].as_f64().unwrap(), waits["max"].as_f64().unwrap());
        eprintln!(
            "| {what} | {} | {min:.4} to {max:.4} s | {shortest:.4} to {longest:.4} s | {depth} of {limit} |",
            listener["accepts"]
        );
        assert_eq!(waits["count"], CONNECTIONS, "{listener:#}");
        assert!(
            shortest - 0.005 <= min && max <= longest + 0.005,
            "not in {shortest}..={longest}: {listener:#}"
        );
    }
    listener.clone()
}
