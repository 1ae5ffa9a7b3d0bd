//! Processes that the benchmark starts: none outlives it, and what they have used can be asked for.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use duct::cmd;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::shell::{ask, find};

/// How long a process may take to begin its work, or to end it when told to.
const LIMIT: Duration = Duration::from_secs(20);

/// How often to look.
const POLL: Duration = Duration::from_millis(2);

/// How long to sleep without looking whether we are to end.
const PIECE: Duration = Duration::from_millis(100);

/// Set by the signals that ask us to end.
static ENDING: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on these signals end us in good order: whatever waits gives up, and everybody tidies up.
pub(super) fn catch_signals() -> Result<()> {
    let flag = ENDING.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(flag))?;
    }
    Ok(())
}

fn is_ending() -> bool {
    ENDING.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// A program on one CPU or on any. Where xtask ends without tidying up, the kernel ends it.
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
            let end = Instant::now() + LIMIT;
            while asked.is_ok() && matches!(self.child.try_wait(), Ok(None)) && Instant::now() < end {
                sleep(POLL);
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
        if is_ending() {
            bail!("interrupted");
        }
        if Instant::now() > end {
            bail!("waited {} s for {what}\nby hand: see what it prints when started alone", limit.as_secs());
        }
        sleep(POLL);
    }
}

/// Does nothing for a while, unless we are to end.
pub(super) fn pause(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end && !is_ending() {
        sleep(PIECE.min(end.saturating_duration_since(Instant::now())));
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

/// The same of all threads of one process, finer than in clock ticks: for what takes less than one.
pub(super) fn fine_cpu_seconds(pid: u32) -> Result<f64> {
    let folder = format!("/proc/{pid}/task");
    let threads = fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
    let nanoseconds = threads.flatten().filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Ok(nanoseconds.sum::<u64>() as f64 / 1e9)
}

/// Memory of a process, in bytes.
pub(super) struct Memory {
    /// Resident.
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

/// How full maps of a process are that take in until there is no more room, from 0 to 1.
pub(super) fn filled(pid: u32) -> Result<Vec<(String, f64)>> {
    let bpftool = find("bpftool").context("bpftool is not here\nby hand: install bpftool")?;
    let answer = ask(&cmd!(&bpftool, "-j", "map", "show")).context("bpftool cannot list maps")?;
    let maps: Vec<Value> = serde_json::from_str(&answer).context("bpftool's list is not understood")?;
    let ours: BTreeSet<u64> = held(pid)?.iter().filter_map(|text| number(text, "map_id")).collect();
    let hashes = maps.iter().filter_map(|map| {
        let id = map["id"].as_u64().filter(|id| ours.contains(id))?;
        let is_hash = map["type"].as_str()?.ends_with("hash") && !map["type"].as_str()?.starts_with("lru");
        is_hash.then_some((id, map["name"].as_str()?, map["max_entries"].as_u64()?))
    });
    let filled = hashes.map(|(id, name, most)| {
        let dump = ask(&cmd!(&bpftool, "-j", "map", "dump", "id", id.to_string()));
        let entries =
            dump.with_context(|| format!("bpftool cannot read {name}"))?.matches("{\"key\":").count();
        Ok((name.to_owned(), entries as f64 / most as f64))
    });
    filled.collect()
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
