//! The page of figures: text that says how they came about, and tables.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::Plan;
use super::machine::{Hook, Rows};
use super::programs::{self, Cost, Costs, Load, NAME_LENGTH, Pair, kept};
use super::statistics::{Spread, median};
use super::throughput::{self, Arm, Sample, ToolSample};

const HEAD: &str = "# What observer costs

Written by `cargo xtask bench`, which measures everything below anew; changes by hand are lost. One run on one machine:
figures of different runs or machines cannot be compared, those of one table can.
";

const PROGRAMS: &str = "## eBPF programs

The kernel counts how often each program runs and for how long (`bpf_stats`). Its count begins where a program begins:
what the kernel does to get there is not in it, but is in the figures of servers below. It includes what the counting
itself takes, which programs that do nothing show under the first load; *net* is without that, or without the mean of
all of them for events that are not among theirs.

*Target*: the server under load is observed, and wrk as well where that is the load, so that its waits are no stranger's.
*Stranger*: the same load, while observer observes an nginx that has nothing to do. Events of the rest of the machine are
in both, and so are both ends of each connection. Programs that did not run are left out.
";

const BY_PROBE: &str = "### Each probe, for each connection or request

Net nanoseconds: events times their cost, summed up over the programs of a probe. In a *stranger* row stands what
everybody pays while somebody else is observed; under *accept* there what is paid for accepting a connection.
";

const SCRIPT: &str = "### bpftrace

`xtask/src/bench/slices.bt` keeps the slices and the run-queue delay of an event loop, which is less than observer does.
Under the first load, for every thread (*all*) and for one that has nothing to do (*stranger*).
";

const SERVERS: &str = "## Servers

Rounds take turns: nothing beside the server, observer on it, observer on an nginx that has nothing to do, bpftrace with
the script above on the server's event loop. wrk has 32 connections that stay, redis-benchmark 50, each with one request
at a time. CPU time is the server's own (`utime` and `stime` of all its processes), which has in it what programs take in
its threads. *Change* compares with *nothing* in the same round. All figures are medians, with the quartiles in brackets.
";

const TOOLS: &str = "## observer and bpftrace themselves

In the same rounds, while the server is under load; nobody scrapes. *First figure* is what a tool takes from its start
until it answers with one, or is attached. Maps are memory in the kernel.
";

