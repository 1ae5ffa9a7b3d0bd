//! What servers get done while they are observed and while they are not, in rounds that alternate.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::load::{self, Done, Wrk};
use super::part::{Cpus, progress};
use super::process::{cpu_seconds, fine_cpu_seconds, memory};
use super::servers::Server;
use super::tools::{SLICES, Tool, settle};

/// Commands to try out how many Redis takes.
const FIRST_COMMANDS: u64 = 50_000;

/// How long deferred work that comes too fast is followed, and some more.
const GIVES_UP: Duration = Duration::from_secs(5);

/// What goes on beside the server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Arm {
    Nothing,
    /// observer, on this server.
    Observer,
    /// The same, before it gives up to follow deferred work that comes too fast.
    Following,
    /// observer, on another server, which has nothing to do.
    Elsewhere,
    /// bpftrace with the script for slices and run-queue delay.
    Bpftrace,
}

impl Arm {
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Observer => "observer",
            Self::Following => "observer in its first seconds, following deferred work",
            Self::Elsewhere => "observer on another, idle process",
            Self::Bpftrace => "bpftrace",
        }
    }
}

/// One round.
pub(super) struct Sample {
    pub(super) per_second: f64,
    /// Seconds that one request in a hundred takes at least.
    pub(super) p99: f64,
    /// CPU seconds of the server for a request.
    pub(super) cpu: f64,
    pub(super) tool: Option<ToolSample>,
}

/// What the tool itself took in that round.
pub(super) struct ToolSample {
    pub(super) cpu_seconds: f64,
    pub(super) seconds: f64,
    pub(super) start: f64,
    /// Bytes.
    pub(super) memory: u64,
    pub(super) peak: u64,
    pub(super) maps: u64,
}

pub(super) struct Figures {
    pub(super) server: &'static str,
    /// The n-th samples of all arms are of one round.
    pub(super) arms: Vec<(Arm, Vec<Sample>)>,
}

/// What to run, where, for how long.
pub(super) struct Bench<'a> {
    pub(super) observer: &'a Path,
    pub(super) cpus: Cpus,
    pub(super) rounds: usize,
    pub(super) seconds: u64,
}

impl Bench<'_> {
    pub(super) fn run(&self) -> Result<Vec<Figures>> {
        let Cpus { server: cpu, load: load_cpu } = self.cpus;
        let all = [Arm::Nothing, Arm::Observer, Arm::Elsewhere, Arm::Bpftrace];
        let most = [Arm::Nothing, Arm::Observer, Arm::Bpftrace];
        let deferring = [Arm::Nothing, Arm::Observer, Arm::Following, Arm::Bpftrace];

        let nginx = Server::nginx(cpu, false)?;
        let wrk = |server: &Server| Wrk::prepare(load_cpu, server.port, self.seconds, true)?.run();
        let nginx = self.server("nginx", &nginx, &all, || wrk(&nginx))?;

        let redis = Server::redis(cpu)?;
        let start = Instant::now();
        load::redis(load_cpu, redis.port, FIRST_COMMANDS)?;
        let milliseconds = u64::try_from(start.elapsed().as_millis())?.max(1);
        let commands = FIRST_COMMANDS * self.seconds * 1000 / milliseconds;
        let redis = self.server("Redis", &redis, &most, || load::redis(load_cpu, redis.port, commands))?;

        let node = Server::node(cpu)?;
        let node = self.server("Node.js", &node, &deferring, || wrk(&node))?;

        let asyncio = Server::asyncio(cpu)?;
        let asyncio =
            self.server("asyncio, a deferred task for each request", &asyncio, &deferring, || wrk(&asyncio))?;

        let ruby = Server::ruby(cpu)?;
        let ruby = self.server("Ruby's async", &ruby, &most, || wrk(&ruby))?;
        Ok(vec![nginx, redis, node, asyncio, ruby])
    }

    fn server(
        &self,
        name: &'static str,
        server: &Server,
        arms: &[Arm],
        load: impl Fn() -> Result<Done>,
    ) -> Result<Figures> {
        progress(&format!("{name}: warming up"));
        load()?;
        let idle = Server::nginx(None, false)?;
        let follows = arms.contains(&Arm::Following);
        let mut arms: Vec<_> = arms.iter().map(|&arm| (arm, Vec::new())).collect();
        for round in 0..self.rounds {
            progress(&format!("{name}, round {} of {}", round + 1, self.rounds));
            let count = arms.len();
            for turn in 0..count {
                let (arm, samples) = &mut arms[if round % 2 == 0 { turn } else { count - 1 - turn }];
                let tool = match arm {
                    Arm::Nothing => None,
                    Arm::Observer | Arm::Following => Some(Tool::observer(self.observer, &[server.pid()])?),
                    Arm::Elsewhere => Some(Tool::observer(self.observer, &[idle.pid()])?),
                    Arm::Bpftrace => Some(Tool::bpftrace(SLICES, server.event_loop())?),
                };
                if *arm == Arm::Observer && follows {
                    let start = Instant::now();
                    while start.elapsed() < GIVES_UP {
                        load()?;
                    }
                }
                samples.push(sample(server, tool.as_ref(), &load)?);
            }
        }
        Ok(Figures { server: name, arms })
    }
}

fn sample(server: &Server, tool: Option<&Tool>, load: impl Fn() -> Result<Done>) -> Result<Sample> {
    settle();
    let pids = server.pids();
    let tool_cpu = |tool: &Tool| fine_cpu_seconds(tool.pid());
    let tool_before = tool.map(tool_cpu).transpose()?;
    let (before, start) = (cpu_seconds(&pids)?, Instant::now());
    let Done { requests, per_second, p99 } = load()?;
    let (used, seconds) = (cpu_seconds(&pids)? - before, start.elapsed().as_secs_f64());
    let tool = tool.zip(tool_before).map(|(tool, before)| {
        let memory = memory(tool.pid())?;
        anyhow::Ok(ToolSample {
            cpu_seconds: tool_cpu(tool)? - before,
            seconds,
            start: tool.start.as_secs_f64(),
            memory: memory.now,
            peak: memory.peak,
            maps: memory.maps,
        })
    });
    Ok(Sample { per_second, p99, cpu: used / requests as f64, tool: tool.transpose()? })
}
