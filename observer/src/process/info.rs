//! Identity of processes and threads from `/proc`, whether a process can be a target, and its ancestors and
//! descendants.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::OsString,
    iter,
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use procfs::{
    ProcError,
    process::{FDTarget, Process as Proc, Stat, StatFlags, all_processes},
};

use super::identity;
use crate::{failure::Failure, model::workload::Workload};

/// The identity of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    /// Process id.
    pub(crate) pid: u32,
    /// Name of the main thread, at most 15 bytes.
    pub(crate) comm: String,
    /// Path of the executable; empty if the process was gone before it could be read.
    pub(crate) exe: String,
    /// Its parent when it was first seen; 0 if the process was gone before it could be read.
    pub(crate) parent: u32,
    /// Container, pod or service.
    pub(crate) workload: Workload,
}

impl Process {
    /// Reads the identity of a process. If the process is gone, only its id is set.
    pub(crate) fn of(pid: u32) -> Self {
        let mut process =
            Self { pid, comm: "?".into(), exe: String::new(), parent: 0, workload: Workload::default() };
        process.refresh();
        process
    }

    /// Reads the identity again: the process may have executed another program or moved to another cgroup. What cannot
    /// be read keeps its value.
    pub(crate) fn refresh(&mut self) {
        let Ok(proc) = open(self.pid) else { return };
        if let Ok(stat) = proc.stat() {
            self.comm = stat.comm;
            if self.parent == 0 {
                self.parent = u32::try_from(stat.ppid).unwrap_or(0);
            }
        }
        if let Ok(exe) = proc.exe() {
            self.exe = exe.display().to_string();
        }
        identity::refresh(&mut self.workload, &proc);
    }
}

/// Checks that a process can be observed. An error says why not and what to do.
pub(crate) fn ensure_observable(pid: u32) -> Result<(), Failure> {
    let gone = || {
        Failure::new(
            format!("no process has the id {pid}"),
            "find the process id, for example with `pgrep -a NAME`",
        )
    };
    let proc = open(pid).map_err(|_| gone())?;
    let (Ok(stat), Ok(status)) = (proc.stat(), proc.status()) else { return Err(gone()) };
    let is_kernel_thread = stat.flags().is_ok_and(|flags| flags.contains(StatFlags::PF_KTHREAD));
    if is_kernel_thread {
        return Err(Failure::new(
            format!("process {pid} ({}) is a kernel thread", stat.comm),
            "choose a user-space process: a kernel thread has no sockets and no event loop",
        ));
    }
    // The exit tracepoint fires before the state of the process changes.
    let is_exiting = stat.flags().is_ok_and(|flags| flags.contains(StatFlags::PF_EXITING));
    if is_exiting || stat.state == 'Z' || stat.state == 'X' {
        return Err(Failure::new(
            format!("process {pid} ({}) has exited and is not reaped yet", stat.comm),
            "choose a process that is still running",
        ));
    }
    let process = u32::try_from(status.tgid).unwrap_or(pid);
    if process != pid {
        return Err(Failure::new(
            format!("{pid} is a thread of process {process} ({})", stat.comm),
            format!("use --pid {process}; all its threads are observed"),
        ));
    }
    Ok(())
}

/// Whether a process is running; a zombie is not.
pub(crate) fn is_there(pid: u32) -> bool {
    ensure_observable(pid).is_ok()
}

/// Whether a process has this thread.
pub(crate) fn has_thread(pid: u32, tid: u32) -> bool {
    Path::new(&format!("/proc/{pid}/task/{tid}")).exists()
}

