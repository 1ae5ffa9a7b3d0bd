//! How the costs of observer grow with the number of observed threads, listeners, processes, and connections per
//! second.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::crowd::{Client, Connections, Crowd};
use crate::goals;
use crate::page::Page;
use crate::part::{Cpus, progress};
use crate::process::{Memory, fill_ratios, fine_cpu_seconds, memory, pause};
use crate::statistics::Spread;
use crate::tools::Observer;

const TEXT: &str = "# Growth

observer observes one of these:

- one process with many threads, each of which waits for events;
- one process with many listeners and one thread that waits for all of them;
- many processes, each with one listener and one such thread;
- one process that accepts and resets connections, with clients on another CPU.

No wait lasts longer than a second.

| column | meaning |
| --- | --- |
| first metric | time from the start of observer until a scrape has a metric of an event loop or a listener |
| CPU | CPU usage of observer, as a share of one CPU, without scrapes; in the last table while connections are made |
| scrape, longest | median and maximum of the time from connecting to the last byte of an uncompressed scrape with new values |
| size | size of the last scrape |
| resident, peak | resident memory after these scrapes, and its peak since the start |
| maps | kernel memory of the eBPF maps |
| fullest map | fill ratio of the fullest hash map that does not evict entries; in the last table while connections are made |
| lost | events that observer counted as lost, by cause |
| accepts counted | connections that observer counted as accepted, relative to those that clients counted [1] |

[1] More than 100 % is possible: clients do not count a connection that is reset before they notice that it is
established.
";

/// The observed objects.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Threads,
    Listeners,
    Targets,
    Connections,
}

/// A number of objects, and the value of `--capacity`.
struct Case {
    kind: Kind,
    count: u32,
    capacity: u32,
}

/// The default of `--capacity`.
const DEFAULT_CAPACITY: u32 = 1024;

const KINDS: [(Kind, &[u32]); 4] = [
    (Kind::Threads, &[1, 10, 100, 1000, 10_000]),
    (Kind::Listeners, &[1, 10, 100, 1000]),
    (Kind::Targets, &[1, 10, 100, 1000]),
    (Kind::Connections, &[10, 100, 1000, 10_000, 100_000]),
];

/// A case whose capacity exceeds its number of threads.
const LARGE_CAPACITY: Case = Case { kind: Kind::Threads, count: 10_000, capacity: 16_384 };

/// The time between two scrapes: longer than any wait of a thread. observer spends at most 10 % of a CPU on scrapes, so
/// scrapes in quick succession return the same page.
const SCRAPE_INTERVAL: Duration = Duration::from_millis(1100);

/// The maximum number of scrapes, including those without new values.
const MAX_SCRAPES: usize = 60;

struct Sample {
    first_metric: Duration,
    cpu: f64,
    scrapes: Vec<Duration>,
    bytes: usize,
    memory: Memory,
    fullest: Option<(String, f64)>,
    lost: Vec<String>,
    /// The connections that clients made, and the accepts that observer counted.
    connections: Option<(Connections, f64)>,
}

pub(crate) struct Bench<'a> {
    pub(crate) observer: &'a Path,
    pub(crate) crowd: &'a Path,
    pub(crate) cpus: Cpus,
    pub(crate) seconds: u64,
    pub(crate) scrapes: usize,
}

impl Bench<'_> {
    pub(crate) fn run(&self, page: &mut Page) -> Result<()> {
        page.text(TEXT);
        page.text(&format!(
            "CPU usage is measured for {} s, and {} scrapes are timed.\n",
            self.seconds, self.scrapes
        ));
        for (kind, counts) in KINDS {
            page.text(&format!("## {}\n", kind.title()));
            let mut rows = Vec::new();
            let mut scrapes = Vec::new();
            let large = (kind == LARGE_CAPACITY.kind).then_some(LARGE_CAPACITY);
            let cases =
                counts.iter().map(|&count| Case { kind, count, capacity: DEFAULT_CAPACITY }).chain(large);
            for case in cases {
                let sample = self.case(&case).with_context(|| case.title())?;
                if kind == Kind::Targets && case.count == 1000 {
                    let resident = sample.memory.resident as f64 / f64::from(1 << 20);
                    page.goal(&goals::MEMORY_OF_MANY, Spread::at(resident));
                    page.goal(&goals::SCRAPE_OF_MANY, sample.milliseconds());
                }
                rows.push(sample.row(&case));
                // With connections all scrapes are of one listener, and with a large capacity most have no new values.
                if kind != Kind::Connections && case.capacity == DEFAULT_CAPACITY {
                    scrapes.push((case.title(), sample.milliseconds()));
                }
            }
            page.table(&kind.head(), rows);
            if let Some(((most, longest), fewer)) = scrapes.split_last() {
                for (title, scrape) in fewer {
                    let title = format!("scrape of {title}, relative to {most}");
                    page.ratio(title, scrape.divided_by(longest.median));
                }
            }
        }
        Ok(())
    }

    fn case(&self, case: &Case) -> Result<Sample> {
        progress(&format!("growth: {}", case.title()));
        let Case { kind, count, capacity } = *case;
        let crowd = Crowd::start(self.crowd, self.cpus.server, kind.argument(), count)?;
        let observer =
            Observer::start(self.observer, &[crowd.pid()], &["--capacity", &capacity.to_string()])?;
        let pid = observer.tool.pid();
        pause(Duration::from_secs(self.seconds.min(2)));
        let mut text = observer.scrape()?;
        let before = accepted(&text);
        // Connections go on while the maps are read.
        let duration = self.seconds + 2;
        let client = (kind == Kind::Connections)
            .then(|| Client::start(self.crowd, self.cpus.load, crowd.port(), count, duration))
            .transpose()?;
        let (start, used) = (Instant::now(), fine_cpu_seconds(pid)?);
        pause(Duration::from_secs(self.seconds));
        let cpu = (fine_cpu_seconds(pid)? - used) / start.elapsed().as_secs_f64();
        let fullest = fill_ratios(pid)?.into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
        let made = client.map(Client::finish).transpose()?;

        let mut scrapes = Vec::new();
        for _ in 0..MAX_SCRAPES {
            pause(SCRAPE_INTERVAL);
            let start = Instant::now();
            let scrape = observer.scrape()?;
            let took = start.elapsed();
            // All threads have waited since the last scrape, so a scrape with the same text has no new values.
            if scrape != text {
                scrapes.push(took);
                text = scrape;
            }
            if scrapes.len() == self.scrapes {
                break;
            }
        }
        scrapes.sort();
        let connections = made.map(|made| (made, accepted(&text) - before));
        Ok(Sample {
            first_metric: observer.tool.startup,
            cpu,
            scrapes,
            bytes: text.len(),
            memory: memory(pid)?,
            fullest,
            lost: lost(&text),
            connections,
        })
    }
}

