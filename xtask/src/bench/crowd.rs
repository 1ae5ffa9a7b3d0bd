//! The tests' program that is many of one kind, and the clients that connect to it.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::process::{Process, program};

/// How long clients may take beyond their time.
const GRACE: Duration = Duration::from_secs(20);

pub(super) struct Crowd {
    process: Process,
    /// It ends with this.
    _input: ChildStdin,
    answer: u32,
}

impl Crowd {
    /// Starts so many of these, and answers when they are there.
    pub(super) fn start(binary: &Path, cpu: Option<u32>, kind: &str, count: u32) -> Result<Self> {
        let mut command = program(binary, cpu);
        command.args([kind, &count.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let input = process.child.stdin.take().context("its input")?;
        let mut answer = String::new();
        BufReader::new(process.child.stdout.take().context("its output")?).read_line(&mut answer)?;
        let Ok(answer) = answer.trim().parse() else {
            bail!("{count} {kind} cannot be had here\nby hand: raise the limits of processes and open files");
        };
        Ok(Self { process, _input: input, answer })
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Where an acceptor listens.
    pub(super) fn port(&self) -> u32 {
        self.answer
    }
}

/// Clients of an acceptor.
pub(super) struct Client {
    process: Process,
    seconds: u64,
}

impl Client {
    /// Has them connect so many times a second, or as often as they can.
    pub(super) fn start(binary: &Path, cpu: Option<u32>, port: u32, rate: u32, seconds: u64) -> Result<Self> {
        let mut command = program(binary, cpu);
        command.arg("connect").args([port.to_string(), rate.to_string(), seconds.to_string()]);
        Ok(Self { process: Process::start(command.stdout(Stdio::piped()))?, seconds })
    }

    /// How many connections there were a second, once they are done, and in all.
    pub(super) fn finish(mut self) -> Result<Made> {
        self.process.finish(Duration::from_secs(self.seconds) + GRACE)?;
        let mut text = String::new();
        self.process.child.stdout.take().context("its output")?.read_to_string(&mut text)?;
        let count: u64 = text.trim().parse().context("clients say what is not understood")?;
        Ok(Made { count, per_second: count as f64 / self.seconds as f64 })
    }
}

/// Connections.
pub(super) struct Made {
    pub(super) count: u64,
    pub(super) per_second: f64,
}
