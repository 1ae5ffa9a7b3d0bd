//! What each eBPF program costs by the kernel's own count: how often it ran and how long, while a load ran.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use aya::sys::{Stats, enable_stats};
use duct::cmd;
use serde_json::Value;

use super::load::{Wrk, on_ring, on_socket};
use super::part::{Cpus, progress};
use super::process::program_ids;
use super::servers::{RingAcceptor, Server};
use super::statistics::{Spread, median};
use super::tools::{EMPTY, SLICES, Script, Tool, settle};
use crate::shell::{ask, find};

/// As many characters of a program's name as the kernel keeps.
pub(super) const NAME_LENGTH: usize = 15;

/// What is done again and again while programs are counted.
#[derive(Clone, Copy)]
pub(super) enum Load {
    /// Requests to nginx, each on a TCP connection of its own.
    Connections,
    /// The same while the observed server listens on a unix socket as well.
    BesideSocket,
    /// Requests to nginx, each on a unix connection of its own.
    OnSocket,
    /// TCP connections accepted through io_uring.
    OnRing,
    /// Requests to Node.js on connections that stay.
    Node,
    /// Requests to asyncio on connections that stay, each with a deferred task.
    Asyncio,
}

impl Load {
    pub(super) const ALL: [Self; 6] =
        [Self::Connections, Self::BesideSocket, Self::OnSocket, Self::OnRing, Self::Node, Self::Asyncio];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Connections => "nginx, TCP connections",
            Self::BesideSocket => {
                "nginx, TCP connections, whoever is observed listens on a unix socket as well"
            }
            Self::OnSocket => "nginx, unix connections",
            Self::OnRing => "TCP connections accepted through io_uring",
            Self::Node => "Node.js, requests on connections that stay",
            Self::Asyncio => "asyncio, requests on connections that stay, each with a deferred task",
        }
    }

    pub(super) fn operation(self) -> &'static str {
        match self {
            Self::Node | Self::Asyncio => "request",
            _ => "connection",
        }
    }

    fn takes_socket(self) -> bool {
        matches!(self, Self::BesideSocket | Self::OnSocket)
    }
}

/// Who is observed meanwhile.
#[derive(Clone, Copy)]
enum Whom {
    /// The server under load, and wrk as well where that is the load: its waits are then no stranger's either.
    Target,
    /// An nginx without load, so that all events are strangers'.
    Idle,
}

#[derive(Clone, Copy)]
enum Watcher {
    Observer,
    Script(Script),
}

#[derive(Clone, Copy)]
struct Job {
    load: Load,
    whom: Whom,
    watcher: Watcher,
}

/// How often programs ran and how long, by name.
type Usage = BTreeMap<String, (u64, u64)>;

/// One round of a job.
pub(super) struct Round {
    operations: u64,
    usage: Usage,
}

/// A program's cost: medians of the rounds.
#[derive(Clone, Copy)]
pub(super) struct Cost {
    /// Events for each operation.
    pub(super) events: f64,
    /// Nanoseconds an event, with what measuring it takes.
    pub(super) nanoseconds: f64,
    /// The same, with how far rounds are from each other.
    pub(super) spread: Spread,
}

/// Costs by the program's name as the kernel keeps it.
pub(super) type Costs = BTreeMap<String, Cost>;

/// The same load observed and not: what each program costs, and all of them together.
pub(super) struct Pair {
    pub(super) target: Costs,
    pub(super) stranger: Costs,
    /// Nanoseconds for each operation of the target's and the stranger's, with what measuring takes.
    pub(super) totals: [Spread; 2],
}

pub(super) struct Figures {
    /// Of programs that do nothing.
    pub(super) empty: Costs,
    /// Of the bpftrace script, under the first load.
    pub(super) script: Pair,
    /// Of observer, in the order of [`Load::ALL`].
    pub(super) observer: Vec<(Load, Pair)>,
}

impl Figures {
    /// Nanoseconds that measuring one event takes: this one, or where it was not tried, all that were.
    pub(super) fn measuring(&self, event: &str) -> f64 {
        self.empty.get(kept(event)).map_or_else(|| self.measuring_any(), |cost| cost.nanoseconds)
    }

    pub(super) fn measuring_any(&self) -> f64 {
        let events: f64 = self.empty.values().map(|cost| cost.events).sum();
        self.empty.values().map(|cost| cost.events * cost.nanoseconds).sum::<f64>() / events
    }
}

/// A program's name as the kernel keeps it.
pub(super) fn kept(name: &str) -> &str {
    name.get(..NAME_LENGTH).unwrap_or(name)
}

/// What to run, where, for how long.
pub(super) struct Bench<'a> {
    pub(super) observer: &'a Path,
    pub(super) acceptor: &'a Path,
    pub(super) cpus: Cpus,
    pub(super) rounds: usize,
    pub(super) seconds: u64,
}

