//! Load on servers: on loopback, bounded in time, and counted.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::process::{Process, program};
use super::servers::RingAcceptor;
use crate::shell::{ask, limited};

/// Connections that the ring acceptor makes before it accepts them: no more than it may have open files.
const AT_ONCE: u64 = 100;

/// How long anything may take beyond its time.
const GRACE: Duration = Duration::from_secs(20);

/// One request in so many may fail or take too long: on a machine that is busy otherwise, some do.
const TOLERATED: u64 = 100;

/// What a load got done.
#[derive(Clone, Copy)]
pub(super) struct Done {
    pub(super) requests: u64,
    pub(super) per_second: f64,
    /// Seconds that one request in a hundred takes at least.
    pub(super) p99: f64,
}

/// wrk, which exists as a process before it begins, so that it can be observed from its first request on.
pub(super) struct Wrk {
    process: Process,
    gate: ChildStdin,
    seconds: u64,
}

impl Wrk {
    /// 32 connections, kept open or renewed for each request.
    pub(super) fn prepare(cpu: Option<u32>, port: u16, seconds: u64, keep_alive: bool) -> Result<Self> {
        let mut command = program("sh", cpu);
        command.args(["-c", "read -r _ && exec \"$@\"", "sh", "wrk", "--latency", "-t", "1", "-c", "32"]);
        command.args(["-d", &seconds.to_string()]);
        if !keep_alive {
            command.args(["-H", "Connection: close"]);
        }
        command.arg(format!("http://127.0.0.1:{port}/")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let gate = process.child.stdin.take().context("its input")?;
        Ok(Self { process, gate, seconds })
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(super) fn run(mut self) -> Result<Done> {
        writeln!(self.gate)?;
        let status = self.process.finish(Duration::from_secs(self.seconds) + GRACE)?;
        let mut text = String::new();
        self.process.child.stdout.take().context("its output")?.read_to_string(&mut text)?;
        let done = parse_wrk(&text)
            .with_context(|| format!("wrk ({status}) says what is not understood:\n{text}"))?;
        if text.contains("Non-2xx") || errors(&text) > done.requests / TOLERATED {
            bail!("wrk met errors:\n{text}\nby hand: run it alone to see what the server does");
        }
        Ok(done)
    }
}

/// Takes `99% T`, `N requests in …` and `Requests/sec: R` from what wrk prints.
fn parse_wrk(text: &str) -> Option<Done> {
    let requests = text.lines().find_map(|line| line.trim().split_once(" requests in "))?.0;
    let per_second = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"))?;
    let p99 = seconds(text.lines().find_map(|line| line.trim().strip_prefix("99%"))?.trim())?;
    Some(Done { requests: requests.parse().ok()?, per_second: per_second.trim().parse().ok()?, p99 })
}

/// Reads a time as wrk prints it.
fn seconds(text: &str) -> Option<f64> {
    let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    units.iter().find_map(|(unit, scale)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * scale))
}

/// Sums up `Socket errors: connect 0, read 0, write 0, timeout 1`, a line that is there where there were any.
fn errors(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Socket errors:")).unwrap_or_default();
    line.split([' ', ',']).filter_map(|word| word.parse::<u64>().ok()).sum()
}

/// So many commands to Redis from 50 clients, each of which waits for its answer.
pub(super) fn redis(cpu: Option<u32>, port: u16, requests: u64) -> Result<Done> {
    let (port, count) = (port.to_string(), requests.to_string());
    let benchmark = ["redis-benchmark", "-p", &port, "-n", &count, "-c", "50", "-t", "get", "--csv"];
    let pinned = cpu.map(|cpu| ["taskset".to_owned(), "-c".to_owned(), cpu.to_string()]);
    let words = pinned.into_iter().flatten().chain(benchmark.map(str::to_owned));
    let answer = ask(&limited(
        GRACE * 3,
        "setpriv",
        ["--pdeathsig", "TERM"].map(str::to_owned).into_iter().chain(words),
    ));
    let answer = answer.context("redis-benchmark failed\nby hand: run it alone to see why")?;
    let (per_second, p99) =
        parse_redis(&answer).with_context(|| format!("redis-benchmark answers {answer:?}"))?;
    Ok(Done { requests, per_second, p99 })
}

/// Takes the rate, and the p99 in seconds, from redis-benchmark's line for GET by the names above it.
fn parse_redis(csv: &str) -> Option<(f64, f64)> {
    let cells =
        |line: &str| line.split(',').map(|cell| cell.trim_matches('"').to_owned()).collect::<Vec<_>>();
    let names = cells(csv.lines().find(|line| line.starts_with("\"test\","))?);
    let line = cells(csv.lines().find(|line| line.starts_with("\"GET\","))?);
    let figure = |name| line.get(names.iter().position(|n| n == name)?)?.parse::<f64>().ok();
    Some((figure("rps")?, figure("p99_latency_ms")? / 1e3))
}

/// Requests on a unix socket by one client, each on a connection of its own.
pub(super) fn on_socket(socket: &Path, seconds: u64) -> Result<u64> {
    repeat(seconds, || {
        let mut connection = UnixStream::connect(socket)?;
        connection.set_read_timeout(Some(GRACE))?;
        connection.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        connection.read_to_end(&mut Vec::new())?;
        Ok(1)
    })
}

/// Connections accepted through io_uring.
pub(super) fn on_ring(acceptor: &mut RingAcceptor, seconds: u64) -> Result<u64> {
    repeat(seconds, || {
        acceptor.tell(&format!("connect {AT_ONCE}"))?;
        let accepted = acceptor.tell(&format!("accept {AT_ONCE}"))?;
        acceptor.tell("reset")?;
        Ok(accepted)
    })
}

fn repeat(seconds: u64, mut step: impl FnMut() -> Result<u64>) -> Result<u64> {
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut count = 0;
    while Instant::now() < end {
        count += step()?;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::{errors, parse_redis, parse_wrk, seconds};

    #[test]
    fn what_load_generators_print_is_understood() {
        let done = parse_wrk(
            "  2 threads and 32 connections\n  Latency Distribution\n     50%    1.60ms\n     99%  812.00us\n  \
             152840 requests in 1.02s, 22.01MB read\nRequests/sec: 149870.96\n",
        );
        let done = done.map(|done| (done.requests, done.per_second, (done.p99 * 1e6).round()));
        assert_eq!(done, Some((152_840, 149_870.96, 812.0)));
        assert!(parse_wrk("unable to connect").is_none());
        assert_eq!((seconds("2.50ms"), seconds("1.00s"), seconds("soon")), (Some(0.0025), Some(1.0), None));
        assert_eq!(errors("  Socket errors: connect 0, read 3, write 0, timeout 12\n"), 15);
        assert_eq!(errors("Requests/sec: 1.0"), 0);
        let csv = "\"test\",\"rps\",\"p99_latency_ms\"\n\"GET\",\"81300.81\",\"0.500\"";
        assert_eq!(parse_redis(csv), Some((81300.81, 0.0005)));
    }
}
