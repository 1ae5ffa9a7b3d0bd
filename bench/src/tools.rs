//! The tools that observe the servers: observer, bpftrace, and the tools of bcc.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::{Process, program, program_ids, wait_for_start};
use crate::servers::free_port;

/// The text of a bpftrace script.
#[derive(Clone, Copy)]
pub(crate) struct Script(pub(crate) &'static str);

pub(crate) const SLICES: Script = Script(include_str!("slices.bt"));
pub(crate) const EMPTY: Script = Script(include_str!("empty.bt"));

/// How long a read from a scrape may block.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a tool may take to attach its programs after it has loaded them.
const ATTACH_TIME: Duration = Duration::from_secs(1);

/// Mounts debugfs unless it is mounted: the other tools look for tracepoints there.
const MOUNT_DEBUGFS: &str =
    "[ -d /sys/kernel/debug/tracing/events ] || mount -t debugfs debugfs /sys/kernel/debug";

/// A tool that has started: observer has its first metric, another tool has attached its programs.
pub(crate) struct Tool {
    process: Process,
    /// The time from its start until then.
    pub(crate) startup: Duration,
}

/// observer with an endpoint for scrapes.
pub(crate) struct Observer {
    pub(crate) tool: Tool,
    port: u16,
}

impl Observer {
    /// Observes these processes and their children. The first metric is that of a listener or of an event loop.
    pub(crate) fn start(binary: &Path, pids: &[u32], arguments: &[&str]) -> Result<Self> {
        let port = free_port()?;
        let mut command = program(binary, None);
        for pid in pids {
            command.args(["--pid", &pid.to_string()]);
        }
        command.args(["--listen", &format!("127.0.0.1:{port}")]).args(arguments);
        let output = tempfile::tempfile()?;
        command.stderr(output.try_clone()?);
        let tool = Tool::start("observer", &mut command, output, |_| {
            let first = ["\nobserver_accept_queue_depth{", "\nobserver_reactor_waits_total{"];
            scrape(port).is_ok_and(|text| first.iter().any(|first| text.contains(first)))
        })?;
        Ok(Self { tool, port })
    }

    /// All metrics in Prometheus' text format.
    pub(crate) fn scrape(&self) -> Result<String> {
        scrape(self.port).context("observer does not answer scrapes")
    }
}

impl Tool {
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Starts observer on these processes.
    pub(crate) fn observer(binary: &Path, pids: &[u32]) -> Result<Self> {
        Ok(Observer::start(binary, pids, &[])?.tool)
    }

    /// Starts a script, which prints `ready` when it is attached.
    pub(crate) fn bpftrace(script: Script, thread: u32) -> Result<Self> {
        let mut command = with_debugfs();
        command.args(["bpftrace", "-e", script.0, &thread.to_string()]);
        let output = tempfile::tempfile()?;
        command.stdout(output.try_clone()?).stderr(output.try_clone()?);
        Self::start("bpftrace", &mut command, output, |output| {
            text(output).is_ok_and(|text| text.lines().any(|line| line == "ready"))
        })
    }

    /// Starts another tool. It counts as started when it still runs some time after it has loaded programs, because
    /// some tools load programs that they then cannot attach. If it exits, this returns its output as the inner
    /// error.
    pub(crate) fn other(words: &[&str]) -> Result<std::result::Result<Self, String>> {
        let mut command = with_debugfs();
        let output = tempfile::tempfile()?;
        command.args(words).stdout(output.try_clone()?).stderr(output.try_clone()?);
        let start = Instant::now();
        let mut process = Process::start(&mut command)?;
        let mut loaded = None;
        let ready = wait_for_start(&words.join(" "), || {
            if !matches!(process.has_ended(), Ok(false)) {
                return Some(None);
            }
            if loaded.is_none() && program_ids(process.pid()).is_ok_and(|ids| !ids.is_empty()) {
                loaded = Some(Instant::now());
            }
            loaded.filter(|loaded| loaded.elapsed() > ATTACH_TIME).map(Some)
        })?;
        Ok(match ready {
            Some(loaded) => Ok(Self { process, startup: loaded - start }),
            None => Err(text(&output)?),
        })
    }

    fn start(
        name: &str,
        command: &mut Command,
        output: File,
        is_ready: impl Fn(&File) -> bool,
    ) -> Result<Self> {
        let start = Instant::now();
        let mut process = Process::start(command)?;
        let ready = wait_for_start(name, || match process.has_ended() {
            Ok(false) => is_ready(&output).then_some(true),
            Ok(true) | Err(_) => Some(false),
        });
        let startup = start.elapsed();
        if !ready? {
            bail!("{name} ended while it started:\n{}", text(&output)?);
        }
        Ok(Self { process, startup })
    }
}

/// A command that runs its arguments in a mount namespace with debugfs.
fn with_debugfs() -> Command {
    let mut command = program("unshare", None);
    command.args(["--mount", "sh", "-c", &format!("{MOUNT_DEBUGFS}; exec \"$@\""), "sh"]);
    command
}

/// The first 64 KiB of what a program has written. The file offset, which the program shares, is left alone.
fn text(output: &File) -> io::Result<String> {
    let mut text = vec![0; 64 << 10];
    let length = output.read_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

fn scrape(port: u16) -> io::Result<String> {
    let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    connection.set_read_timeout(Some(READ_TIMEOUT))?;
    connection.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut response = String::new();
    connection.read_to_string(&mut response)?;
    Ok(response)
}

/// Waits until the effects of starting a tool are over.
pub(crate) fn settle() {
    sleep(Duration::from_millis(200));
}
