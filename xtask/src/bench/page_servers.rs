//! The page of what servers get done.

use super::goals;
use super::page::{Page, spread};
use super::statistics::{Spread, median};
use super::throughput::{Arm, Figures, Sample, ToolSample};

const SERVERS: &str = "# Servers under saturating load

Beside the server runs in turn nothing, observer on it, observer on an nginx that has nothing to do, and bpftrace with the
script `xtask/src/bench/slices.bt` on the server's event loop; each round has the order of the one before backwards (ABBA),
so that what drifts falls on all alike. wrk has 32 connections that stay, redis-benchmark 50, each with one request at a
time. *p99* is what the load generator tells of a request. CPU time is the server's own (`utime` and `stime` of all its
processes), which has in it what programs take in its threads. Of Node.js and asyncio observer follows deferred work until
that has been too fast for three seconds (`--profile`), as it is here: its figures are from thereafter, and apart from them
those of its first seconds, which are also what a profile costs that is named. *Change* compares with *nothing* in the same
round. All figures are medians, with the quartiles in brackets.
";

const TOOLS: &str = "## observer and bpftrace themselves

In the same rounds, while the server is under load; nobody scrapes. *First figure* is what a tool takes from its start
until it answers with one, or is attached. Maps are memory in the kernel.
";

pub(super) fn write(page: &mut Page, servers: &[Figures], rounds: usize, seconds: u64) {
    page.text(SERVERS);
    page.text(&format!("Rounds: {rounds} of {seconds} s for each.\n"));
    servers.iter().for_each(|figures| page.server(figures));
    page.text(TOOLS);
    page.tools(servers);
    note(page, servers);
}

/// The figures that there are goals for.
fn note(page: &mut Page, servers: &[Figures]) {
    for (server, loss, to_bpftrace) in [
        ("nginx", &goals::NGINX_LOSS, &goals::NGINX_TO_BPFTRACE),
        ("Redis", &goals::REDIS_LOSS, &goals::REDIS_TO_BPFTRACE),
    ] {
        let Some(figures) = servers.iter().find(|figures| figures.server == server) else { continue };
        page.figure(loss, Spread::of(figures.changes(Arm::Observer, |sample| -sample.per_second)));
        let cpu = |arm| Spread::of(figures.changes(arm, |sample| sample.cpu));
        let (ours, theirs) = (cpu(Arm::Observer), cpu(Arm::Bpftrace));
        // Of what is lost in the noise there are no parts.
        if theirs.low > 0.0 {
            page.figure(to_bpftrace, Spread::at(ours.median / theirs.median * 100.0));
        }
    }
    for figures in servers {
        for (arm, samples) in figures.arms.iter().filter(|(arm, _)| *arm != Arm::Nothing) {
            let nothing = figures.samples(Arm::Nothing);
            let ratio = |figure: fn(&Sample) -> f64| {
                Spread::of(samples.iter().zip(nothing).map(|(a, b)| figure(a) / figure(b)))
            };
            let name = |of| format!("{of} of {} beside {} to nothing", figures.server, arm.title());
            page.ratio(name("CPU time"), ratio(|sample| sample.cpu));
            page.ratio(name("requests"), ratio(|sample| sample.per_second));
        }
    }
    let tools = servers.iter().find(|figures| figures.server == "nginx").into_iter();
    let tools = tools.flat_map(|figures| figures.tools(Arm::Observer)).collect::<Vec<_>>();
    page.figure(&goals::CPU, Spread::of(tools.iter().map(|tool| tool.cpu_seconds / tool.seconds * 100.0)));
    page.figure(&goals::MEMORY, Spread::of(tools.iter().map(|tool| tool.memory as f64 / f64::from(1 << 20))));
}

impl Figures {
    fn samples(&self, which: Arm) -> &[Sample] {
        self.arms.iter().find(|(arm, _)| *arm == which).map_or(&[], |(_, samples)| samples)
    }

    fn tools(&self, arm: Arm) -> impl Iterator<Item = &ToolSample> {
        self.samples(arm).iter().filter_map(|sample| sample.tool.as_ref())
    }

    /// What a figure changes by, in percent of its amount with nothing beside the server.
    fn changes(&self, arm: Arm, figure: fn(&Sample) -> f64) -> impl Iterator<Item = f64> {
        let pairs = self.samples(arm).iter().zip(self.samples(Arm::Nothing));
        pairs.map(move |(a, b)| (figure(a) - figure(b)) / figure(b).abs() * 100.0)
    }
}

impl Page {
    fn server(&mut self, figures: &Figures) {
        let rows = figures.arms.iter().map(|(arm, samples)| {
            let change = |figure| {
                if *arm == Arm::Nothing {
                    String::new()
                } else {
                    spread(figures.changes(*arm, figure), 1, "%")
                }
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
        let beside = format!("beside {}", figures.server);
        let head = ["requests/s", "change", "p99, ms", "change", "CPU time a request, us", "change"];
        self.table(&[&[beside.as_str()][..], &head].concat(), rows);
    }

    fn tools(&mut self, servers: &[Figures]) {
        let rows = servers.iter().flat_map(|figures| {
            figures.arms.iter().filter_map(|(arm, _)| {
                let samples: Vec<&ToolSample> = figures.tools(*arm).collect();
                let middle = |figure: fn(&ToolSample) -> f64| median(samples.iter().map(|&s| figure(s)));
                // Summed up, because some of it comes once a second.
                let sum = |figure: fn(&ToolSample) -> f64| samples.iter().map(|&s| figure(s)).sum::<f64>();
                let share = sum(|s| s.cpu_seconds) / sum(|s| s.seconds) * 100.0;
                let megabytes = |figure: fn(&ToolSample) -> f64| format!("{:.1} MB", middle(figure) / 1e6);
                (!samples.is_empty()).then(|| {
                    vec![
                        format!("{}, with {}", arm.title(), figures.server),
                        format!("{share:.3} %"),
                        megabytes(|s| s.memory as f64),
                        megabytes(|s| s.peak as f64),
                        megabytes(|s| s.maps as f64),
                        format!("{:.2} s", middle(|s| s.start)),
                    ]
                })
            })
        });
        let head = ["tool", "CPU, of one", "resident memory", "at its peak", "maps", "first figure"];
        self.table(&head, rows);
    }
}
