//! What observes the servers: observer, and bpftrace beside it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::process::{Process, program, wait_for_start};
use super::servers::free_port;

/// A bpftrace script, and its text.
#[derive(Clone, Copy)]
pub(super) struct Script(pub(super) &'static str);

pub(super) const SLICES: Script = Script(include_str!("slices.bt"));
pub(super) const EMPTY: Script = Script(include_str!("empty.bt"));

/// bpftrace looks for tracepoints here alone; where that is not mounted it gets a namespace with it.
const MOUNTED: &str = "[ -d /sys/kernel/debug/tracing/events ] || mount -t debugfs debugfs /sys/kernel/debug";

/// Something that observes, from when it has its first figure on.
pub(super) struct Tool {
    process: Process,
    /// From its start until then.
    pub(super) start: Duration,
}

impl Tool {
    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// observer on these processes; its first figure is that of a listener.
    pub(super) fn observer(binary: &Path, pids: &[u32]) -> Result<Self> {
        let port = free_port()?;
        let mut command = program(binary, None);
        for pid in pids {
            command.args(["--pid", &pid.to_string()]);
        }
        command.args(["--listen", &format!("127.0.0.1:{port}")]);
        let said = tempfile::tempfile()?;
        command.stderr(said.try_clone()?);
        Self::start("observer", &mut command, said, |_| {
            scrape(port).is_ok_and(|figures| figures.contains("\nobserver_accept_queue_depth{"))
        })
    }

    /// bpftrace with a script, whose first figures come when it is attached.
    pub(super) fn bpftrace(script: Script, thread: u32) -> Result<Self> {
        let mut command = program("unshare", None);
        let mount = format!("{MOUNTED}; exec \"$@\"");
        command.args(["--mount", "sh", "-c", &mount, "sh", "bpftrace", "-e", script.0, &thread.to_string()]);
        let said = tempfile::tempfile()?;
        command.stdout(said.try_clone()?).stderr(said.try_clone()?);
        Self::start("bpftrace", &mut command, said, |said| {
            text(said).is_ok_and(|text| text.lines().any(|line| line == "ready"))
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

/// What a program has written so far, its beginning at least. Where it writes next is not changed by that.
fn text(said: &File) -> io::Result<String> {
    let mut text = vec![0; 64 << 10];
    let length = said.read_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

fn scrape(port: u16) -> io::Result<String> {
    let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    connection.set_read_timeout(Some(Duration::from_secs(5)))?;
    connection.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Lets what a start has stirred up come to rest.
pub(super) fn settle() {
    sleep(Duration::from_millis(200));
}
