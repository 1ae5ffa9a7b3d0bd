//! The cost of each eBPF program under a load, from the number of runs and the run time that the kernel counts.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use aya::sys::{Stats, enable_stats};
use serde_json::Value;

use crate::load::{Wrk, io_uring_accepts, unix_requests};
use crate::part::{Cpus, progress};
use crate::process::{bpftool, program_ids};
use crate::servers::{RingAcceptor, Server};
use crate::statistics::{Spread, median};
use crate::tools::{EMPTY, SLICES, Script, Tool, settle};

/// The number of characters that the kernel keeps of a program's name.
pub(crate) const NAME_LENGTH: usize = 15;

/// The load while programs are counted.
#[derive(Clone, Copy)]
pub(crate) enum Load {
    /// Requests to nginx, each on a new TCP connection.
    Connections,
    /// The same, while the observed server also listens on a unix socket.
    ConnectionsWithSocket,
    /// Requests to nginx, each on a new unix connection.
    UnixConnections,
    /// TCP connections accepted through io_uring.
    IoUring,
    /// Requests to Node.js on persistent connections.
    Node,
    /// Requests to asyncio on persistent connections, each of which enqueues a task.
    Asyncio,
}

impl Load {
    pub(crate) const ALL: [Self; 6] = [
        Self::Connections,
        Self::ConnectionsWithSocket,
        Self::UnixConnections,
        Self::IoUring,
        Self::Node,
        Self::Asyncio,
    ];

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Connections => "nginx, TCP connections",
            Self::ConnectionsWithSocket => {
                "nginx, TCP connections, the observed nginx also listens on a unix socket"
            }
            Self::UnixConnections => "nginx, unix connections",
            Self::IoUring => "TCP connections accepted through io_uring",
            Self::Node => "Node.js, requests on persistent connections",
            Self::Asyncio => "asyncio, requests on persistent connections, each with a deferred task",
        }
    }

    pub(crate) fn operation(self) -> &'static str {
        match self {
            Self::Node | Self::Asyncio => "request",
            _ => "connection",
        }
    }

    fn needs_socket(self) -> bool {
        matches!(self, Self::ConnectionsWithSocket | Self::UnixConnections)
    }
}

/// The observed processes.
#[derive(Clone, Copy)]
enum Observed {
    /// The server under load, and wrk if it is the load, so that waits of wrk are those of a target as well.
    Target,
    /// An idle nginx, so that all events are those of non-targets.
    Idle,
}

#[derive(Clone, Copy)]
enum JobTool {
    Observer,
    Script(Script),
}

#[derive(Clone, Copy)]
struct Job {
    load: Load,
    observed: Observed,
    tool: JobTool,
}

/// Number of runs and run time in nanoseconds, by the name of the program.
type Usage = BTreeMap<String, (u64, u64)>;

/// One round of a job.
pub(crate) struct Round {
    operations: u64,
    usage: Usage,
}

/// The cost of a program: medians of the rounds.
#[derive(Clone, Copy)]
pub(crate) struct Cost {
    /// Events per operation.
    pub(crate) events: f64,
    /// Nanoseconds per event, including the cost of counting.
    pub(crate) nanoseconds: f64,
    /// The same, with the quartiles of the rounds.
    pub(crate) spread: Spread,
}

/// Costs by the name of the program, as truncated by the kernel.
pub(crate) type Costs = BTreeMap<String, Cost>;

/// The costs of the same load with and without the server as a target.
pub(crate) struct Pair {
    pub(crate) target: Costs,
    pub(crate) other: Costs,
    /// Nanoseconds of all programs per operation, for `target` and for `other`, including the cost of counting.
    pub(crate) totals: [Spread; 2],
}

pub(crate) struct Results {
    /// Costs of empty programs, which are the cost of counting.
    pub(crate) empty: Costs,
    /// Costs of `slices.bt` under the first load.
    pub(crate) script: Pair,
    /// Costs of observer, in the order of [`Load::ALL`].
    pub(crate) observer: Vec<(Load, Pair)>,
}

impl Results {
    /// Nanoseconds that counting takes per run on an event: as measured on this event, or the mean of all measured
    /// events.
    pub(crate) fn counting_cost(&self, event: &str) -> f64 {
        self.empty.get(truncated(event)).map_or_else(|| self.mean_counting_cost(), |cost| cost.nanoseconds)
    }

    pub(crate) fn mean_counting_cost(&self) -> f64 {
        let events: f64 = self.empty.values().map(|cost| cost.events).sum();
        self.empty.values().map(|cost| cost.events * cost.nanoseconds).sum::<f64>() / events
    }
}

/// A program's name as the kernel keeps it.
pub(crate) fn truncated(name: &str) -> &str {
    name.get(..NAME_LENGTH).unwrap_or(name)
}

pub(crate) struct Bench<'a> {
    pub(crate) observer: &'a Path,
    pub(crate) acceptor: &'a Path,
    pub(crate) cpus: Cpus,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
}

