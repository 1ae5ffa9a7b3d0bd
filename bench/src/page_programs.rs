//! The page with the costs of the eBPF programs.

use std::collections::BTreeSet;

use crate::goals;
use crate::machine::Hook;
use crate::page::Page;
use crate::programs::{Cost, Costs, Load, NAME_LENGTH, Pair, Results, truncated};
use crate::statistics::Spread;

const PROGRAMS: &str = "# eBPF programs

The kernel counts the runs and the run time of each program (`bpf_stats`). The run time excludes the cost of calling
the program, which is part of the results of [servers](servers.md). It includes the cost of counting, which empty
programs show under the first load. *Net* excludes the cost of counting: that of the same event, or the mean of all
measured events.

*Target*: observer observes the server under load, and wrk if it is the load generator. *Other processes*: the same
load, while observer observes an idle nginx. Both include events of the rest of the machine, and of both ends of each
connection. Programs that did not run are left out.
";

const BY_PROBE: &str = "## Probes

Net nanoseconds per connection or request: the number of events times the cost per event, summed over the programs of
a probe. Rows of *other processes* are the cost for processes that are not observed; *accept* is then the cost of
accepting a connection.
";

const SCRIPT: &str = "## bpftrace

`bench/src/slices.bt` measures slices and run-queue delay of an event loop, which is less than observer measures.
Under the first load, for all threads (*all threads*) and for an idle thread (*other processes*).
";

/// The headings of the two columns of observer.
const OBSERVED: [&str; 2] = ["target", "other processes"];

pub(crate) fn write(page: &mut Page, hooks: &[Hook], programs: &Results, rounds: usize, seconds: u64) {
    page.text(PROGRAMS);
    page.text(&format!("Medians of {rounds} rounds of {seconds} s for each load.\n"));
    page.empty(programs);
    for (load, pair) in &programs.observer {
        page.text(&format!("## {}\n", load.title()));
        page.costs(programs, &lines(hooks, pair), pair, OBSERVED, load.operation());
    }
    page.by_probe(programs, hooks);
    page.text(SCRIPT);
    let script = &programs.script;
    page.costs(
        programs,
        &lines(&[], script),
        script,
        ["all threads", OBSERVED[1]],
        Load::Connections.operation(),
    );
    record(page, hooks, programs);
}

impl Page {
    fn empty(&mut self, programs: &Results) {
        let rows =
            programs.empty.iter().map(|(name, cost)| vec![shown(name), format!("{:.0}", cost.nanoseconds)]);
        let mean = vec!["mean".to_owned(), format!("{:.0}", programs.mean_counting_cost())];
        self.table(&["empty program, by event", "ns per event"], rows.chain([mean]));
    }

    /// A row for each program that ran, and their sum.
    fn costs(&mut self, programs: &Results, lines: &[Line], pair: &Pair, who: [&str; 2], operation: &str) {
        let both = [&pair.target, &pair.other];
        let rows = lines.iter().map(|line| {
            let cells = both.map(|costs| match costs.get(line.name) {
                Some(cost) => {
                    let net = cost.nanoseconds - programs.counting_cost(line.event);
                    [rate(cost.events), format!("{:.0}", cost.nanoseconds), format!("{net:.0}")]
                }
                None => ["–"; 3].map(str::to_owned),
            });
            [line.title.clone()].into_iter().chain(cells.into_iter().flatten()).collect()
        });
        let sums = both.into_iter().zip(pair.totals).flat_map(|(costs, total)| {
            [String::new(), total.show(0, ""), format!("{:.0}", net(programs, lines.iter(), costs))]
        });
        let sum = [format!("all programs, per {operation}")].into_iter().chain(sums);
        let head =
            who.map(|who| [format!("{who}: events per {operation}"), "ns per event".into(), "net".into()]);
        let head: Vec<&str> =
            ["program"].into_iter().chain(head.iter().flatten().map(String::as_str)).collect();
        self.table(&head, rows.chain([sum.collect()]));
    }