/// All of it.
pub(super) fn write(
    plan: &Plan,
    machine: &Rows,
    hooks: &[Hook],
    programs: &programs::Figures,
    servers: &[throughput::Figures],
) -> String {
    let mut page = Page::default();
    page.text(HEAD);
    page.table(&["", ""], machine.iter().map(|(name, value)| vec![(*name).to_owned(), value.clone()]));

    page.text(PROGRAMS);
    let Plan { program_rounds, program_seconds, server_rounds, server_seconds } = plan;
    page.text(&format!(
        "Rounds: {program_rounds} of {program_seconds} s for each load, of which the medians.\n"
    ));
    page.empty(programs);
    for (load, pair) in &programs.observer {
        page.text(&format!("### {}\n", load.title()));
        page.costs(programs, &lines(hooks, pair), pair, ["target", "stranger"], load.operation());
    }
    page.by_probe(programs, hooks);
    page.text(SCRIPT);
    let script = &programs.script;
    page.costs(programs, &lines(&[], script), script, ["all", "stranger"], Load::Connections.operation());

    page.text(SERVERS);
    page.text(&format!("Rounds: {server_rounds} of {server_seconds} s for each.\n"));
    servers.iter().for_each(|figures| page.server(figures));
    page.text(TOOLS);
    page.tools(servers);
    page.text.truncate(page.text.trim_end().len());
    page.text.push('\n');
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn text(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
    }

    fn table(&mut self, head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) {
        let mut row = |cells: &str| writeln!(self.text, "| {cells} |").expect("memory can be written to");
        row(&head.join(" | "));
        row(&vec!["---"; head.len()].join(" | "));
        rows.into_iter().for_each(|cells| row(&cells.join(" | ")));
        self.text.push('\n');
    }

    fn empty(&mut self, programs: &programs::Figures) {
        let rows =
            programs.empty.iter().map(|(name, cost)| vec![shown(name), format!("{:.0}", cost.nanoseconds)]);
        let mean = vec!["all of these events".to_owned(), format!("{:.0}", programs.measuring_any())];
        self.table(&["a program that does nothing, on", "ns an event"], rows.chain([mean]));
    }

    /// One row for each program that ran, and their sum.
    fn costs(
        &mut self,
        programs: &programs::Figures,
        lines: &[Line],
        pair: &Pair,
        who: [&str; 2],
        operation: &str,
    ) {
        let both = [&pair.target, &pair.stranger];
        let rows = lines.iter().map(|line| {
            let figures = both.map(|costs| match costs.get(line.name) {
                Some(cost) => {
                    let net = cost.nanoseconds - programs.measuring(line.event);
                    [rate(cost.events), format!("{:.0}", cost.nanoseconds), format!("{net:.0}")]
                }
                None => ["–"; 3].map(str::to_owned),
            });
            [line.title.clone()].into_iter().chain(figures.into_iter().flatten()).collect()
        });
        let sums = both.map(|costs| {
            let gross: f64 = costs.values().map(|cost| cost.events * cost.nanoseconds).sum();
            [String::new(), format!("{gross:.0}"), format!("{:.0}", net(programs, lines.iter(), costs))]
        });
        let sum = [format!("all, for each {operation}")].into_iter().chain(sums.into_iter().flatten());
        let head =
            who.map(|who| [format!("{who}: events a {operation}"), "ns an event".into(), "net".into()]);
        let head: Vec<&str> =
            ["program"].into_iter().chain(head.iter().flatten().map(String::as_str)).collect();
        self.table(&head, rows.chain([sum.collect()]));
    }

    fn by_probe(&mut self, programs: &programs::Figures, hooks: &[Hook]) {
        let mut probes: Vec<&str> = hooks.iter().map(|hook| hook.probe.as_str()).collect();
        probes.dedup();
        let rows = programs.observer.iter().flat_map(|(load, pair)| {
            let lines = lines(hooks, pair);
            [("target", &pair.target), ("stranger", &pair.stranger)].map(|(who, costs)| {
                let sums = probes.iter().map(|probe| {
                    let mut of_probe = lines.iter().filter(|line| line.probe == *probe).peekable();
                    let is_any = of_probe.peek().is_some();
                    if is_any { format!("{:.0}", net(programs, of_probe, costs)) } else { "–".to_owned() }
                });
                [format!("{}: {who}", load.title())].into_iter().chain(sums).collect()
            })
        });
        self.text(BY_PROBE);
        let head: Vec<&str> = ["load"].into_iter().chain(probes.iter().copied()).collect();
        self.table(&head, rows);
    }

    fn server(&mut self, figures: &throughput::Figures) {
        let nothing = figures.arms.iter().find(|(arm, _)| *arm == Arm::Nothing);
        let (_, nothing) = nothing.expect("each server is also measured with nothing beside it");
        let rows = figures.arms.iter().map(|(arm, samples)| {
            let change = |figure: fn(&Sample) -> f64| {
                let changes = samples.iter().zip(nothing).map(|(a, b)| (figure(a) / figure(b) - 1.0) * 100.0);
                if *arm == Arm::Nothing { String::new() } else { spread(changes, 1, "%") }
            };
            vec![
                arm.title().to_owned(),
                spread(samples.iter().map(|sample| sample.per_second), 0, ""),
                change(|sample| sample.per_second),
                spread(samples.iter().map(|sample| sample.cpu * 1e6), 2, ""),
                change(|sample| sample.cpu),
            ]
        });
        let beside = format!("beside {}", figures.server);
        self.table(&[&beside, "requests/s", "change", "CPU time a request, us", "change"], rows);
    }

    fn tools(&mut self, servers: &[throughput::Figures]) {
        let rows = servers.iter().flat_map(|figures| {
            figures.arms.iter().filter_map(|(arm, samples)| {
                let samples: Vec<&ToolSample> = samples.iter().filter_map(|s| s.tool.as_ref()).collect();
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

/// A program in a table.
struct Line<'a> {
    title: String,
    probe: &'a str,
    event: &'a str,
    /// As the kernel keeps it.
    name: &'a str,
}

/// The programs that ran: those of probes in their order, then others, which are named for their event.
fn lines<'a>(hooks: &'a [Hook], pair: &'a Pair) -> Vec<Line<'a>> {
    let ran: BTreeSet<&str> = pair.target.keys().chain(pair.stranger.keys()).map(String::as_str).collect();
    let hooked: BTreeSet<&str> = hooks.iter().map(|hook| kept(&hook.program)).collect();
    let others = ran.difference(&hooked);
    let others = others.map(|&name| Line { title: shown(name), probe: "", event: name, name });
    let hooks = hooks.iter().filter(|hook| ran.contains(kept(&hook.program)));
    let hooks = hooks.map(|Hook { probe, program, event }| Line {
        title: program.clone(),
        probe,
        event,
        name: kept(program),
    });
    hooks.chain(others).collect()
}

/// Nanoseconds of these programs for each operation, without what measuring takes.
fn net<'a>(programs: &programs::Figures, lines: impl Iterator<Item = &'a Line<'a>>, costs: &Costs) -> f64 {
    let net = |line: &Line, cost: &Cost| cost.events * (cost.nanoseconds - programs.measuring(line.event));
    lines.filter_map(|line| Some(net(line, costs.get(line.name)?))).sum()
}

/// A name that may have lost its end.
fn shown(name: &str) -> String {
    if name.len() == NAME_LENGTH { format!("{name}…") } else { name.to_owned() }
}

fn rate(events: f64) -> String {
    if events < 0.001 { "< 0.001".to_owned() } else { format!("{events:.3}") }
}

fn spread(figures: impl Iterator<Item = f64>, digits: usize, unit: &str) -> String {
    let Spread { low, median, high } = Spread::of(figures);
    let unit = if unit.is_empty() { String::new() } else { format!(" {unit}") };
    format!("{median:.digits$}{unit} ({low:.digits$} to {high:.digits$})")
}
