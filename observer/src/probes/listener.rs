//! *listener*: listening sockets of targets and their accept queues. Decodes the entry of a listener, with the waits
//! that the *accept*, *connect* and *ring* probes count there.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::ProgramArray,
    programs::{Iter, RawTracePoint, RawTracePointRunOptions, TestRun as _},
};
use nix::libc;
use observer_common::listener::{Listener as Raw, Queue};

use super::probe::{Events, Hook, Probe, When};
use crate::model::{
    histogram::{Histogram, seconds},
    snapshot::{Depths, Listener},
};

const VISIT_FILES: &str = "visit_files";
const READ_QUEUE: &str = "look";
const WALK_QUEUE: &str = "walk_queue";

pub(super) const PROBE: Probe = Probe {
    name: "listener",
    purpose: "accept queues: depth, limit and the oldest connection; drops and half-open requests",
    since: "5.10",
    when: When::Always,
    cost: "every listen call on the machine; a walk over all open files when a target comes or goes; each queue is read once a second",
    hooks: &[
        Hook { program: "listen_enter", events: Events::Plain(&[("syscalls", "sys_enter_listen")]) },
        Hook { program: VISIT_FILES, events: Events::Iterator("task_file") },
        Hook { program: READ_QUEUE, events: Events::OnDemand },
        Hook { program: WALK_QUEUE, events: Events::OnDemand },
    ],
};

/// Visits the open files of targets: adds an entry for each socket that already listens, and notes the files that
/// [`ask_for_files`](crate::read::reactors::Reactors::ask_for_files) has asked for.
pub(crate) fn visit_files(ebpf: &mut Ebpf) -> Result<()> {
    let program = ebpf.program_mut(VISIT_FILES).context("the eBPF object has no program visit_files")?;
    let program: &mut Iter = program.try_into()?;
    let link = program.attach().context("cannot walk over open files")?;
    let mut files = program.take_link(link)?.into_file()?;
    // The program outputs nothing: it runs while the file is read.
    std::io::copy(&mut files, &mut std::io::sink()).context("the walk over open files failed")?;
    Ok(())
}

/// Enables the tail call with which the walk over a long queue continues. The programs must be loaded.
pub(crate) fn link_tail_calls(ebpf: &mut Ebpf) -> Result<()> {
    let step =
        ebpf.program(WALK_QUEUE).context("the eBPF object has no program walk_queue")?.fd()?.try_clone()?;
    let mut steps =
        ProgramArray::try_from(ebpf.map_mut("TAIL_CALLS").context("the eBPF object has no map TAIL_CALLS")?)?;
    steps.set(0, &step, 0).context("cannot set the tail call of queue walks")
}

/// Updates the `queue` of one entry.
pub(crate) fn look(ebpf: &mut Ebpf, inode: u64) -> Result<()> {
    let program = ebpf.program_mut(READ_QUEUE).context("the eBPF object has no program look")?;
    let program: &mut RawTracePoint = program.try_into()?;
    let mut options = RawTracePointRunOptions::new();
    options.args[0] = inode;
    program.test_run(options).with_context(|| format!("cannot read the accept queue of listener {inode}"))?;
    Ok(())
}

