//! What observer takes as what it observes becomes more: threads, listeners, processes, and connections a second.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::crowd::{Client, Crowd, Made};
use super::goals;
use super::page::Page;
use super::part::{Cpus, progress};
use super::process::{Memory, filled, fine_cpu_seconds, memory, pause};
use super::statistics::Spread;
use super::tools::Observer;

const TEXT: &str = "# What grows with what is observed

One process has so many threads that each wait for events, or so many listeners with one thread that waits for all of
them; or so many processes have one of each (all waits end after a second at the latest); or one process accepts and
resets so many connections a second, from clients on another CPU.

*First figure*: from the start of observer until a scrape has the figure of a loop or a listener. *CPU*: of one, while
nobody scrapes, for connections while they come. *Scrape*: the median and the longest of some, from connecting to the last
byte, uncompressed, each of figures read anew. *Resident*: after those scrapes, and at its peak since the start. *Maps*:
memory in the kernel. *Fullest map*: of those that take in what is observed and never push anything out, for connections
while they come. *Lost*: what observer says it had no room for. *Seen to be accepted*: of the connections that clients saw
made; those that were reset before they saw that can make it more than all.
";

/// What there is much of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Threads,
    Listeners,
    Targets,
    Connections,
}

/// So much of it, and the room that observer is told to have.
struct Case {
    kind: Kind,
    count: u32,
    capacity: u32,
}

/// observer's own.
const CAPACITY: u32 = 1024;

const KINDS: [(Kind, &[u32]); 4] = [
    (Kind::Threads, &[1, 10, 100, 1000, 10_000]),
    (Kind::Listeners, &[1, 10, 100, 1000]),
    (Kind::Targets, &[1, 10, 100, 1000]),
    (Kind::Connections, &[10, 100, 1000, 10_000, 100_000]),
];

/// Where room is made for all of them.
const ROOMY: Case = Case { kind: Kind::Threads, count: 10_000, capacity: 16_384 };

/// Longer than any thread waits. Scrapes take at most a tenth of a CPU; sooner than that they get figures that are not new.
const AGE: Duration = Duration::from_millis(1100);

/// Scrapes, those included that get no new figures.
const TRIES: usize = 60;

struct Sample {
    first: Duration,
    cpu: f64,
    scrapes: Vec<Duration>,
    bytes: usize,
    memory: Memory,
    fullest: Option<(String, f64)>,
    lost: Vec<String>,
    /// Connections that were made, and how many of them were seen to be accepted.
    connections: Option<(Made, f64)>,
}

pub(super) struct Bench<'a> {
    pub(super) observer: &'a Path,
    pub(super) crowd: &'a Path,
    pub(super) cpus: Cpus,
    pub(super) seconds: u64,
    pub(super) scrapes: usize,
}

impl Bench<'_> {
    pub(super) fn run(&self, page: &mut Page) -> Result<()> {
        page.text(TEXT);
        page.text(&format!("CPU is of {} s, and scrapes are {}.\n", self.seconds, self.scrapes));
        for (kind, counts) in KINDS {
            page.text(&format!("## {}\n", kind.title()));
            let mut rows = Vec::new();
            let mut scrapes = Vec::new();
            let roomy = (kind == ROOMY.kind).then_some(ROOMY);
            let cases = counts.iter().map(|&count| Case { kind, count, capacity: CAPACITY }).chain(roomy);
            for case in cases {
                let sample = self.case(&case).with_context(|| format!("with {}", case.title()))?;
                if kind == Kind::Targets && case.count == 1000 {
                    let resident = sample.memory.now as f64 / f64::from(1 << 20);
                    page.figure(&goals::MEMORY_OF_MANY, Spread::at(resident));
                    page.figure(&goals::SCRAPE_OF_MANY, sample.milliseconds());
                }
                rows.push(sample.row(&case));
                // Those of connections are all of one listener; where there is room for more, most bring nothing new.
                if kind != Kind::Connections && case.capacity == CAPACITY {
                    scrapes.push((case.title(), sample.milliseconds()));
                }
            }
            page.table(&kind.head(), rows);
            if let Some(((most, longest), fewer)) = scrapes.split_last() {
                for (title, scrape) in fewer {
                    let title = format!("a scrape of {title}, to one of {most}");
                    page.ratio(title, scrape.part_of(longest.median));
                }
            }
        }
        Ok(())
    }

    fn case(&self, case: &Case) -> Result<Sample> {
        progress(&format!("growth: {}", case.title()));
        let Case { kind, count, capacity } = *case;
        let crowd = Crowd::start(self.crowd, self.cpus.server, kind.word(), count)?;
        let observer =
            Observer::start(self.observer, &[crowd.pid()], &["--capacity", &capacity.to_string()])?;
        let pid = observer.tool.pid();
        pause(Duration::from_secs(self.seconds.min(2)));
        let mut text = observer.scrape()?;
        let before = accepted(&text);
        // Maps are looked into while connections still come.
        let lasts = self.seconds + 2;
        let client = (kind == Kind::Connections)
            .then(|| Client::start(self.crowd, self.cpus.load, crowd.port(), count, lasts))
            .transpose()?;
        let (start, used) = (Instant::now(), fine_cpu_seconds(pid)?);
        pause(Duration::from_secs(self.seconds));
        let cpu = (fine_cpu_seconds(pid)? - used) / start.elapsed().as_secs_f64();
        let fullest = filled(pid)?.into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
        let made = client.map(Client::finish).transpose()?;

        let mut scrapes = Vec::new();
        for _ in 0..TRIES {
            pause(AGE);
            let start = Instant::now();
            let scrape = observer.scrape()?;
            let took = start.elapsed();
            // All threads have waited meanwhile, so figures that are the same are the last ones again.
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
            first: observer.tool.start,
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
    /// As the tests' program calls it.
    fn word(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Listeners => "listeners",
            Self::Targets => "processes",
            Self::Connections => "acceptor",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Threads => "Threads that wait for events",
            Self::Listeners => "Listeners of one process",
            Self::Targets => "Targets",
            Self::Connections => "Connections a second",
        }
    }

    fn head(self) -> Vec<&'static str> {
        let mut head = vec![if self == Self::Connections { "asked for" } else { "so many" }];
        if self == Self::Connections {
            head.extend(["made a second", "seen to be accepted"]);
        }
        let figures = ["first figure", "CPU", "scrape", "longest", "size", "resident", "peak", "maps"];
        head.extend(figures.iter().chain(&["fullest map", "lost"]));
        head
    }
}