    fn by_probe(&mut self, programs: &Results, hooks: &[Hook]) {
        let mut probes: Vec<&str> = hooks.iter().map(|hook| hook.probe.as_str()).collect();
        probes.dedup();
        let rows = programs.observer.iter().flat_map(|(load, pair)| {
            let lines = lines(hooks, pair);
            [(OBSERVED[0], &pair.target), (OBSERVED[1], &pair.other)].map(|(who, costs)| {
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
}

/// Records the goals and ratios. Goals are those of the first load, in which all events are those of the server and
/// of wrk.
fn record(page: &mut Page, hooks: &[Hook], programs: &Results) {
    let Some((_, pair)) = programs.observer.first() else { return };
    let lines = lines(hooks, pair);
    let cost = |costs: &Costs, name: &str| {
        let line = lines.iter().find(|line| line.name == name)?;
        Some(costs.get(name)?.spread.minus(programs.counting_cost(line.event)))
    };
    let wait = |costs: &Costs| Some(cost(costs, "epoll_enter")?.plus(cost(costs, "epoll_exit")?));
    let mut goal = |goal, value: Option<Spread>| page.goal(goal, value.unwrap_or(Spread::at(f64::NAN)));
    goal(&goals::TARGET_WAIT, wait(&pair.target));
    goal(&goals::OTHER_WAIT, wait(&pair.other));
    goal(&goals::OTHER_SWITCH, cost(&pair.other, "sched_switch"));
    let loops = net(programs, lines.iter().filter(|line| line.probe == "reactor"), &pair.target);
    let script = net(programs, self::lines(&[], &programs.script).iter(), &programs.script.target);
    goal(&goals::LOOPS_TO_BPFTRACE, Some(Spread::at(loops / script * 100.0)));
    for (load, pair) in &programs.observer {
        let [script, _] = programs.script.totals;
        for (who, total) in OBSERVED.iter().zip(pair.totals) {
            let title = format!("{}: all programs, {who}, relative to slices.bt on nginx", load.title());
            page.ratio(title, total.divided_by(script.median));
        }
    }
    for (who, costs) in [(OBSERVED[0], &pair.target), (OBSERVED[1], &pair.other)] {
        for line in &lines {
            if let (Some(ours), Some(theirs)) =
                (costs.get(line.name), programs.script.target.get(truncated(line.event)))
            {
                let title = format!("{}, {who}, relative to slices.bt on the same event", line.title);
                page.ratio(title, ours.spread.divided_by(theirs.nanoseconds));
            }
        }
    }
}

/// A program in a table.
struct Line<'a> {
    title: String,
    probe: &'a str,
    event: &'a str,
    /// The name as truncated by the kernel.
    name: &'a str,
}

/// The programs that ran: those of probes in the order of the probes, then other programs, whose names are those of
/// their events.
fn lines<'a>(hooks: &'a [Hook], pair: &'a Pair) -> Vec<Line<'a>> {
    let ran: BTreeSet<&str> = pair.target.keys().chain(pair.other.keys()).map(String::as_str).collect();
    let hooked: BTreeSet<&str> = hooks.iter().map(|hook| truncated(&hook.program)).collect();
    let others = ran.difference(&hooked);
    let others = others.map(|&name| Line { title: shown(name), probe: "", event: name, name });
    let hooks = hooks.iter().filter(|hook| ran.contains(truncated(&hook.program)));
    let hooks = hooks.map(|Hook { probe, program, event }| Line {
        title: program.clone(),
        probe,
        event,
        name: truncated(program),
    });
    hooks.chain(others).collect()
}

/// Nanoseconds of these programs per operation, without the cost of counting.
fn net<'a>(programs: &Results, lines: impl Iterator<Item = &'a Line<'a>>, costs: &Costs) -> f64 {
    let net =
        |line: &Line, cost: &Cost| cost.events * (cost.nanoseconds - programs.counting_cost(line.event));
    lines.filter_map(|line| Some(net(line, costs.get(line.name)?))).sum()
}

/// A name, with an ellipsis if the kernel may have truncated it.
fn shown(name: &str) -> String {
    if name.len() == NAME_LENGTH { format!("{name}…") } else { name.to_owned() }
}

fn rate(events: f64) -> String {
    if events < 0.001 { "< 0.001".to_owned() } else { format!("{events:.3}") }
}