/// Metrics of a listener as of now, without drops and overflows, which depend on the counters of its namespace. `before`
/// is the queue when it was first read, `unix_since_ns` the time from which unix connections get time stamps.
///
/// Each connection that joined the queue has either been accepted or still waits. So arrivals follow from accepts and
/// depths on every kernel, without a hook on arrivals.
pub(crate) fn decode(raw: &Raw, before: Before, unix_since_ns: Option<u64>) -> Listener {
    let queue = &raw.queue;
    let waits = queue.depth > queue.aborted;
    let stamped_since =
        if raw.unix_name == 0 { raw.since_ns } else { raw.since_ns.max(unix_since_ns.unwrap_or(u64::MAX)) };
    let since = if queue.oldest_ns == 0 { stamped_since } else { queue.oldest_ns };
    Listener {
        protocol: if i32::from(raw.family) == libc::AF_UNIX { "unix" } else { "tcp" },
        address: address(raw),
        member: None,
        limit: queue.limit,
        depth: queue.depth,
        peak: raw.peak.max(queue.depth),
        half_open: queue.half_open,
        oldest_seconds: waits.then(|| seconds(queue.read_ns.saturating_sub(since))),
        oldest_is_lower_bound: waits && queue.oldest_ns == 0,
        arrivals: (raw.accepts + u64::from(queue.depth)).saturating_sub(before.depth.into()),
        accepts: raw.accepts,
        accepts_unknown_wait: raw.accepts_without_arrival,
        aborted: (raw.accepts_aborted + u64::from(queue.aborted)).saturating_sub(before.aborted.into()),
        drops: 0,
        overflows: None,
        wait: Histogram::from(&raw.wait),
        depth_on_accept: Depths { counts: raw.depths, sum: raw.depths_sum },
        closed: queue.closed != 0,
    }
}

/// State of a listener when observer first read it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Before {
    /// Connections in the queue.
    pub(crate) depth: u32,
    /// Of those, connections that their clients had reset.
    pub(crate) aborted: u32,
    /// Segments that the kernel had dropped.
    pub(crate) drops: u32,
}

impl Before {
    /// The state according to a queue's first reading.
    pub(crate) const fn of(queue: &Queue) -> Self {
        Self { depth: queue.depth, aborted: queue.aborted, drops: queue.drops }
    }
}

/// `0.0.0.0:8080`, `[::]:443`, `unix:/run/app.sock`, `unix:@abstract`.
fn address(raw: &Raw) -> String {
    let name = raw.name;
    match i32::from(raw.family) {
        libc::AF_INET => {
            SocketAddr::from((Ipv4Addr::from(*name.first_chunk().expect("long enough")), raw.port))
                .to_string()
        }
        libc::AF_INET6 => {
            SocketAddr::from((Ipv6Addr::from(*name.first_chunk().expect("long enough")), raw.port))
                .to_string()
        }
        _ => {
            let length = usize::from(raw.port).min(name.len());
            match name[..length].split_first() {
                None => "unix:(unnamed)".into(),
                Some((0, rest)) => format!("unix:@{}", String::from_utf8_lossy(rest)),
                Some(_) => {
                    format!("unix:{}", String::from_utf8_lossy(&name[..length]).trim_end_matches('\0'))
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(family: i32, port: u16, name: &[u8]) -> Raw {
        let mut raw = Raw { family: family.try_into().unwrap(), port, ..Raw::EMPTY };
        raw.name[..name.len()].copy_from_slice(name);
        raw
    }

    #[test]
    fn addresses_are_formatted() {
        assert_eq!(address(&named(libc::AF_INET, 8080, &[0, 0, 0, 0])), "0.0.0.0:8080");
        assert_eq!(address(&named(libc::AF_INET6, 443, &[0; 16])), "[::]:443");
        assert_eq!(address(&named(libc::AF_UNIX, 14, b"/run/app.sock\0")), "unix:/run/app.sock");
        assert_eq!(address(&named(libc::AF_UNIX, 4, b"\0app")), "unix:@app");
        assert_eq!(address(&named(libc::AF_UNIX, 0, b"")), "unix:(unnamed)");
    }

    #[test]
    fn arrivals_are_accepts_and_depth_less_the_initial_depth() {
        let queue = Queue { depth: 4, aborted: 1, read_ns: 9_000_000_000, drops: 7, ..Queue::default() };
        let raw = Raw { accepts: 10, accepts_aborted: 2, since_ns: 1_000_000_000, queue, ..Raw::EMPTY };
        let before = Before { depth: 3, aborted: 1, drops: 5 };
        let listener = decode(&raw, before, None);
        assert_eq!((listener.arrivals, listener.aborted), (11, 2));
        // A connection waits, at least since the listener is observed.
        assert_eq!(listener.oldest_seconds, Some(8.0));
        assert!(listener.oldest_is_lower_bound);
    }
}
