//! The cost of bcc's tools with a similar purpose, compared with observer under the same load; or the reason why a
//! tool does not run.

use std::path::Path;

use anyhow::{Context, Result};
use aya::sys::{Stats, enable_stats};

use crate::load::Wrk;
use crate::page::Page;
use crate::part::{Cpus, progress};
use crate::programs::{Cost, Costs, Round, costs, count, total};
use crate::servers::Server;
use crate::statistics::Spread;
use crate::tools::{EMPTY, Tool};

const TEXT: &str = "# Comparison with bcc's tools

Each tool runs alone under the same load: requests to nginx, each on a new TCP connection, as in
[programs](programs.md). Runs and run times of the programs are those that the kernel counts. *Net* excludes the cost
of counting, which is measured with empty programs. Names that end in `-bpfcc` are tools of bcc, which compile their
programs at the start; the others are from libbpf-tools.
";

const FAILED: &str = "## Tools that do not run on this kernel
";

/// The tools that measure some of what observer measures: the command line, in which PID stands for the id of nginx's
/// worker, and what the tool measures.
const TOOLS: &[(&[&str], &str)] = &[
    (&["runqlat", "60"], "run-queue delay of all threads"),
    (&["runqlat", "-p", "PID", "60"], "run-queue delay of the worker"),
    (&["cpudist", "-p", "PID", "60"], "on-CPU time of the worker between switches"),
    (&["offcputime", "-p", "PID", "60"], "blocked time of the worker, by stack"),
    (&["wakeuptime", "-p", "PID", "60"], "which threads wake the worker, and its blocked time until then"),
    (&["syscount", "-L", "-p", "PID", "-d", "60"], "system calls of the worker and their duration"),
    (&["tcpsynbl", "60"], "depth of accept queues at each new connection"),
    (&["solisten"], "calls to listen"),
    (&["tcptracer"], "connections that are opened, accepted and closed"),
    (&["tcpstates"], "state changes of connections, with durations"),
    (&["runqlat-bpfcc", "-p", "PID", "60"], "run-queue delay of the worker"),
    (&["offcputime-bpfcc", "-p", "PID", "60"], "blocked time of the worker, by stack"),
    (&["tcpaccept-bpfcc"], "accepted connections"),
];

/// Substrings of the line of a tool's output that has the reason of a failure, the most specific first.
const REASONS: [&str; 6] = ["kprobe", "kernel headers", "kheaders", "failed to", "Failed to", "rror"];

pub(crate) struct Bench<'a> {
    pub(crate) observer: &'a Path,
    pub(crate) cpus: Cpus,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
}

enum Outcome {
    /// The cost of each program, and the nanoseconds of all programs per connection, including the cost of counting.
    Ran(Costs, Spread),
    Failed(String),
}

impl Bench<'_> {
    pub(crate) fn run(&self, page: &mut Page) -> Result<()> {
        // The kernel counts until this descriptor is closed.
        let _counting =
            enable_stats(Stats::RunTime).context("the kernel cannot count run times of eBPF programs")?;
        page.text(TEXT);
        page.text(&format!("Medians of {} rounds of {} s for each tool.\n", self.rounds, self.seconds));

        let empty = self.rounds("empty programs", |_| Ok(Ok(Tool::bpftrace(EMPTY, 0)?)))?;
        let Outcome::Ran(empty, _) = empty else {
            unreachable!("a bpftrace that does not start is an error")
        };
        let events: f64 = empty.values().map(|cost| cost.events).sum();
        let counting = empty.values().map(|cost| cost.events * cost.nanoseconds).sum::<f64>() / events;

        let ours =
            self.rounds("observer", |server| Ok(Ok(Tool::observer(self.observer, &[server.pid()])?)))?;
        let mut rows = row("observer", "everything", &ours, counting).into_iter().collect::<Vec<_>>();
        let mut failed = Vec::new();
        for (words, measures) in TOOLS {
            let title = format!("`{}`", words.join(" "));
            let outcome = if which::which(words[0]).is_ok() {
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
                Outcome::Failed("not installed".to_owned())
            };
            match row(&title, measures, &outcome, counting) {
                Ok(row) => {
                    if let (Outcome::Ran(_, ours), Outcome::Ran(_, theirs)) = (&ours, &outcome) {
                        page.ratio(
                            format!("observer relative to {title}, per connection"),
                            ours.divided_by(theirs.median),
                        );
                    }
                    rows.push(row);
                }
                Err(reason) => failed.push(vec![title, (*measures).to_owned(), reason]),
            }
        }
        page.table(
            &[
                "tool",
                "measures",
                "programs: events per connection x net ns per event",
                "net ns per connection",
            ],
            rows,
        );
        page.text(FAILED);
        page.table(&["tool", "would measure", "error"], failed);
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
                Err(output) => return Ok(Outcome::Failed(reason(&output))),
            };
            rounds.push(count(&tool, || Ok(wrk.run()?.requests))?);
        }
        Ok(Outcome::Ran(costs(&rounds), total(&rounds)))
    }
}

/// A row of the table of tools, or the reason why the tool did not run.
fn row(
    title: &str,
    measures: &str,
    outcome: &Outcome,
    counting: f64,
) -> std::result::Result<Vec<String>, String> {
    let costs = match outcome {
        Outcome::Ran(costs, _) if costs.is_empty() => return Err("its programs never ran".to_owned()),
        Outcome::Ran(costs, _) => costs,
        Outcome::Failed(reason) => return Err(reason.clone()),
    };
    // Programs that run rarely do not run per connection.
    let often = costs.iter().filter(|(_, cost)| cost.events >= 0.01);
    let programs: Vec<String> = often
        .map(|(name, Cost { events, nanoseconds, .. })| {
            format!("{name} {events:.2} x {:.0}", nanoseconds - counting)
        })
        .collect();
    let net: f64 = costs.values().map(|cost| cost.events * (cost.nanoseconds - counting)).sum();
    Ok(vec![title.to_owned(), measures.to_owned(), programs.join(", "), format!("{net:.0}")])
}

/// The line of the output that describes best why a tool failed.
fn reason(output: &str) -> String {
    let lines = || output.lines().map(str::trim).filter(|line| !line.is_empty());
    let best = REASONS.iter().find_map(|reason| lines().find(|line| line.contains(reason)));
    best.or_else(|| lines().next_back()).unwrap_or("it ended without output").replace('|', "/")
}

#[cfg(test)]
mod tests {
    use super::reason;

    #[test]
    fn the_most_specific_line_is_the_reason() {
        let output = "Tracing\nfailed to attach BPF programs\nlibbpf: failed to create kprobe 'a+0x0'\n";
        assert_eq!(reason(output), "libbpf: failed to create kprobe 'a+0x0'");
        assert_eq!(reason("one\ntwo\n"), "two");
        assert_eq!(reason(""), "it ended without output");
    }
}
