//! The page with the throughput, latency and CPU time of servers.

use crate::goals;
use crate::page::{Page, spread};
use crate::statistics::{Spread, median};
use crate::throughput::{Arm, Results, Sample, ToolSample};

const SERVERS: &str = "# Servers under saturating load

Each server runs with no tool, with observer on it, with observer on an idle nginx, and with bpftrace and the script
`bench/src/slices.bt` on the server's event loop. The order is reversed from round to round (ABBA), so that drift
affects all of them alike. wrk uses 32 persistent connections and redis-benchmark 50, each with one request at a time.

- *p99* is the 99th percentile of the latency that the load generator reports.
- *CPU time* is that of the server (`utime` and `stime` of all its processes). It includes the run time of eBPF
  programs in its threads.
- *Change* is relative to the round with no tool.
- In Node.js and asyncio, observer follows deferred tasks, and stops after three seconds of too high a rate
  (`--profile`), which this load has. Rows *observer* are measured after that, and rows *observer, following deferred
  tasks* before; the latter is also the cost with `--profile NAME`.

All values are medians, with the quartiles in brackets.
";

const TOOLS: &str = "## Costs of the tools themselves

Measured in the same rounds, while the server is under load, without scrapes. *Startup* is the time from the start of
the tool until observer has its first metric or bpftrace has attached its programs. *Maps* is kernel memory.
";

pub(crate) fn write(page: &mut Page, servers: &[Results], rounds: usize, seconds: u64) {
    page.text(SERVERS);
    page.text(&format!("{rounds} rounds of {seconds} s for each.\n"));
    servers.iter().for_each(|results| page.server(results));
    page.text(TOOLS);
    page.tools(servers);
    record(page, servers);
}

/// Records the goals and ratios.
fn record(page: &mut Page, servers: &[Results]) {
    for (server, loss, to_bpftrace) in [
        ("nginx", &goals::NGINX_LOSS, &goals::NGINX_TO_BPFTRACE),
        ("Redis", &goals::REDIS_LOSS, &goals::REDIS_TO_BPFTRACE),
    ] {
        let Some(results) = servers.iter().find(|results| results.server == server) else { continue };
        page.goal(loss, Spread::of(results.changes(Arm::Observer, |sample| -sample.per_second)));
        let cpu = |arm| Spread::of(results.changes(arm, |sample| sample.cpu));
        let (ours, theirs) = (cpu(Arm::Observer), cpu(Arm::Bpftrace));
        // A share of a cost that is below the noise has no meaning.
        if theirs.low > 0.0 {
            page.goal(to_bpftrace, Spread::at(ours.median / theirs.median * 100.0));
        }
    }
    for results in servers {
        for (arm, samples) in results.arms.iter().filter(|(arm, _)| *arm != Arm::NoTool) {
            let without = results.samples(Arm::NoTool);
            let ratio = |value: fn(&Sample) -> f64| {
                Spread::of(samples.iter().zip(without).map(|(a, b)| value(a) / value(b)))
            };
            let name = |of| format!("{of} of {} with {}, relative to no tool", results.server, arm.title());
            page.ratio(name("CPU time"), ratio(|sample| sample.cpu));
            page.ratio(name("throughput"), ratio(|sample| sample.per_second));
        }
    }
    let tools = servers.iter().find(|results| results.server == "nginx").into_iter();
    let tools = tools.flat_map(|results| results.tools(Arm::Observer)).collect::<Vec<_>>();
    page.goal(&goals::CPU, Spread::of(tools.iter().map(|tool| tool.cpu_seconds / tool.seconds * 100.0)));
    page.goal(&goals::MEMORY, Spread::of(tools.iter().map(|tool| tool.memory as f64 / f64::from(1 << 20))));
}

impl Results {
    fn samples(&self, which: Arm) -> &[Sample] {
        self.arms.iter().find(|(arm, _)| *arm == which).map_or(&[], |(_, samples)| samples)
    }

    fn tools(&self, arm: Arm) -> impl Iterator<Item = &ToolSample> {
        self.samples(arm).iter().filter_map(|sample| sample.tool.as_ref())
    }

    /// The changes of a value relative to the same round with no tool, in percent.
    fn changes(&self, arm: Arm, value: fn(&Sample) -> f64) -> impl Iterator<Item = f64> {
        let pairs = self.samples(arm).iter().zip(self.samples(Arm::NoTool));
        pairs.map(move |(a, b)| (value(a) - value(b)) / value(b).abs() * 100.0)
    }
}

impl Page {
    fn server(&mut self, results: &Results) {
        let rows = results.arms.iter().map(|(arm, samples)| {
            let change = |value| {
                if *arm == Arm::NoTool { String::new() } else { spread(results.changes(*arm, value), 1, "%") }
            };
            vec![
                arm.title().to_owned(),
                spread(samples.iter().map(|sample| sample.per_second), 0, ""),
                change(|sample| sample.per_second),
                spread(samples.iter().map(|sample| sample.p99 * 1e3), 2, ""),
                change(|sample| sample.p99),
                spread(samples.iter().map(|sample| sample.cpu * 1e6), 2, ""),
                change(|sample| sample.cpu),
            ]
        });
        let head = ["requests/s", "change", "p99, ms", "change", "CPU time per request, us", "change"];
        self.table(&[&[results.server][..], &head].concat(), rows);
    }

    fn tools(&mut self, servers: &[Results]) {
        let rows = servers.iter().flat_map(|results| {
            results.arms.iter().filter_map(|(arm, _)| {
                let samples: Vec<&ToolSample> = results.tools(*arm).collect();
                let middle = |value: fn(&ToolSample) -> f64| median(samples.iter().map(|&s| value(s)));
                // The sum over all rounds, because some of the work is done once a second.
                let sum = |value: fn(&ToolSample) -> f64| samples.iter().map(|&s| value(s)).sum::<f64>();
                let share = sum(|s| s.cpu_seconds) / sum(|s| s.seconds) * 100.0;
                let megabytes = |value: fn(&ToolSample) -> f64| format!("{:.1} MB", middle(value) / 1e6);
                (!samples.is_empty()).then(|| {
                    vec![
                        format!("{}: {}", results.server, arm.title()),
                        format!("{share:.3} %"),
                        megabytes(|s| s.memory as f64),
                        megabytes(|s| s.peak as f64),
                        megabytes(|s| s.maps as f64),
                        format!("{:.2} s", middle(|s| s.startup)),
                    ]
                })
            })
        });
        let head = ["server: tool", "CPU usage", "resident memory", "peak", "maps", "startup"];
        self.table(&head, rows);
    }
}
