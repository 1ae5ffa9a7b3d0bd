//! The time from the start of observer to its first metric, and the latency of a target while observer attaches and
//! detaches.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::goals;
use crate::latency::{Client, Request};
use crate::page::Page;
use crate::part::{Cpus, progress};
use crate::process::pause;
use crate::servers::Server;
use crate::statistics::{Spread, quantile};
use crate::tools::{Observer, settle};

const FIRST: &str = "# Start and stop

The time from the start of observer until a scrape has the first metric of an idle server. Scrapes follow each other
without a pause. Medians, with the quartiles in brackets.
";

const LATENCY: &str = "## Latency of a target while observer attaches and detaches

A client on another CPU sends one request at a time on a persistent connection, 1,000 per second, while observer
starts and stops.

- *attaching*: from the start of observer until half a second after its first metric, when it attaches to a known
  runtime;
- *detaching*: from the signal that ends observer until its process has exited.

A request counts in every window that it overlaps. The maximum is affected by everything else that happens on the
machine, in all windows.
";

/// How long the window of attaching lasts beyond the first metric.
const ATTACHING: Duration = Duration::from_millis(500);

const WINDOWS: [&str; 5] = ["before", "attaching", "observed", "detaching", "after"];

/// A phase of the rounds, with the requests of all rounds.
struct Window {
    title: &'static str,
    latencies: Vec<Duration>,
    duration: Duration,
}

pub(crate) struct Bench<'a> {
    pub(crate) observer: &'a Path,
    pub(crate) cpus: Cpus,
    pub(crate) starts: usize,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
}

impl Bench<'_> {
    pub(crate) fn run(&self, page: &mut Page) -> Result<()> {
        let cpu = self.cpus.server;
        let servers = [
            ("nginx", Server::nginx(cpu, false)?),
            ("Node.js", Server::node(cpu)?),
            ("asyncio", Server::asyncio(cpu)?),
            ("Ruby's async", Server::ruby(cpu)?),
        ];
        page.text(FIRST);
        page.text(&format!("{} starts for each server.\n", self.starts));
        let mut rows = Vec::new();
        let mut on_nginx = None;
        for (name, server) in &servers {
            progress(&format!("starts on {name}"));
            let starts = self.starts(server)?;
            let first = Spread::of(starts.iter().copied());
            if let Some(nginx) = on_nginx {
                page.ratio(format!("first metric with {name}, relative to nginx"), first.divided_by(nginx));
            } else {
                page.goal(&goals::FIRST_METRIC, first);
                on_nginx = Some(first.median);
            }
            let longest = format!("{:.0} ms", starts.into_iter().fold(0.0, f64::max));
            rows.push(vec![(*name).to_owned(), first.show(0, "ms"), longest]);
        }
        page.table(&["server", "first metric after", "longest"], rows);

        page.text(LATENCY);
        let Self { rounds, seconds, .. } = self;
        page.text(&format!(
            "{rounds} rounds, in which *before*, *observed* and *after* last {seconds} s. Percentiles are those of all \
             rounds together; durations are means.\n"
        ));
        for (name, server) in &servers {
            let mut windows = WINDOWS.map(Window::new);
            for round in 1..=self.rounds {
                progress(&format!("attaching and detaching on {name}, round {round} of {rounds}"));
                self.round(server, &mut windows)?;
            }
            let rows = windows.into_iter().map(|window| window.row(*rounds));
            page.table(&[name, "duration", "requests", "median, us", "p99, us", "longest, us"], rows);
        }
        Ok(())
    }

    /// Times to the first metric, in milliseconds.
    fn starts(&self, server: &Server) -> Result<Vec<f64>> {
        let start =
            |_| Ok(Observer::start(self.observer, &[server.pid()], &[])?.tool.startup.as_secs_f64() * 1e3);
        (0..self.starts).map(start).collect()
    }

    fn round(&self, server: &Server, windows: &mut [Window]) -> Result<()> {
        let seconds = Duration::from_secs(self.seconds);
        let client = Client::start(self.cpus.load, server.port)?;
        settle();
        let mut bounds = vec![Instant::now()];
        let mut bound = || bounds.push(Instant::now());
        pause(seconds);
        bound();
        let observer = Observer::start(self.observer, &[server.pid()], &[])?;
        pause(ATTACHING);
        bound();
        pause(seconds);
        bound();
        drop(observer);
        bound();
        pause(seconds);
        bound();
        let requests = client.finish()?;
        for (window, bounds) in windows.iter_mut().zip(bounds.windows(2)) {
            let overlapping = requests.iter().filter(|request| overlaps(request, bounds[0], bounds[1]));
            window.latencies.extend(overlapping.map(|(_, latency)| *latency));
            window.duration += bounds[1] - bounds[0];
        }
        Ok(())
    }
}

/// Whether a request overlaps a window. One that began before the window counts as well, because it delays the
/// requests that would begin in the window.
fn overlaps(&(begin, latency): &Request, start: Instant, end: Instant) -> bool {
    begin < end && begin + latency > start
}

impl Window {
    fn new(title: &'static str) -> Self {
        Self { title, latencies: Vec::new(), duration: Duration::ZERO }
    }

    fn row(mut self, rounds: usize) -> Vec<String> {
        self.latencies.sort();
        let microseconds = |part: f64| {
            let latency = quantile(&self.latencies, part).map(|latency| latency.as_secs_f64() * 1e6);
            latency.map_or_else(String::new, |latency| format!("{latency:.0}"))
        };
        let duration = format!("{:.2} s", self.duration.as_secs_f64() / rounds as f64);
        let count = self.latencies.len().to_string();
        let [median, p99, longest] = [0.5, 0.99, 1.0].map(microseconds);
        vec![self.title.to_owned(), duration, count, median, p99, longest]
    }
}
