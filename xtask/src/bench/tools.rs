//! What observes the servers: observer, and bpftrace beside it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::process::{Process, program, program_ids, wait_for_start};
use super::servers::free_port;

/// A bpftrace script, and its text.
#[derive(Clone, Copy)]
pub(super) struct Script(pub(super) &'static str);

pub(super) const SLICES: Script = Script(include_str!("slices.bt"));
pub(super) const EMPTY: Script = Script(include_str!("empty.bt"));

/// How long observer may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long a tool may take from when it holds programs until it has attached them.
const TO_ATTACH: Duration = Duration::from_secs(1);

/// Other tools look for tracepoints here; where that is not mounted they get a namespace with it.
const MOUNTED: &str = "[ -d /sys/kernel/debug/tracing/events ] || mount -t debugfs debugfs /sys/kernel/debug";

/// Something that observes, from when it has its first figure on.
pub(super) struct Tool {
    process: Process,
    /// From its start until then.
    pub(super) start: Duration,
}

/// observer, and where its figures are to be had.
pub(super) struct Observer {
    pub(super) tool: Tool,
    port: u16,
}

impl Observer {
    /// On a process and its children; its first figure is that of a listener or an event loop.
    pub(super) fn start(binary: &Path, pids: &[u32], arguments: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let mut command = program(binary, None);
        for pid in pids {
            command.args(["--pid", &pid.to_string()]);
        }
        command.args(["--listen", &format!("127.0.0.1:{port}")]).args(arguments);
        let said = tempfile::tempfile()?;
        command.stderr(said.try_clone()?);
        let tool = Tool::start("observer", &mut command, said, |_| {
            let first = ["\nobserver_accept_queue_depth{", "\nobserver_reactor_waits_total{"];
            scrape(port).is_ok_and(|figures| first.iter().any(|first| figures.contains(first)))
        })?;
        Ok(Self { tool, port })
    }

    /// All figures, as Prometheus gets them.
    pub(super) fn scrape(&self) -> Result<String> {
        scrape(self.port).context("observer does not answer")
    }
}

impl Tool {
    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// observer on these processes.
    pub(super) fn observer(binary: &Path, pids: &[u32]) -> Result<Self> {
        Ok(Observer::start(binary, pids, &[])?.tool)
    }

    /// bpftrace with a script, whose first figures come when it is attached.
    pub(super) fn bpftrace(script: Script, thread: u32) -> Result<Self> {
        let mut command = with_tracepoints();
        command.args(["bpftrace", "-e", script.0, &thread.to_string()]);
        let said = tempfile::tempfile()?;
        command.stdout(said.try_clone()?).stderr(said.try_clone()?);
        Self::start("bpftrace", &mut command, said, |said| {
            text(said).is_ok_and(|text| text.lines().any(|line| line == "ready"))
        })
    }

    /// Any other, which is ready once it holds programs; where it never does, what it says. Some fail to attach after
    /// they have loaded, so they get a moment for that.
    pub(super) fn other(words: &[&str]) -> Result<std::result::Result<Self, String>> {
        let mut command = with_tracepoints();
        let said = tempfile::tempfile()?;
        command.args(words).stdout(said.try_clone()?).stderr(said.try_clone()?);
        let start = Instant::now();
        let mut process = Process::start(&mut command)?;
        let mut held = None;
        let ready = wait_for_start(&words.join(" "), || {
            if !matches!(process.has_ended(), Ok(false)) {
                return Some(None);
            }
            if held.is_none() && program_ids(process.pid()).is_ok_and(|ids| !ids.is_empty()) {
                held = Some(Instant::now());
            }
            held.filter(|held| held.elapsed() > TO_ATTACH).map(Some)
        })?;
        Ok(match ready {
            Some(held) => Ok(Self { process, start: held - start }),
            None => Err(text(&said)?),
        })
    }

    fn start(
        name: &str,
        command: &mut Command,
        said: File,
        is_ready: impl Fn(&File) -> bool,
    ) -> Result<Self> {
        let start = Instant::now();
        let mut process = Process::start(command)?;
        let ready = wait_for_start(name, || match process.has_ended() {
            Ok(false) => is_ready(&said).then_some(true),
            Ok(true) | Err(_) => Some(false),
        });
        let start = start.elapsed();
        if !ready? {
            bail!("{name} ended at once, saying:\n{}", text(&said)?);
        }
        Ok(Self { process, start })
    }
}

/// What other tools are started by; their words follow.
fn with_tracepoints() -> Command {
    let mut command = program("unshare", None);
    command.args(["--mount", "sh", "-c", &format!("{MOUNTED}; exec \"$@\""), "sh"]);
    command
}

/// What a program has written so far, its beginning at least. Where it writes next is not changed by that.
fn text(said: &File) -> io::Result<String> {
    let mut text = vec![0; 64 << 10];
    let length = said.read_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

fn scrape(port: u16) -> io::Result<String> {
    let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Lets what a start has stirred up come to rest.
pub(super) fn settle() {
    sleep(Duration::from_millis(200));
}
