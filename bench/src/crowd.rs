//! observer's example `crowd`: a process with many threads or listeners, many processes, or an acceptor, and the
//! acceptor's clients.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{Process, program};

/// How long clients may run beyond their duration.
const GRACE: Duration = Duration::from_secs(20);

pub(crate) struct Crowd {
    process: Process,
    /// The process exits when this is closed.
    _input: ChildStdin,
    answer: u32,
}

impl Crowd {
    /// Starts a crowd of a kind and size, and waits until it is complete.
    pub(crate) fn start(binary: &Path, cpu: Option<u32>, kind: &str, count: u32) -> Result<Self> {
        let mut command = program(binary, cpu);
        command.args([kind, &count.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let input = process.child.stdin.take().context("stdin is piped")?;
        let mut answer = String::new();
        BufReader::new(process.child.stdout.take().context("stdout is piped")?).read_line(&mut answer)?;
        let Ok(answer) = answer.trim().parse() else {
            bail!("cannot start {count} {kind}\nby hand: raise the limits of processes and open files");
        };
        Ok(Self { process, _input: input, answer })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The port of an acceptor.
    pub(crate) fn port(&self) -> u32 {
        self.answer
    }
}

/// The clients of an acceptor.
pub(crate) struct Client {
    process: Process,
    seconds: u64,
}

impl Client {
    /// Makes `rate` connections per second, or as many as possible.
    pub(crate) fn start(binary: &Path, cpu: Option<u32>, port: u32, rate: u32, seconds: u64) -> Result<Self> {
        let mut command = program(binary, cpu);
        command.arg("connect").args([port.to_string(), rate.to_string(), seconds.to_string()]);
        Ok(Self { process: Process::start(command.stdout(Stdio::piped()))?, seconds })
    }

    /// Waits for the clients, and returns how many connections they made.
    pub(crate) fn finish(mut self) -> Result<Connections> {
        self.process.finish(Duration::from_secs(self.seconds) + GRACE)?;
        let mut text = String::new();
        self.process.child.stdout.take().context("stdout is piped")?.read_to_string(&mut text)?;
        let count: u64 =
            text.trim().parse().with_context(|| format!("the clients print {text:?}, which is no number"))?;
        Ok(Connections { count, per_second: count as f64 / self.seconds as f64 })
    }
}

/// The connections that clients made.
pub(crate) struct Connections {
    pub(crate) count: u64,
    pub(crate) per_second: f64,
}
