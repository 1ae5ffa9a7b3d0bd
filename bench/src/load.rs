//! Load generators. All run on loopback for a limited time and count their requests.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::{Process, program};
use crate::servers::RingAcceptor;

/// Connections that the io_uring acceptor makes before it accepts them. The limit of open files bounds it.
const BATCH: u64 = 100;

/// How long a load generator may run beyond its duration.
const GRACE: Duration = Duration::from_secs(20);

/// One request in this many may fail or time out, because some do on a busy machine.
const REQUESTS_PER_ERROR: u64 = 100;

/// The result of a load.
#[derive(Clone, Copy)]
pub(crate) struct LoadResult {
    pub(crate) requests: u64,
    pub(crate) per_second: f64,
    /// 99th percentile of the latency, in seconds.
    pub(crate) p99: f64,
}

/// wrk. Its process exists before it sends the first request, so that observer can observe it from the start.
pub(crate) struct Wrk {
    process: Process,
    gate: ChildStdin,
    seconds: u64,
}

impl Wrk {
    /// Prepares a load of 32 connections, each of which is kept open (`keep_alive`) or used for a single request.
    pub(crate) fn prepare(cpu: Option<u32>, port: u16, seconds: u64, keep_alive: bool) -> Result<Self> {
        let mut command = program("sh", cpu);
        command.args(["-c", "read -r _ && exec \"$@\"", "sh", "wrk", "--latency", "-t", "1", "-c", "32"]);
        command.args(["-d", &seconds.to_string()]);
        if !keep_alive {
            command.args(["-H", "Connection: close"]);
        }
        command.arg(format!("http://127.0.0.1:{port}/")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let gate = process.child.stdin.take().context("stdin is piped")?;
        Ok(Self { process, gate, seconds })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub(crate) fn run(mut self) -> Result<LoadResult> {
        writeln!(self.gate)?;
        let status = self.process.finish(Duration::from_secs(self.seconds) + GRACE)?;
        let mut text = String::new();
        self.process.child.stdout.take().context("stdout is piped")?.read_to_string(&mut text)?;
        let done = parse_wrk(&text)
            .with_context(|| format!("cannot parse the output of wrk ({status}):\n{text}"))?;
        if text.contains("Non-2xx") || errors(&text) > done.requests / REQUESTS_PER_ERROR {
            bail!("too many requests of wrk failed:\n{text}\nby hand: run wrk against the server to see why");
        }
        Ok(done)
    }
}

/// Parses `99% T`, `N requests in …` and `Requests/sec: R` in the output of wrk.
fn parse_wrk(text: &str) -> Option<LoadResult> {
    let requests = text.lines().find_map(|line| line.trim().split_once(" requests in "))?.0;
    let per_second = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"))?;
    let p99 = seconds(text.lines().find_map(|line| line.trim().strip_prefix("99%"))?.trim())?;
    Some(LoadResult { requests: requests.parse().ok()?, per_second: per_second.trim().parse().ok()?, p99 })
}

/// Parses a duration in the format of wrk.
fn seconds(text: &str) -> Option<f64> {
    let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    units.iter().find_map(|(unit, scale)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * scale))
}

/// The sum of the errors in a line `Socket errors: connect 0, read 0, write 0, timeout 1`, which wrk prints only if
/// there are any.
fn errors(text: &str) -> u64 {
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Socket errors:")).unwrap_or_default();
    line.split([' ', ',']).filter_map(|word| word.parse::<u64>().ok()).sum()
}

/// Sends this many GET commands to Redis on 50 connections, each of which waits for the reply before it sends the next.
pub(crate) fn redis(cpu: Option<u32>, port: u16, requests: u64) -> Result<LoadResult> {
    let (port, count) = (port.to_string(), requests.to_string());
    let mut command = program("redis-benchmark", cpu);
    command.args(["-p", &port, "-n", &count, "-c", "50", "-t", "get", "--csv"]);
    let mut process = Process::start(command.stdout(Stdio::piped()).stderr(Stdio::null()))?;
    // It prints less than a pipe holds, so it does not block on its output.
    let status = process.finish(GRACE * 3)?;
    if !status.success() {
        bail!("redis-benchmark failed ({status})\nby hand: run it alone to see why");
    }
    let mut text = String::new();
    process.child.stdout.take().context("stdout is piped")?.read_to_string(&mut text)?;
    let (per_second, p99) = parse_redis(&text)
        .with_context(|| format!("cannot parse the output of redis-benchmark: {text:?}"))?;
    Ok(LoadResult { requests, per_second, p99 })
}

/// The rate, and the 99th percentile of the latency in seconds, from the row for GET of the CSV output of
/// redis-benchmark.
fn parse_redis(csv: &str) -> Option<(f64, f64)> {
    let cells =
        |line: &str| line.split(',').map(|cell| cell.trim_matches('"').to_owned()).collect::<Vec<_>>();
    let columns = cells(csv.lines().find(|line| line.starts_with("\"test\","))?);
    let row = cells(csv.lines().find(|line| line.starts_with("\"GET\","))?);
    let value = |name| row.get(columns.iter().position(|n| n == name)?)?.parse::<f64>().ok();
    Some((value("rps")?, value("p99_latency_ms")? / 1e3))
}

/// Sends requests to a unix socket, each on a new connection. Returns their number.
pub(crate) fn unix_requests(socket: &Path, seconds: u64) -> Result<u64> {
    repeat(seconds, || {
        let mut connection = UnixStream::connect(socket)?;
        connection.set_read_timeout(Some(GRACE))?;
        connection.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        connection.read_to_end(&mut Vec::new())?;
        Ok(1)
    })
}

/// Makes connections and accepts them through io_uring. Returns their number.
pub(crate) fn io_uring_accepts(acceptor: &mut RingAcceptor, seconds: u64) -> Result<u64> {
    repeat(seconds, || {
        acceptor.run(&format!("connect {BATCH}"))?;
        let accepted = acceptor.run(&format!("accept {BATCH}"))?;
        acceptor.run("reset")?;
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
    fn output_of_load_generators_is_parsed() {
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
