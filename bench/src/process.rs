//! Processes that the benchmark starts, none of which outlives it, and the CPU time and memory that they use.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};

/// How long a process may take to start, or to end after SIGTERM.
const LIMIT: Duration = Duration::from_secs(20);

/// The interval at which conditions are checked.
const POLL: Duration = Duration::from_millis(2);

/// The longest sleep between two checks for a signal.
const NAP: Duration = Duration::from_millis(100);

/// Set by SIGINT and SIGTERM.
static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on SIGINT and SIGTERM only set a flag. Waits fail once it is set, so that all processes are ended on the
/// way out.
pub(crate) fn catch_signals() -> Result<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(flag))?;
    }
    Ok(())
}

fn is_interrupted() -> bool {
    INTERRUPTED.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// A command for a program, pinned to a CPU if one is given. The kernel ends the process if the benchmark is killed.
pub(crate) fn program(name: impl AsRef<OsStr>, cpu: Option<u32>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM"]);
    if let Some(cpu) = cpu {
        command.args(["taskset", "-c", &cpu.to_string()]);
    }
    command.arg(name);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// The standard output of a command that succeeds.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let output = output.with_context(|| format!("{name} cannot be started"))?;
    if !output.status.success() {
        bail!("{name} failed ({})", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs bpftool, which prints JSON.
pub(crate) fn bpftool(args: &[&str]) -> Result<String> {
    output(Command::new("bpftool").arg("-j").args(args))
        .with_context(|| format!("bpftool {} does not work\nby hand: run it to see why", args.join(" ")))
}

/// A process that is ended when this is dropped.
pub(crate) struct Process {
    pub(crate) child: Child,
}

impl Process {
    /// Only the main thread may call this: the kernel sends the signal of [`program`] when the thread that started the
    /// process ends.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        let child = command
            .spawn()
            .with_context(|| format!("{} cannot be started", command.get_program().display()))?;
        Ok(Self { child })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits until it exits.
    pub(crate) fn finish(&mut self, limit: Duration) -> Result<ExitStatus> {
        wait_for("a load to end", limit, || self.child.try_wait().transpose())?.map_err(Into::into)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // The process is not reaped yet, so its id cannot be that of another process.
            let asked = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let end = Instant::now() + LIMIT;
            while asked.is_ok() && matches!(self.child.try_wait(), Ok(None)) && Instant::now() < end {
                sleep(POLL);
            }
            let _already_ended = self.child.kill();
        }
        let _reaped = self.child.wait();
    }
}

/// Polls `condition` until it returns a value.
pub(crate) fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> Result<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if is_interrupted() {
            bail!("interrupted");
        }
        if Instant::now() > end {
            bail!("waited {} s for {what}\nby hand: see what it prints when started alone", limit.as_secs());
        }
        sleep(POLL);
    }
}

/// [`wait_for`] with the time that a process may take to start.
pub(crate) fn wait_for_start<T>(what: &str, condition: impl FnMut() -> Option<T>) -> Result<T> {
    wait_for(what, LIMIT, condition)
}

/// Sleeps, but not longer than until a signal.
pub(crate) fn pause(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end && !is_interrupted() {
        sleep(NAP.min(end.saturating_duration_since(Instant::now())));
    }
}

/// A process and the children of its main thread.
pub(crate) fn family(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children = children.split_whitespace().filter_map(|child| child.parse().ok());
    [pid].into_iter().chain(children).collect()
}

/// CPU time of processes in seconds, with the resolution of clock ticks.
pub(crate) fn cpu_seconds(pids: &[u32]) -> Result<f64> {
    let mut ticks = 0;
    for &pid in pids {
        let stat = procfs::process::Process::new(i32::try_from(pid)?)?.stat()?;
        ticks += stat.utime + stat.stime;
    }
    Ok(ticks as f64 / procfs::ticks_per_second() as f64)
}

/// CPU time of all threads of a process in seconds, with the resolution of nanoseconds: for amounts below a clock tick.
pub(crate) fn fine_cpu_seconds(pid: u32) -> Result<f64> {
    let folder = format!("/proc/{pid}/task");
    let threads = fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
    let nanoseconds = threads.flatten().filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Ok(nanoseconds.sum::<u64>() as f64 / 1e9)
}

/// Memory of a process, in bytes.
pub(crate) struct Memory {
    pub(crate) resident: u64,
    /// The peak of the resident memory since the start.
    pub(crate) peak: u64,
    /// Kernel memory of its eBPF maps.
    pub(crate) maps: u64,
}

pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let status = procfs::process::Process::new(i32::try_from(pid)?)?.status()?;
    let bytes = |kibibytes: Option<u64>| {
        let kibibytes = kibibytes.with_context(|| format!("/proc/{pid}/status lacks VmRSS or VmHWM"))?;
        anyhow::Ok(kibibytes * 1024)
    };
    let mut seen = BTreeSet::new();
    let mut maps = 0;
    for text in fdinfo(pid)? {
        if let Some(id) = number(&text, "map_id")
            && seen.insert(id)
        {
            maps += number(&text, "memlock").unwrap_or(0);
        }
    }
    Ok(Memory { resident: bytes(status.vmrss)?, peak: bytes(status.vmhwm)?, maps })
}

/// The hash maps of a process that never evict, each with its fill ratio from 0 to 1.
pub(crate) fn fill_ratios(pid: u32) -> Result<Vec<(String, f64)>> {
    let maps: Vec<Value> = serde_json::from_str(&bpftool(&["map", "show"])?)?;
    let ours: BTreeSet<u64> = fdinfo(pid)?.iter().filter_map(|text| number(text, "map_id")).collect();
    let hashes = maps.iter().filter_map(|map| {
        let id = map["id"].as_u64().filter(|id| ours.contains(id))?;
        let is_hash = map["type"].as_str()?.ends_with("hash") && !map["type"].as_str()?.starts_with("lru");
        is_hash.then_some((id, map["name"].as_str()?, map["max_entries"].as_u64()?))
    });
    let ratios = hashes.map(|(id, name, capacity)| {
        let entries = bpftool(&["map", "dump", "id", &id.to_string()])?.matches("{\"key\":").count();
        Ok((name.to_owned(), entries as f64 / capacity as f64))
    });
    ratios.collect()
}

/// Ids of the eBPF programs that a process holds, directly or through a link.
pub(crate) fn program_ids(pid: u32) -> Result<BTreeSet<u64>> {
    Ok(fdinfo(pid)?.iter().filter_map(|text| number(text, "prog_id")).collect())
}

/// The texts in `/proc/PID/fdinfo`.
fn fdinfo(pid: u32) -> Result<Vec<String>> {
    let folder = format!("/proc/{pid}/fdinfo");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))?;
    // A descriptor may be closed in between.
    Ok(entries.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok()).collect())
}

fn number(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().parse().ok()
}
