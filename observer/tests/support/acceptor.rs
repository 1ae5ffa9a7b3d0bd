//! A server that accepts only when told to; see `servers/acceptor.py`.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{ChildStdin, ChildStdout, Command, Stdio},
};

use super::Process;

/// The server, its place and its commands.
pub(crate) struct Acceptor {
    process: Process,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    place: String,
    in_own_namespace: bool,
}

impl Acceptor {
    /// Listens on one socket of this kind, accepting by this method.
    pub(crate) fn new(kind: &str, method: &str, backlog: u32) -> Self {
        Self::start(Command::new("/usr/bin/python3"), kind, method, backlog, 1)
    }

    /// An SO_REUSEPORT group.
    pub(crate) fn group(members: u32) -> Self {
        Self::start(Command::new("/usr/bin/python3"), "v4", "accept4", 128, members)
    }

    /// In a network namespace of its own, where nobody else drops connections.
    pub(crate) fn in_own_namespace(backlog: u32) -> Self {
        let mut command = Command::new("unshare");
        command.args(["-n", "sh", "-c", "ip link set lo up; exec /usr/bin/python3 \"$@\"", "sh"]);
        let acceptor = Self::start(command, "v4", "accept4", backlog, 1);
        Self { in_own_namespace: true, ..acceptor }
    }

    fn start(mut command: Command, kind: &str, method: &str, backlog: u32, members: u32) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/acceptor.py");
        let mut child = command
            .arg(script)
            .args([kind, method, &backlog.to_string(), &members.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = child.stdin.take().unwrap();
        let mut answers = BufReader::new(child.stdout.take().unwrap());
        let mut place = String::new();
        answers.read_line(&mut place).unwrap();
        let place = place.trim().to_owned();
        assert!(!place.is_empty(), "the acceptor does not listen");
        Self { process: Process(child), commands, answers, place, in_own_namespace: false }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its port, or its path.
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    /// Runs a command and returns the number that it answers.
    pub(crate) fn tell(&mut self, command: &str) -> u32 {
        writeln!(self.commands, "{command}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().parse().unwrap_or_else(|_| panic!("{command} is answered by {answer:?}"))
    }

    /// Connections that wait and the most that may, as `ss` shows them; summed up over an SO_REUSEPORT group.
    pub(crate) fn ss(&self) -> (u32, u32) {
        let output = self.tool("ss", &["-Hltn"]) + &self.tool("ss", &["-Hlx"]);
        let here = |line: &&str| {
            line.split_whitespace()
                .any(|word| word.ends_with(&format!(":{}", self.place)) || word == self.place)
        };
        let rows = output.lines().filter(here).map(|line| {
            let numbers: Vec<u32> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            (numbers[0], numbers[1])
        });
        rows.fold((0, 0), |sum, row| (sum.0 + row.0, sum.1 + row.1))
    }

    /// A counter of its network namespace, as `nstat` shows it.
    pub(crate) fn nstat(&self, name: &str) -> u64 {
        let output = self.tool("nstat", &["-asz", name]);
        let line = output.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{output}"));
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// What a tool prints in the acceptor's network namespace.
    fn tool(&self, program: &str, arguments: &[&str]) -> String {
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
