//! The page of what eBPF programs cost.

use std::collections::BTreeSet;

use super::goals;
use super::machine::Hook;
use super::page::Page;
use super::programs::{Cost, Costs, Figures, Load, NAME_LENGTH, Pair, kept};
use super::statistics::Spread;

const PROGRAMS: &str = "# eBPF programs

The kernel counts how often each program runs and for how long (`bpf_stats`). Its count begins where a program begins:
what the kernel does to get there is not in it, but is in the figures of [servers](servers.md). It includes what counting
itself takes, which programs that do nothing show under the first load; *net* is without that, or without the mean of
all of them for events that are not among theirs.

*Target*: the server under load is observed, and wrk as well where that is the load, so that its waits are no stranger's.
*Stranger*: the same load, while observer observes an nginx that has nothing to do. Events of the rest of the machine are
in both, and so are both ends of each connection. Programs that did not run are left out.
";

const BY_PROBE: &str = "## Each probe, for each connection or request

Net nanoseconds: events times their cost, summed up over the programs of a probe. In a *stranger* row stands what
everybody pays while somebody else is observed; under *accept* there what is paid for accepting a connection.
";

const SCRIPT: &str = "## bpftrace

`xtask/src/bench/slices.bt` keeps the slices and the run-queue delay of an event loop, which is less than observer does.
Under the first load, for every thread (*all*) and for one that has nothing to do (*stranger*).
";

pub(super) fn write(page: &mut Page, hooks: &[Hook], programs: &Figures, rounds: usize, seconds: u64) {
    page.text(PROGRAMS);
    page.text(&format!("Rounds: {rounds} of {seconds} s for each load, of which the medians.\n"));
    page.empty(programs);
    for (load, pair) in &programs.observer {
        page.text(&format!("## {}\n", load.title()));
        page.costs(programs, &lines(hooks, pair), pair, ["target", "stranger"], load.operation());
    }
    page.by_probe(programs, hooks);
    page.text(SCRIPT);
    let script = &programs.script;
    page.costs(programs, &lines(&[], script), script, ["all", "stranger"], Load::Connections.operation());
    note(page, hooks, programs);
}

impl Page {
    fn empty(&mut self, programs: &Figures) {
        let rows =
            programs.empty.iter().map(|(name, cost)| vec![shown(name), format!("{:.0}", cost.nanoseconds)]);
        let mean = vec!["all of these events".to_owned(), format!("{:.0}", programs.measuring_any())];
        self.table(&["a program that does nothing, on", "ns an event"], rows.chain([mean]));
    }

    /// One row for each program that ran, and their sum.
    fn costs(&mut self, programs: &Figures, lines: &[Line], pair: &Pair, who: [&str; 2], operation: &str) {
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
        let sums = both.into_iter().zip(pair.totals).flat_map(|(costs, total)| {
            [String::new(), total.show(0, ""), format!("{:.0}", net(programs, lines.iter(), costs))]
        });
        let sum = [format!("all, for each {operation}")].into_iter().chain(sums);
        let head =
            who.map(|who| [format!("{who}: events a {operation}"), "ns an event".into(), "net".into()]);
        let head: Vec<&str> =
            ["program"].into_iter().chain(head.iter().flatten().map(String::as_str)).collect();
        self.table(&head, rows.chain([sum.collect()]));
    }

    fn by_probe(&mut self, programs: &Figures, hooks: &[Hook]) {
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
}

/// The figures that there are goals for: of the first load, where every event is one of the server's or of wrk's.
fn note(page: &mut Page, hooks: &[Hook], programs: &Figures) {
    let Some((_, pair)) = programs.observer.first() else { return };
    let lines = lines(hooks, pair);
    let cost = |costs: &Costs, name: &str| {
        let line = lines.iter().find(|line| line.name == name)?;
        Some(costs.get(name)?.spread.beyond(programs.measuring(line.event)))
    };
    let wait = |costs: &Costs| Some(cost(costs, "epoll_enter")?.and(cost(costs, "epoll_exit")?));
    let mut figure = |goal, figure: Option<Spread>| page.figure(goal, figure.unwrap_or(Spread::at(f64::NAN)));
    figure(&goals::TARGET_WAIT, wait(&pair.target));
    figure(&goals::STRANGER_WAIT, wait(&pair.stranger));
    figure(&goals::STRANGER_SWITCH, cost(&pair.stranger, "sched_switch"));
    let loops = net(programs, lines.iter().filter(|line| line.probe == "reactor"), &pair.target);
    let script = net(programs, self::lines(&[], &programs.script).iter(), &programs.script.target);
    figure(&goals::LOOPS_TO_BPFTRACE, Some(Spread::at(loops / script * 100.0)));
    for (load, pair) in &programs.observer {
        let [script, _] = programs.script.totals;
        for (who, total) in ["target", "stranger"].iter().zip(pair.totals) {
            let title = format!("{}: all programs, {who}, to bpftrace's for slices of nginx", load.title());
            page.ratio(title, total.part_of(script.median));
        }
    }
    for (who, costs) in [("target", &pair.target), ("stranger", &pair.stranger)] {
        for line in &lines {
            if let (Some(ours), Some(theirs)) =
                (costs.get(line.name), programs.script.target.get(kept(line.event)))
            {
                let title = format!("{}, {who}, to bpftrace's on that event", line.title);
                page.ratio(title, ours.spread.part_of(theirs.nanoseconds));
            }
        }
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
fn net<'a>(programs: &Figures, lines: impl Iterator<Item = &'a Line<'a>>, costs: &Costs) -> f64 {
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
