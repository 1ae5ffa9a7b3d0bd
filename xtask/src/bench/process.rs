//! Processes that the benchmark starts: none outlives it, and what they have used can be asked for.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::shell::find;

/// How long a process may take to begin its work, or to end it when told to.
const LIMIT: Duration = Duration::from_secs(20);

/// A program on one CPU or on any. The kernel ends it when xtask ends, however that comes.
pub(super) fn program(name: impl AsRef<OsStr>, cpu: Option<u32>) -> Command {
    let name = name.as_ref();
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM"]);
    if let Some(cpu) = cpu {
        command.args(["taskset", "-c", &cpu.to_string()]);
    }
    let path = name.to_str().and_then(find);
    command.arg(path.as_deref().map_or(name, AsRef::as_ref));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// A process that ends when it is dropped.
pub(super) struct Process {
    pub(super) child: Child,
}

impl Process {
    /// Starts it. To be called by the first thread only: the kernel takes the end of the thread that started a process
    /// for the end of all.
    pub(super) fn start(command: &mut Command) -> Result<Self> {
        let child = command
            .spawn()
            .with_context(|| format!("{} cannot be started", command.get_program().display()))?;
        Ok(Self { child })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for it to end by itself.
    pub(super) fn finish(&mut self, limit: Duration) -> Result<ExitStatus> {
        wait_for("a load to end", limit, || self.child.try_wait().transpose())?.map_err(Into::into)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // Not yet reaped, so the id is still its own.
            let asked = kill_process(Pid::from_child(&self.child), Signal::TERM);
            if asked.is_ok() && self.finish(LIMIT).is_ok() {
                return;
            }
            let _ended_meanwhile = self.child.kill();
        }
        let _reaped = self.child.wait();
    }
}

/// Asks again and again until there is an answer.
pub(super) fn wait_for<T>(what: &str, limit: Duration, mut question: impl FnMut() -> Option<T>) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(answer) = question() {
            return Ok(answer);
        }
        if Instant::now() > end {
            bail!("waited {} s for {what}\nby hand: see what it prints when started alone", limit.as_secs());
        }
        sleep(Duration::from_millis(2));
    }
}

/// The same, for as long as programs may take to begin.
pub(super) fn wait_for_start<T>(what: &str, question: impl FnMut() -> Option<T>) -> Result<T> {
    wait_for(what, LIMIT, question)
}

/// A process and its children, as the kernel lists them.
pub(super) fn family(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    [pid].into_iter().chain(children).collect()
}

/// CPU time of processes, in seconds.
pub(super) fn cpu_seconds(pids: &[u32]) -> Result<f64> {
    let mut ticks = 0;
    for &pid in pids {
        let stat = procfs::process::Process::new(i32::try_from(pid)?)?.stat()?;
        ticks += stat.utime + stat.stime;
    }
    Ok(ticks as f64 / procfs::ticks_per_second() as f64)
}

/// Resident memory of a process, in bytes.
pub(super) struct Memory {
    pub(super) now: u64,
    pub(super) peak: u64,
    /// Of the maps that it holds in the kernel.
    pub(super) maps: u64,
}

pub(super) fn memory(pid: u32) -> Result<Memory> {
    let status = procfs::process::Process::new(i32::try_from(pid)?)?.status()?;
    let kibibytes = |figure: Option<u64>| figure.map(|kibibytes| kibibytes * 1024).context("no such figure");
    let mut seen = BTreeSet::new();
    let mut maps = 0;
    for text in held(pid)? {
        if let Some(id) = number(&text, "map_id")
            && seen.insert(id)
        {
            maps += number(&text, "memlock").unwrap_or(0);
        }
    }
    Ok(Memory { now: kibibytes(status.vmrss)?, peak: kibibytes(status.vmhwm)?, maps })
}

/// Ids of the eBPF programs that a process holds, itself or by a link.
pub(super) fn program_ids(pid: u32) -> Result<BTreeSet<u64>> {
    Ok(held(pid)?.iter().filter_map(|text| number(text, "prog_id")).collect())
}

/// What the kernel says about each descriptor of a process.
fn held(pid: u32) -> Result<Vec<String>> {
    let folder = format!("/proc/{pid}/fdinfo");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
    // Descriptors come and go meanwhile.
    Ok(entries.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok()).collect())
}

fn number(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().parse().ok()
}