impl Bench<'_> {
    pub(crate) fn run(&self) -> Result<Results> {
        // The kernel counts until this descriptor is closed.
        let _counting =
            enable_stats(Stats::RunTime).context("the kernel cannot count run times of eBPF programs")?;
        let first = Load::Connections;
        let mut jobs = vec![
            Job { load: first, observed: Observed::Target, tool: JobTool::Script(EMPTY) },
            Job { load: first, observed: Observed::Target, tool: JobTool::Script(SLICES) },
            Job { load: first, observed: Observed::Idle, tool: JobTool::Script(SLICES) },
        ];
        for load in Load::ALL {
            let both = [Observed::Target, Observed::Idle];
            jobs.extend(both.map(|observed| Job { load, observed, tool: JobTool::Observer }));
        }
        // Each round runs all jobs, so that a busy minute of the machine does not affect only one of them.
        let mut done: Vec<Vec<Round>> = jobs.iter().map(|_| Vec::new()).collect();
        for round in 1..=self.rounds {
            for (number, (job, rounds)) in jobs.iter().zip(&mut done).enumerate() {
                let (of, jobs) = (self.rounds, jobs.len());
                progress(&format!(
                    "eBPF programs, round {round} of {of}, {} of {jobs}: {}",
                    number + 1,
                    job.load.title()
                ));
                rounds.push(self.round(*job)?);
            }
        }
        let mut done = done.iter();
        let mut next = || done.next().expect("one for each job");
        let empty = costs(next());
        let mut pair = || {
            let both = [next(), next()];
            let [target, other] = both.map(|rounds| costs(rounds));
            Pair { target, other, totals: both.map(|rounds| total(rounds)) }
        };
        Ok(Results { empty, script: pair(), observer: Load::ALL.map(|load| (load, pair())).into() })
    }

    fn round(&self, job: Job) -> Result<Round> {
        let Cpus { server: cpu, load: load_cpu } = self.cpus;
        let idle = Server::nginx(None, job.load.needs_socket())?;
        let start_tool = |target: &[u32]| {
            let pids = match job.observed {
                Observed::Target => target,
                Observed::Idle => &[idle.pid()],
            };
            match (job.tool, job.observed) {
                (JobTool::Observer, _) => Tool::observer(self.observer, pids),
                (JobTool::Script(script), Observed::Target) => Tool::bpftrace(script, 0),
                (JobTool::Script(script), Observed::Idle) => Tool::bpftrace(script, idle.event_loop()),
            }
        };
        match job.load {
            Load::Connections | Load::ConnectionsWithSocket => {
                let server = Server::nginx(cpu, job.load.needs_socket())?;
                let wrk = Wrk::prepare(load_cpu, server.port, self.seconds, false)?;
                count(&start_tool(&[server.pid(), wrk.pid()])?, || Ok(wrk.run()?.requests))
            }
            Load::UnixConnections => {
                let server = Server::nginx(cpu, true)?;
                count(&start_tool(&[server.pid()])?, || unix_requests(&server.socket, self.seconds))
            }
            Load::IoUring => {
                let mut acceptor = RingAcceptor::start(self.acceptor)?;
                count(&start_tool(&[acceptor.pid()])?, || io_uring_accepts(&mut acceptor, self.seconds))
            }
            Load::Node => {
                let server = Server::node(cpu)?;
                let wrk = Wrk::prepare(load_cpu, server.port, self.seconds, true)?;
                count(&start_tool(&[server.pid(), wrk.pid()])?, || Ok(wrk.run()?.requests))
            }
            Load::Asyncio => {
                let server = Server::asyncio(cpu)?;
                let wrk = Wrk::prepare(load_cpu, server.port, self.seconds, true)?;
                count(&start_tool(&[server.pid(), wrk.pid()])?, || Ok(wrk.run()?.requests))
            }
        }
    }
}

/// Counts the runs of a tool's programs while a load runs.
pub(crate) fn count(tool: &Tool, load: impl FnOnce() -> Result<u64>) -> Result<Round> {
    settle();
    let mut usage = usage_of(tool)?;
    let operations = load()?;
    for (name, (runs, nanoseconds)) in usage_of(tool)? {
        let before = usage.entry(name).or_default();
        *before = (runs - before.0, nanoseconds - before.1);
    }
    Ok(Round { operations, usage })
}

fn usage_of(tool: &Tool) -> Result<Usage> {
    let programs: Vec<Value> = serde_json::from_str(&bpftool(&["prog", "show"])?)?;
    let ours = program_ids(tool.pid())?;
    let mut usage = Usage::new();
    for program in programs {
        if program["id"].as_u64().is_some_and(|id| ours.contains(&id)) {
            let name = program["name"].as_str().unwrap_or_default().to_owned();
            // bpftool omits counters that are 0.
            let counter = |name: &str| program[name].as_u64().unwrap_or(0);
            let sum = usage.entry(name).or_default();
            *sum = (sum.0 + counter("run_cnt"), sum.1 + counter("run_time_ns"));
        }
    }
    Ok(usage)
}

/// Nanoseconds of all programs per operation, including the cost of counting.
pub(crate) fn total(rounds: &[Round]) -> Spread {
    let nanoseconds = |round: &Round| round.usage.values().map(|(_, time)| time).sum::<u64>() as f64;
    Spread::of(rounds.iter().map(|round| nanoseconds(round) / round.operations as f64))
}

/// The costs of the programs that ran.
pub(crate) fn costs(rounds: &[Round]) -> Costs {
    let names = rounds.iter().flat_map(|round| round.usage.keys());
    names
        .filter_map(|name| {
            let usages = || rounds.iter().filter_map(|round| Some((round, *round.usage.get(name)?)));
            let events = usages().map(|(round, (runs, _))| runs as f64 / round.operations as f64);
            let ran = usages().filter(|(_, (runs, _))| *runs > 0);
            let spread = Spread::of(ran.map(|(_, (runs, time))| time as f64 / runs as f64));
            let nanoseconds = spread.median;
            let cost = Cost { events: median(events), nanoseconds, spread };
            (!nanoseconds.is_nan()).then(|| (name.clone(), cost))
        })
        .collect()
}