impl Bench<'_> {
    pub(super) fn run(&self) -> Result<Figures> {
        // The kernel counts while this is open and stops when we end, however we end.
        let _counting = enable_stats(Stats::RunTime).context("the kernel does not count run times")?;
        let first = Load::Connections;
        let mut jobs = vec![
            Job { load: first, whom: Whom::Target, watcher: Watcher::Script(EMPTY) },
            Job { load: first, whom: Whom::Target, watcher: Watcher::Script(SLICES) },
            Job { load: first, whom: Whom::Idle, watcher: Watcher::Script(SLICES) },
        ];
        for load in Load::ALL {
            let both = [Whom::Target, Whom::Idle];
            jobs.extend(both.map(|whom| Job { load, whom, watcher: Watcher::Observer }));
        }
        // All jobs in each round, so that a busy minute of the machine does not fall on one of them.
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
            let [target, stranger] = both.map(|rounds| costs(rounds));
            Pair { target, stranger, totals: both.map(|rounds| total(rounds)) }
        };
        Ok(Figures { empty, script: pair(), observer: Load::ALL.map(|load| (load, pair())).into() })
    }

    fn round(&self, job: Job) -> Result<Round> {
        let Cpus { server: cpu, load: load_cpu } = self.cpus;
        let idle = Server::nginx(None, job.load.takes_socket())?;
        let watch = |target: &[u32]| {
            let pids = match job.whom {
                Whom::Target => target,
                Whom::Idle => &[idle.pid()],
            };
            match (job.watcher, job.whom) {
                (Watcher::Observer, _) => Tool::observer(self.observer, pids),
                (Watcher::Script(script), Whom::Target) => Tool::bpftrace(script, 0),
                (Watcher::Script(script), Whom::Idle) => Tool::bpftrace(script, idle.event_loop()),
            }
        };
        match job.load {
            Load::Connections | Load::BesideSocket => {
                let server = Server::nginx(cpu, job.load.takes_socket())?;
                let wrk = Wrk::prepare(load_cpu, server.port, self.seconds, false)?;
                count(&watch(&[server.pid(), wrk.pid()])?, || Ok(wrk.run()?.requests))
            }
            Load::OnSocket => {
                let server = Server::nginx(cpu, true)?;
                count(&watch(&[server.pid()])?, || on_socket(&server.socket, self.seconds))
            }
            Load::OnRing => {
                let mut acceptor = RingAcceptor::start(self.acceptor)?;
                count(&watch(&[acceptor.pid()])?, || on_ring(&mut acceptor, self.seconds))
            }
            Load::Node => {
                let server = Server::node(cpu)?;
                let wrk = Wrk::prepare(load_cpu, server.port, self.seconds, true)?;
                count(&watch(&[server.pid(), wrk.pid()])?, || Ok(wrk.run()?.requests))
            }
            Load::Asyncio => {
                let server = Server::asyncio(cpu)?;
                let wrk = Wrk::prepare(load_cpu, server.port, self.seconds, true)?;
                count(&watch(&[server.pid(), wrk.pid()])?, || Ok(wrk.run()?.requests))
            }
        }
    }
}

pub(super) fn count(tool: &Tool, load: impl FnOnce() -> Result<u64>) -> Result<Round> {
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
    let bpftool = find("bpftool").context("bpftool is not here\nby hand: install bpftool")?;
    let answer = ask(&cmd!(bpftool, "-j", "prog", "show")).context("bpftool cannot list programs")?;
    let programs: Vec<Value> = serde_json::from_str(&answer).context("bpftool's list is not understood")?;
    let ours = program_ids(tool.pid())?;
    let mut usage = Usage::new();
    for program in programs {
        if program["id"].as_u64().is_some_and(|id| ours.contains(&id)) {
            let name = program["name"].as_str().unwrap_or_default().to_owned();
            // bpftool leaves them out while they are 0.
            let figure = |name: &str| program[name].as_u64().unwrap_or(0);
            let sum = usage.entry(name).or_default();
            *sum = (sum.0 + figure("run_cnt"), sum.1 + figure("run_time_ns"));
        }
    }
    Ok(usage)
}

/// Nanoseconds of all programs for each operation, with what measuring takes.
pub(super) fn total(rounds: &[Round]) -> Spread {
    let nanoseconds = |round: &Round| round.usage.values().map(|(_, time)| time).sum::<u64>() as f64;
    Spread::of(rounds.iter().map(|round| nanoseconds(round) / round.operations as f64))
}

/// Of programs that ran at all.
pub(super) fn costs(rounds: &[Round]) -> Costs {
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