impl Case {
    fn title(&self) -> String {
        let Self { kind, count, capacity } = self;
        let room = if *capacity == CAPACITY { String::new() } else { format!(", --capacity {capacity}") };
        let unit = if *kind == Kind::Connections { "connections a second" } else { kind.word() };
        format!("{count} {unit}{room}")
    }
}

impl Sample {
    fn milliseconds(&self) -> Spread {
        Spread::of(self.scrapes.iter().map(|scrape| scrape.as_secs_f64() * 1e3))
    }

    fn row(&self, case: &Case) -> Vec<String> {
        let milliseconds = |time: Duration| format!("{:.0} ms", time.as_secs_f64() * 1e3);
        let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let room = if case.capacity == CAPACITY { "" } else { &format!(", --capacity {}", case.capacity) };
        let mut row = vec![format!("{}{room}", case.count)];
        if let Some((made, seen)) = &self.connections {
            row.push(format!("{:.0}", made.per_second));
            row.push(format!("{:.2} %", seen / made.count as f64 * 100.0));
        }
        let fullest = self.fullest.as_ref();
        row.extend([
            milliseconds(self.first),
            format!("{:.2} %", self.cpu * 100.0),
            format!("{:.1} ms", self.milliseconds().median),
            self.scrapes.last().copied().map_or_else(String::new, milliseconds),
            format!("{:.2} MB", self.bytes as f64 / 1e6),
            mebibytes(self.memory.now),
            mebibytes(self.memory.peak),
            mebibytes(self.memory.maps),
            fullest.map_or_else(String::new, |(name, part)| format!("{name} {:.1} %", part * 100.0)),
            if self.lost.is_empty() { "nothing".to_owned() } else { self.lost.join(", ") },
        ]);
        row
    }
}

/// Connections that observer has seen to be accepted.
fn accepted(figures: &str) -> f64 {
    values(figures, "observer_accept_queue_accepts_total{").map(|(_, value)| value).sum()
}

/// What observer says it has lost, by cause.
fn lost(figures: &str) -> Vec<String> {
    let causes = values(figures, "observer_self_lost_total{").filter(|(_, count)| *count > 0.0);
    causes
        .map(|(labels, count)| format!("{count} {}", labels.replace(['"', '}'], "").replace("cause=", "")))
        .collect()
}

/// Series that begin like that: their labels and values.
fn values<'a>(figures: &'a str, begin: &str) -> impl Iterator<Item = (&'a str, f64)> {
    figures.lines().filter_map(move |line| {
        let (labels, value) = line.strip_prefix(begin)?.rsplit_once(' ')?;
        Some((labels, value.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::{accepted, lost};

    #[test]
    fn figures_are_read_from_a_scrape() {
        let scrape = "# TYPE observer_self_lost_total counter\n\
                      observer_self_lost_total{cause=\"loops\"} 3\nobserver_self_lost_total{cause=\"hooks\"} 0\n\
                      observer_accept_queue_accepts_total{pid=\"1\",comm=\"a b\"} 4\n\
                      observer_accept_queue_accepts_total{pid=\"2\",comm=\"c\"} 5\n";
        assert_eq!(lost(scrape), ["3 loops"]);
        assert!((accepted(scrape) - 9.0).abs() < f64::EPSILON);
    }
}
