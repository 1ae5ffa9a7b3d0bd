//! bcc's tools of the same purpose beside observer, under one and the same load. Where one does not run, why not.

use std::path::Path;

use anyhow::{Context, Result};
use aya::sys::{Stats, enable_stats};

use super::load::Wrk;
use super::page::Page;
use super::part::{Cpus, progress};
use super::programs::{Cost, Costs, Round, costs, count, total};
use super::servers::Server;
use super::statistics::Spread;
use super::tools::{EMPTY, Tool};
use crate::shell::find;

const TEXT: &str = "# Beside bcc's tools

Each tool alone under the same load: requests to nginx on TCP connections of their own, as in [programs](programs.md), with
the kernel's count of runs and run times. *Net* is without what counting takes, which programs that do nothing show. Tools
of libbpf-tools have their name alone; those of bcc, which compile theirs when they start, end in `-bpfcc`.
";

const REFUSED: &str = "## What does not run on this kernel
";

/// What tells some of what observer does: its words, with PID for the worker's, and what it tells.
const TOOLS: &[(&[&str], &str)] = &[
    (&["runqlat", "60"], "run-queue delay of all threads"),
    (&["runqlat", "-p", "PID", "60"], "run-queue delay of the worker"),
    (&["cpudist", "-p", "PID", "60"], "time on a CPU at a stretch, of the worker"),
    (&["offcputime", "-p", "PID", "60"], "blocked time of the worker, by stack"),
    (&["wakeuptime", "-p", "PID", "60"], "who wakes the worker, after how long"),
    (&["syscount", "-L", "-p", "PID", "-d", "60"], "calls of the worker and their time"),
    (&["tcpsynbl", "60"], "length of accept queues as connections come"),
    (&["solisten"], "calls of listen"),
    (&["tcptracer"], "connections that begin, are accepted and end"),
    (&["tcpstates"], "changes of connections' states, with their time"),
    (&["runqlat-bpfcc", "-p", "PID", "60"], "run-queue delay of the worker"),
    (&["offcputime-bpfcc", "-p", "PID", "60"], "blocked time of the worker, by stack"),
    (&["tcpaccept-bpfcc"], "accepted connections"),
];

/// What says why, in what a tool prints.
const REASONS: [&str; 6] = ["kprobe", "kernel headers", "kheaders", "failed to", "Failed to", "rror"];

pub(super) struct Bench<'a> {
    pub(super) observer: &'a Path,
    pub(super) cpus: Cpus,
    pub(super) rounds: usize,
    pub(super) seconds: u64,
}

enum Outcome {
    /// What each program costs, and nanoseconds of all of them for each connection, with what measuring takes.
    Ran(Costs, Spread),
    Refused(String),
}

impl Bench<'_> {
    pub(super) fn run(&self, page: &mut Page) -> Result<()> {
        // The kernel counts while this is open and stops when we end, however we end.
        let _counting = enable_stats(Stats::RunTime).context("the kernel does not count run times")?;
        page.text(TEXT);
        page.text(&format!("Rounds: {} of {} s each, of which the medians.\n", self.rounds, self.seconds));

        let empty = self.rounds("programs that do nothing", |_| Ok(Ok(Tool::bpftrace(EMPTY, 0)?)))?;
        let Outcome::Ran(empty, _) = empty else { unreachable!("bpftrace that does not start is an error") };
        let events: f64 = empty.values().map(|cost| cost.events).sum();
        let measuring = empty.values().map(|cost| cost.events * cost.nanoseconds).sum::<f64>() / events;

        let ours =
            self.rounds("observer", |server| Ok(Ok(Tool::observer(self.observer, &[server.pid()])?)))?;
        let mut rows = row("observer", "all of it", &ours, measuring).into_iter().collect::<Vec<_>>();
        let mut refused = Vec::new();
        for (words, tells) in TOOLS {
            let title = format!("`{}`", words.join(" "));
            let outcome = if find(words[0]).is_some() {
                self.rounds(words[0], |server| {
                    let pid = server.event_loop().to_string();
                    Tool::other(
                        &words
                            .iter()
                            .map(|&word| if word == "PID" { &pid } else { word })
                            .collect::<Vec<_>>(),
                    )
                })?
            } else {
                Outcome::Refused("not installed".to_owned())
            };
            match row(&title, tells, &outcome, measuring) {
                Ok(row) => {
                    if let (Outcome::Ran(_, ours), Outcome::Ran(_, theirs)) = (&ours, &outcome) {
                        page.ratio(format!("observer to {title}, a connection"), ours.part_of(theirs.median));
                    }
                    rows.push(row);
                }
                Err(reason) => refused.push(vec![title, (*tells).to_owned(), reason]),
            }
        }
        page.table(
            &["tool", "tells", "programs: events a connection, net ns each", "net ns a connection"],
            rows,
        );
        page.text(REFUSED);
        page.table(&["tool", "would tell", "what stops it"], refused);
        Ok(())
    }

    fn rounds(
        &self,
        name: &str,
        start: impl Fn(&Server) -> Result<std::result::Result<Tool, String>>,
    ) -> Result<Outcome> {
        let Cpus { server: cpu, load: load_cpu } = self.cpus;
        let mut rounds: Vec<Round> = Vec::new();
        for round in 1..=self.rounds {
            progress(&format!("{name}, round {round} of {}", self.rounds));
            let server = Server::nginx(cpu, false)?;
            let wrk = Wrk::prepare(load_cpu, server.port, self.seconds, false)?;
            let tool = match start(&server)? {
                Ok(tool) => tool,
                Err(said) => return Ok(Outcome::Refused(reason(&said))),
            };
            rounds.push(count(&tool, || Ok(wrk.run()?.requests))?);
        }
        Ok(Outcome::Ran(costs(&rounds), total(&rounds)))
    }
}

/// A row of the table of those that ran, or why this did not.
fn row(
    title: &str,
    tells: &str,
    outcome: &Outcome,
    measuring: f64,
) -> std::result::Result<Vec<String>, String> {
    let costs = match outcome {
        Outcome::Ran(costs, _) if costs.is_empty() => return Err("its programs never ran".to_owned()),
        Outcome::Ran(costs, _) => costs,
        Outcome::Refused(reason) => return Err(reason.clone()),
    };
    // What runs once in a while has no cost for each connection.
    let often = costs.iter().filter(|(_, cost)| cost.events >= 0.01);
    let programs: Vec<String> = often
        .map(|(name, Cost { events, nanoseconds, .. })| {
            format!("{name} {events:.2} x {:.0}", nanoseconds - measuring)
        })
        .collect();
    let net: f64 = costs.values().map(|cost| cost.events * (cost.nanoseconds - measuring)).sum();
    Ok(vec![title.to_owned(), tells.to_owned(), programs.join(", "), format!("{net:.0}")])
}

/// The line that tells most of why a tool gave up.
fn reason(said: &str) -> String {
    let lines = || said.lines().map(str::trim).filter(|line| !line.is_empty());
    let telling = REASONS.iter().find_map(|reason| lines().find(|line| line.contains(reason)));
    telling.or_else(|| lines().next_back()).unwrap_or("it ended without a word").replace('|', "/")
}

#[cfg(test)]
mod tests {
    use super::reason;

    #[test]
    fn the_line_that_tells_most_is_the_reason() {
        let said = "Tracing\nfailed to attach BPF programs\nlibbpf: failed to create kprobe 'a+0x0'\n";
        assert_eq!(reason(said), "libbpf: failed to create kprobe 'a+0x0'");
        assert_eq!(reason("one\ntwo\n"), "two");
        assert_eq!(reason(""), "it ended without a word");
    }
}