/// All descendants of these processes as of now, without the processes themselves.
pub(crate) fn descendants(of: &BTreeSet<u32>) -> BTreeSet<u32> {
    let mut children = BTreeMap::<u32, Vec<u32>>::new();
    for stat in all_processes().into_iter().flatten().filter_map(|proc| proc.ok()?.stat().ok()) {
        if let (Ok(pid), Ok(parent)) = (u32::try_from(stat.pid), u32::try_from(stat.ppid)) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = BTreeSet::new();
    let mut pending: Vec<u32> = of.iter().copied().collect();
    while let Some(parent) = pending.pop() {
        for &child in children.get(&parent).into_iter().flatten() {
            if !of.contains(&child) && found.insert(child) {
                pending.push(child);
            }
        }
    }
    found
}

/// Maximum number of ancestors.
const MAX_ANCESTORS: usize = 64;

/// Ancestors of a process as of now, without init, each with its start time in clock ticks.
pub(crate) fn ancestors(pid: u32) -> BTreeSet<(u32, u64)> {
    let stat = |pid: u32| open(pid).ok()?.stat().ok();
    let parent = |stat: &Stat| u32::try_from(stat.ppid).ok().filter(|&parent| parent > 1);
    let mut next = stat(pid).as_ref().and_then(parent);
    let line = iter::from_fn(|| {
        let pid = next?;
        let stat = stat(pid)?;
        next = parent(&stat);
        Some((pid, stat.starttime))
    });
    line.take(MAX_ANCESTORS).collect()
}

/// Environment that a process was started with; empty if the process is gone.
pub(crate) fn environment(pid: u32) -> HashMap<OsString, OsString> {
    open(pid).and_then(|proc| proc.environ()).unwrap_or_default()
}

/// Start time of a process in clock ticks since boot, which distinguishes it from a later process with the same id.
/// `None` if it is gone.
pub(crate) fn start_ticks(pid: u32) -> Option<u64> {
    Some(open(pid).ok()?.stat().ok()?.starttime)
}

/// Inode number of a process's network namespace; `None` if the process is gone.
pub(crate) fn network_namespace(pid: u32) -> Option<u32> {
    let namespace = std::fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
    u32::try_from(namespace.ino()).ok()
}

/// Inode number of the socket behind a descriptor; `None` if it is not a socket.
pub(crate) fn socket_inode(pid: u32, fd: u32) -> Option<u64> {
    let fd = i32::try_from(fd).ok()?;
    match open(pid).ok()?.fd_from_fd(fd).ok()?.target {
        FDTarget::Socket(inode) => Some(inode),
        _ => None,
    }
}

/// Name of a thread; empty if it is gone.
pub(crate) fn thread_name(pid: u32, tid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm")).unwrap_or_default().trim_end().into()
}

/// Display name of a thread of any process: `stress (thread 4242)`.
pub(crate) fn described(tid: u32) -> String {
    match thread_name(tid, tid) {
        name if name.is_empty() => format!("exited thread {tid}"),
        name => format!("{name} (thread {tid})"),
    }
}

fn open(pid: u32) -> Result<Proc, ProcError> {
    Proc::new(i32::try_from(pid).map_err(|_| ProcError::NotFound(None))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_can_be_observed_and_is_itself() {
        let me = std::process::id();
        ensure_observable(me).unwrap();
        assert_eq!(Process::of(me).exe, std::env::current_exe().unwrap().display().to_string());
    }

    #[test]
    fn no_process_has_a_pid_out_of_range() {
        assert!(ensure_observable(u32::MAX).unwrap_err().to_string().contains("no process"));
    }

    #[test]
    fn a_grandchild_is_a_descendant() {
        let mut child = std::process::Command::new("sh").args(["-c", "sleep 30 & wait"]).spawn().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let grandchildren = loop {
            let found = descendants(&BTreeSet::from([child.id()]));
            if !found.is_empty() || std::time::Instant::now() > deadline {
                break found;
            }
        };
        assert_eq!(grandchildren.len(), 1);
        let found = descendants(&BTreeSet::from([std::process::id()]));
        assert!(found.contains(&child.id()) && found.is_superset(&grandchildren));
        for &pid in &grandchildren {
            let of = [child.id(), std::process::id()].map(|pid| (pid, start_ticks(pid).unwrap()));
            assert!(ancestors(pid).is_superset(&BTreeSet::from(of)));
        }
        for pid in grandchildren {
            let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
            nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL).unwrap();
        }
        child.wait().unwrap();
    }
}
