//! How long observer takes to its first figure, and what a server's clients notice of its coming and going.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::goals;
use super::latency::{Client, Request};
use super::page::Page;
use super::part::{Cpus, progress};
use super::process::pause;
use super::servers::Server;
use super::statistics::{Spread, quantile};
use super::tools::{Observer, settle};

const FIRST: &str = "# Start and end

From the start of observer until a scrape has the first figure of the server, which has nothing to do meanwhile; asked for
without a pause. The median, with the quartiles in brackets.
";

const LATENCY: &str = "## What a target's clients notice

One client on a CPU of its own, with one request at a time on a connection that stays, a thousand a second, while observer
comes and goes. *Attaching* is from the start of observer until half a second after its first figure, which is when it
attaches to a runtime that it knows; *detaching* from the signal that ends it until it is gone. A request counts in every
window that it was under way in. The longest of all has in it what else happens on the machine, in all windows.
";

/// What is told beyond the first figure of a start.
const REST: Duration = Duration::from_millis(500);

const WINDOWS: [&str; 5] = ["before", "attaching", "observed", "detaching", "after"];

/// A part of a round, all rounds together.
struct Window {
    title: &'static str,
    latencies: Vec<Duration>,
    lasts: Duration,
}

pub(super) struct Bench<'a> {
    pub(super) observer: &'a Path,
    pub(super) cpus: Cpus,
    pub(super) starts: usize,
    pub(super) rounds: usize,
    pub(super) seconds: u64,
}

impl Bench<'_> {
    pub(super) fn run(&self, page: &mut Page) -> Result<()> {
        let cpu = self.cpus.server;
        let servers = [
            ("nginx", Server::nginx(cpu, false)?),
            ("Node.js", Server::node(cpu)?),
            ("asyncio", Server::asyncio(cpu)?),
            ("Ruby's async", Server::ruby(cpu)?),
        ];
        page.text(FIRST);
        page.text(&format!("Starts: {} for each.\n", self.starts));
        let mut rows = Vec::new();
        // The first of them.
        let mut on_nginx = None;
        for (name, server) in &servers {
            progress(&format!("starts on {name}"));
            let starts = self.starts(server)?;
            let first = Spread::of(starts.iter().copied());
            if let Some(nginx) = on_nginx {
                page.ratio(format!("first figure on {name}, to that on nginx"), first.part_of(nginx));
            } else {
                page.figure(&goals::FIRST_FIGURE, first);
                on_nginx = Some(first.median);
            }
            let longest = format!("{:.0} ms", starts.into_iter().fold(0.0, f64::max));
            rows.push(vec![(*name).to_owned(), first.show(0, "ms"), longest]);
        }
        page.table(&["server", "first figure after", "longest"], rows);

        page.text(LATENCY);
        let Self { rounds, seconds, .. } = self;
        page.text(&format!(
            "Rounds: {rounds}, with {seconds} s before, observed and after; of all rounds together; how long a window lasts is the mean.\n"
        ));
        for (name, server) in &servers {
            let mut windows = WINDOWS.map(Window::new);
            for round in 1..=self.rounds {
                progress(&format!("coming and going beside {name}, round {round} of {rounds}"));
                self.round(server, &mut windows)?;
            }
            let rows = windows.into_iter().map(|window| window.row(*rounds));
            page.table(&[name, "lasts", "requests", "median, us", "p99, us", "longest, us"], rows);
        }
        Ok(())
    }

    /// In milliseconds.
    fn starts(&self, server: &Server) -> Result<Vec<f64>> {
        let start =
            |_| Ok(Observer::start(self.observer, &[server.pid()], &[])?.tool.start.as_secs_f64() * 1e3);
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
        pause(REST);
        bound();
        pause(seconds);
        bound();
        drop(observer);
        bound();
        pause(seconds);
        bound();
        let requests = client.finish()?;
        for (window, bounds) in windows.iter_mut().zip(bounds.windows(2)) {
            let fall = requests.iter().filter(|request| is_within(request, bounds[0], bounds[1]));
            window.latencies.extend(fall.map(|(_, took)| *took));
            window.lasts += bounds[1] - bounds[0];
        }
        Ok(())
    }
}

/// A request that reaches into a window from before it is part of it as well: it is what holds up those that would begin.
fn is_within(&(begin, took): &Request, start: Instant, end: Instant) -> bool {
    begin < end && begin + took > start
}

impl Window {
    fn new(title: &'static str) -> Self {
        Self { title, latencies: Vec::new(), lasts: Duration::ZERO }
    }

    fn row(mut self, rounds: usize) -> Vec<String> {
        self.latencies.sort();
        let microseconds = |part: f64| {
            let latency = quantile(&self.latencies, part).map(|latency| latency.as_secs_f64() * 1e6);
            latency.map_or_else(String::new, |latency| format!("{latency:.0}"))
        };
        let lasts = format!("{:.2} s", self.lasts.as_secs_f64() / rounds as f64);
        let count = self.latencies.len().to_string();
        let [median, p99, longest] = [0.5, 0.99, 1.0].map(microseconds);
        vec![self.title.to_owned(), lasts, count, median, p99, longest]
    }
}