impl Kind {
    /// The argument of the example `crowd`.
    fn argument(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Listeners => "listeners",
            Self::Targets => "processes",
            Self::Connections => "acceptor",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Threads => "Threads",
            Self::Listeners => "Listeners",
            Self::Targets => "Processes",
            Self::Connections => "Connections per second",
        }
    }

    fn head(self) -> Vec<&'static str> {
        let mut head = match self {
            Self::Threads => vec!["threads"],
            Self::Listeners => vec!["listeners"],
            Self::Targets => vec!["processes"],
            Self::Connections => vec!["requested rate", "made per second", "accepts counted"],
        };
        head.extend(["first metric", "CPU", "scrape", "longest", "size", "resident", "peak", "maps"]);
        head.extend(["fullest map", "lost"]);
        head
    }
}

impl Case {
    fn title(&self) -> String {
        let Self { kind, count, capacity } = self;
        let option =
            if *capacity == DEFAULT_CAPACITY { String::new() } else { format!(", --capacity {capacity}") };
        let unit = if *kind == Kind::Connections { "connections per second" } else { kind.argument() };
        format!("{count} {unit}{option}")
    }
}

impl Sample {
    fn milliseconds(&self) -> Spread {
        Spread::of(self.scrapes.iter().map(|scrape| scrape.as_secs_f64() * 1e3))
    }

    fn row(&self, case: &Case) -> Vec<String> {
        let milliseconds = |time: Duration| format!("{:.0} ms", time.as_secs_f64() * 1e3);
        let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let option =
            if case.capacity == DEFAULT_CAPACITY { "" } else { &format!(", --capacity {}", case.capacity) };
        let mut row = vec![format!("{}{option}", case.count)];
        if let Some((made, accepts)) = &self.connections {
            row.push(format!("{:.0}", made.per_second));
            row.push(format!("{:.2} %", accepts / made.count as f64 * 100.0));
        }
        let fullest = self.fullest.as_ref();
        row.extend([
            milliseconds(self.first_metric),
            format!("{:.2} %", self.cpu * 100.0),
            format!("{:.1} ms", self.milliseconds().median),
            self.scrapes.last().copied().map_or_else(String::new, milliseconds),
            format!("{:.2} MB", self.bytes as f64 / 1e6),
            mebibytes(self.memory.resident),
            mebibytes(self.memory.peak),
            mebibytes(self.memory.maps),
            fullest.map_or_else(String::new, |(name, ratio)| format!("{name} {:.1} %", ratio * 100.0)),
            if self.lost.is_empty() { "nothing".to_owned() } else { self.lost.join(", ") },
        ]);
        row
    }
}

/// The accepted connections that observer has counted.
fn accepted(scrape: &str) -> f64 {
    values(scrape, "observer_accept_queue_accepts_total{").map(|(_, value)| value).sum()
}

/// The events that observer has lost, by cause.
fn lost(scrape: &str) -> Vec<String> {
    let causes = values(scrape, "observer_self_lost_total{").filter(|(_, count)| *count > 0.0);
    causes
        .map(|(labels, count)| format!("{count} {}", labels.replace(['"', '}'], "").replace("cause=", "")))
        .collect()
}

/// Labels and values of the series that begin with `prefix`.
fn values<'a>(scrape: &'a str, prefix: &str) -> impl Iterator<Item = (&'a str, f64)> {
    scrape.lines().filter_map(move |line| {
        let (labels, value) = line.strip_prefix(prefix)?.rsplit_once(' ')?;
        Some((labels, value.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::{accepted, lost};

    #[test]
    fn a_scrape_is_parsed() {
        let scrape = "# TYPE observer_self_lost_total counter\n\
                      observer_self_lost_total{cause=\"loops\"} 3\nobserver_self_lost_total{cause=\"hooks\"} 0\n\
                      observer_accept_queue_accepts_total{pid=\"1\",comm=\"a b\"} 4\n\
                      observer_accept_queue_accepts_total{pid=\"2\",comm=\"c\"} 5\n";
        assert_eq!(lost(scrape), ["3 loops"]);
        assert!((accepted(scrape) - 9.0).abs() < f64::EPSILON);
    }
}
