//! Throughput, latency and CPU time of servers with and without a tool, in alternating rounds.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::load::{self, LoadResult, Wrk};
use crate::part::{Cpus, progress};
use crate::process::{cpu_seconds, fine_cpu_seconds, memory};
use crate::servers::Server;
use crate::tools::{SLICES, Tool, settle};

/// Commands of the first load on Redis, which measures its throughput.
const FIRST_COMMANDS: u64 = 50_000;

/// Longer than observer follows deferred tasks whose rate is too high.
const FOLLOWING_TIME: Duration = Duration::from_secs(5);

/// The tool that runs with the server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arm {
    NoTool,
    /// observer on this server.
    Observer,
    /// The same, before it stops following deferred tasks because their rate is too high.
    Following,
    /// observer on another server, which is idle.
    Elsewhere,
    /// bpftrace with `slices.bt`.
    Bpftrace,
}

impl Arm {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::NoTool => "no tool",
            Self::Observer => "observer",
            Self::Following => "observer, following deferred tasks",
            Self::Elsewhere => "observer on an idle nginx",
            Self::Bpftrace => "bpftrace",
        }
    }
}

/// The result of a round.
pub(crate) struct Sample {
    pub(crate) per_second: f64,
    /// 99th percentile of the latency, in seconds.
    pub(crate) p99: f64,
    /// CPU seconds of the server per request.
    pub(crate) cpu: f64,
    pub(crate) tool: Option<ToolSample>,
}

/// Costs of the tool itself in a round.
pub(crate) struct ToolSample {
    pub(crate) cpu_seconds: f64,
    /// Duration of the round.
    pub(crate) seconds: f64,
    /// Seconds that the tool took to start.
    pub(crate) startup: f64,
    /// Resident memory in bytes, as are the next two.
    pub(crate) memory: u64,
    pub(crate) peak: u64,
    pub(crate) maps: u64,
}

pub(crate) struct Results {
    pub(crate) server: &'static str,
    /// The samples of all arms at the same index are those of one round.
    pub(crate) arms: Vec<(Arm, Vec<Sample>)>,
}

pub(crate) struct Bench<'a> {
    pub(crate) observer: &'a Path,
    pub(crate) cpus: Cpus,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
}

impl Bench<'_> {
    pub(crate) fn run(&self) -> Result<Vec<Results>> {
        let Cpus { server: cpu, load: load_cpu } = self.cpus;
        let all = [Arm::NoTool, Arm::Observer, Arm::Elsewhere, Arm::Bpftrace];
        let most = [Arm::NoTool, Arm::Observer, Arm::Bpftrace];
        let deferring = [Arm::NoTool, Arm::Observer, Arm::Following, Arm::Bpftrace];

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
            self.server("asyncio, one deferred task per request", &asyncio, &deferring, || wrk(&asyncio))?;

        let ruby = Server::ruby(cpu)?;
        let ruby = self.server("Ruby's async", &ruby, &most, || wrk(&ruby))?;
        Ok(vec![nginx, redis, node, asyncio, ruby])
    }

    fn server(
        &self,
        name: &'static str,
        server: &Server,
        arms: &[Arm],
        load: impl Fn() -> Result<LoadResult>,
    ) -> Result<Results> {
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
                    Arm::NoTool => None,
                    Arm::Observer | Arm::Following => Some(Tool::observer(self.observer, &[server.pid()])?),
                    Arm::Elsewhere => Some(Tool::observer(self.observer, &[idle.pid()])?),
                    Arm::Bpftrace => Some(Tool::bpftrace(SLICES, server.event_loop())?),
                };
                if *arm == Arm::Observer && follows {
                    let start = Instant::now();
                    while start.elapsed() < FOLLOWING_TIME {
                        load()?;
                    }
                }
                samples.push(sample(server, tool.as_ref(), &load)?);
            }
        }
        Ok(Results { server: name, arms })
    }
}

fn sample(server: &Server, tool: Option<&Tool>, load: impl Fn() -> Result<LoadResult>) -> Result<Sample> {
    settle();
    let pids = server.pids();
    let tool_cpu = |tool: &Tool| fine_cpu_seconds(tool.pid());
    let tool_before = tool.map(tool_cpu).transpose()?;
    let (before, start) = (cpu_seconds(&pids)?, Instant::now());
    let LoadResult { requests, per_second, p99 } = load()?;
    let (used, seconds) = (cpu_seconds(&pids)? - before, start.elapsed().as_secs_f64());
    let tool = tool.zip(tool_before).map(|(tool, before)| {
        let memory = memory(tool.pid())?;
        anyhow::Ok(ToolSample {
            cpu_seconds: tool_cpu(tool)? - before,
            seconds,
            startup: tool.startup.as_secs_f64(),
            memory: memory.resident,
            peak: memory.peak,
            maps: memory.maps,
        })
    });
    Ok(Sample { per_second, p99, cpu: used / requests as f64, tool: tool.transpose()? })
}
