//! The pages with details of one event loop, accept queue or kind of deferred tasks, and the help.

use ratatui::text::{Line, Span};

use super::{
    finding::{rate, site_total, stall_total},
    graph::history,
    recent::{LoopWindow, Parts, parts},
    state::{KindRow, List, LoopRow, QueueRow, State},
    theme::Theme,
    verdict::loop_name,
};
use crate::{
    export::words::{self, cause_name, for_requests, oldest, percent, span},
    model::{
        busy::Cause,
        deferred::Deferred,
        frame::StackSample,
        histogram::Histogram,
        snapshot::{Listener, Reactor, Target},
    },
};

/// Height of a history, in rows.
const HISTORY: usize = 6;

/// Maximum number of the latest stalls that are listed.
const LATEST: usize = 16;

const HELP: &str = "
 The first lines answer for the last ten seconds: is the server late, and whose
 fault is it?

 q, Ctrl-C      quit and print the report of the whole observation
 p, Space       pause or resume the view; observation continues
 s              sort by lag, by load or by name
 /, f           filter by part of a name, an address or a process id; Esc clears
                the filter
 Tab            next list: event loops, accept queues, deferred tasks
 Up, Down       select a row (also k, j, PageUp, PageDown, Home, End)
 Enter          details of the selected row: quantiles, causes, stalls, stacks
 Esc            go back
 ?              this page

 EVENT LOOPS    mean, p99 and max of the lag: the delay that an event arriving
                at a random moment would see; max ever: since the start
 busy           share of the time in which the loop did not wait for events
 busy time      by cause: on a CPU, waiting for a CPU, or blocked by a lock,
                file I/O, the network, page faults or something else, or asleep
 STALLS         slices of the threshold or longer, with the stack that was seen
                most often. Fixing that code removes its share of the mean lag
 ACCEPT QUEUES  connections that wait to be accepted
 oldest         how long the first connection in the queue has waited
 p99, max wait  from the end of the handshake until accept returns
 depth          connections in the queue, and its limit; | in the bar marks the
                peak
 DEFERRED TASKS coroutines, timers and jobs that handlers enqueue to run later,
                by kind
 pending        tasks that have not started; oldest: how long the first of
                them has waited
 started        tasks per second; wait: from enqueue to start; run: from start
                to finish
 dropped        tasks that were discarded before they started. Timers wait on
                purpose and are often cancelled: neither is a fault. Tasks whose
                kind is known only at their start have one row until then
";

pub(super) fn help() -> Vec<Line<'static>> {
    HELP.lines().skip(1).map(Line::raw).collect()
}

/// The details of the selected row.
pub(super) fn of_selection(state: &State, width: usize, theme: Theme) -> Vec<Line<'static>> {
    let text = match state.list {
        List::Loops => state.loops().nth(state.selected_loop()).map(|(row, target, reactor)| {
            let graph = history(state.history_of_loop((target.pid, reactor.tid)), width, HISTORY, theme);
            of_loop(row, target, reactor, graph, theme)
        }),
        List::Queues => state.queues().nth(state.selected_queue()).map(|(row, target, listener)| {
            let key = (target.pid, listener.name());
            let graph = history(state.history_of_queue(&key), width, HISTORY, theme);
            of_queue(row, target, listener, graph, theme)
        }),
        List::Kinds => state.kinds().nth(state.selected_kind()).map(|(row, target, kind)| {
            let key = (target.pid, kind.task.clone());
            let graph = history(state.history_of_kind(&key), width, HISTORY, theme);
            of_kind(row, target, kind, graph, theme)
        }),
    };
    text.unwrap_or_else(|| vec![Line::raw(" This row no longer exists; Esc goes back.")])
}

fn of_loop(
    row: &LoopRow,
    target: &Target,
    reactor: &Reactor,
    graph: Vec<Line<'static>>,
    theme: Theme,
) -> Vec<Line<'static>> {
    let window = &row.window;
    let mut text = about(&format!("Event loop {}", loop_name(target, reactor)), target, theme);
    text.push(quantile_heading(theme));
    text.push(quantiles(&format!("lag, last {:.0} s", window.seconds), &window.lag, theme));
    text.push(quantiles("lag, since start", &reactor.lag, theme));
    text.push(quantiles("slices", &reactor.slice, theme));
    text.push(quantiles("delays", &reactor.event_delay, theme));
    text.push(quantiles("wake-ups", &reactor.wakeup, theme));
    if let Some(age) = reactor.current_slice_seconds {
        text.push(Line::raw(format!(" the current slice has lasted {} so far", span(age))));
    }
    text.extend(reactor.current_stack.iter().flat_map(stack_lines));
    text.push(Line::raw(""));
    text.extend(causes(window, reactor, theme));
    text.push(title("LAG, 1 s per column", theme));
    text.extend(graph);
    text.push(Line::raw(""));
    text.push(title(&format!("STALLS{}", stall_total(reactor)), theme));
    for (place, site) in reactor.stalls.sites.iter().enumerate() {
        let share = Span::styled(format!(" {} ", percent(site.lag_share)), theme.selected());
        text.push(Line::from(vec![share, Span::raw(site_total(site))]));
        let requests = for_requests(&reactor.stalls.requests_of(place));
        if !requests.is_empty() {
            text.push(Line::raw(format!("    {requests}")));
        }
        text.extend(stack_lines(&site.sample));
    }
    if !reactor.stalls.recent.is_empty() {
        text.push(Line::raw(""));
        text.push(title("LATEST STALLS, newest first", theme));
    }
    for stall in reactor.stalls.recent.iter().rev().take(LATEST) {
        let call = stall.syscall.as_ref().map(|call| format!(" ({call})")).unwrap_or_default();
        let length =
            format!(" {}  {:>8}  {}{call}", stall.start, span(stall.seconds), cause_name(stall.cause));
        let code = reactor.stalls.sites.get(stall.site).and_then(|site| site.sample.frames.first());
        let code = code.map(|frame| format!(" in {frame}")).unwrap_or_default();
        let request = for_requests(stall.origin.as_deref().as_slice());
        text.push(Line::raw(length + &request + &code));
    }
    text
}

fn of_queue(
    row: &QueueRow,
    target: &Target,
    listener: &Listener,
    graph: Vec<Line<'static>>,
    theme: Theme,
) -> Vec<Line<'static>> {
    let window = &row.window;
    let mut text =
        about(&format!("Listener {} of {} ({})", listener.name(), target.comm, target.pid), target, theme);
    let row = |name: &str, text: String| Line::raw(format!(" {name:<18}{text}"));
    text.push(row("queue", words::queue(listener)));
    if listener.oldest_seconds.is_some() {
        text.push(row("oldest", format!("has waited {}", oldest(listener))));
    }
    text.push(row(
        &format!("last {:.0} s", window.seconds),
        format!(
            "{} arrived, {} accepted",
            rate(window.arrivals, window.seconds),
            rate(window.accepts, window.seconds)
        ),
    ));
    text.push(row(
        "since start",
        format!(
            "{} arrived, {} accepted, {} reset while they waited, {} dropped",
            listener.arrivals, listener.accepts, listener.aborted, listener.drops
        ),
    ));
    let overflows = listener.overflows.map(|count| format!("{count} dropped because the queue was full"));
    text.push(row("overflows", overflows.unwrap_or_else(|| "unknown".into())));
    text.push(row("handshakes", format!("{} in progress", listener.half_open)));
    if listener.accepts_unknown_wait > 0 {
        text.push(row("unknown waits", format!("{} connections", listener.accepts_unknown_wait)));
    }
    text.push(Line::raw(""));
    text.push(quantile_heading(theme));
    text.push(quantiles(&format!("waits, last {:.0} s", window.seconds), &window.wait, theme));
    text.push(quantiles("waits, since start", &listener.wait, theme));
    text.push(Line::raw(""));
    text.push(title("WAITS, 1 s per column", theme));
    text.extend(graph);
    text
}

fn of_kind(
    row: &KindRow,
    target: &Target,
    kind: &Deferred,
    graph: Vec<Line<'static>>,
    theme: Theme,
) -> Vec<Line<'static>> {
    let window = &row.window;
    let name = format!("Deferred tasks {} of {} ({})", kind.task, target.comm, target.pid);
    let mut text = about(&name, target, theme);
    let row = |name: &str, text: String| Line::raw(format!(" {name:<18}{text}"));
    text.push(row("pending", format!("{} have not started", kind.pending)));
    if let Some(age) = kind.oldest_seconds {
        text.push(row("oldest", format!("was enqueued {} ago", span(age))));
    }
    text.push(row(
        &format!("last {:.0} s", window.seconds),
        format!(
            "{} enqueued, {} started",
            rate(window.enqueued, window.seconds),
            rate(window.started, window.seconds)
        ),
    ));
    text.push(row(
        "since start",
        format!(
            "{} enqueued, {} started, {} finished, {} dropped before they started",
            kind.enqueued, kind.started, kind.finished, kind.orphaned
        ),
    ));
    if !kind.is_kind_known {
        text.push(Line::raw(
            " The kind of these tasks is known only at their start; started tasks are counted",
        ));
        text.push(Line::raw(
            " under their kind. The others are pending (timers as well) or were dropped (most",
        ));
        text.push(Line::raw(" of them cancelled timers)."));
    }
    text.push(Line::raw(""));
    text.push(quantile_heading(theme));
    text.push(plain_quantiles(&format!("waits, last {:.0} s", window.seconds), &window.wait));
    text.push(plain_quantiles("waits, since start", &kind.wait));
    text.push(plain_quantiles(&format!("runs, last {:.0} s", window.seconds), &window.run));
    text.push(plain_quantiles("runs, since start", &kind.run));
    text.push(Line::raw(""));
    text.push(title("WAITS, 1 s per column", theme));
    text.extend(graph);
    text.push(Line::raw(""));
    text.push(title("HOOKS of the process", theme));
    let hook_line = |verb: &str, hits: &str, matches: &str, place: &str| {
        format!(" {verb:<9}{hits:>10}{matches:>10}  {place}")
    };
    text.push(Line::styled(hook_line("verb", "hits", "matches", "function"), theme.heading()));
    for hook in &target.hooks {
        let (hits, matches) = (hook.hits.to_string(), hook.matches.to_string());
        text.push(Line::raw(hook_line(hook.verb, &hits, &matches, &hook.place)));
    }
    text
}

/// The heading of a page, with the executable and the container, pod or unit of the process.
fn about(name: &str, target: &Target, theme: Theme) -> Vec<Line<'static>> {
    let place = words::workload(&target.workload);
    vec![title(name, theme), Line::raw(format!(" {}{place}", target.exe)), Line::raw("")]
}

fn title(text: &str, theme: Theme) -> Line<'static> {
    Line::from(vec![Span::raw(" "), Span::styled(text.to_owned(), theme.heading())])
}

fn quantile_heading(theme: Theme) -> Line<'static> {
    let names = ["mean", "p50", "p90", "p99", "max"].map(|name| format!("{name:>9}")).concat();
    Line::styled(format!(" {:<18}{names}{:>12}", "", "count"), theme.heading())
}

/// A line of [`quantiles`] of times that may be long on purpose, so without highlights.
fn plain_quantiles(name: &str, histogram: &Histogram) -> Line<'static> {
    Line::raw(quantiles(name, histogram, Theme { has_colours: false, has_blocks: false }).to_string())
}

/// A line of a table: mean, quantiles, maximum and count of a histogram.
fn quantiles(name: &str, histogram: &Histogram, theme: Theme) -> Line<'static> {
    let mut spans = vec![Span::raw(format!(" {name:<18}"))];
    let has_any = histogram.count() > 0;
    let values =
        [Some(histogram.mean()), histogram.quantile(0.5), histogram.quantile(0.9), histogram.quantile(0.99)];
    for value in values.into_iter().chain([Some(histogram.max())]) {
        spans.push(match value.filter(|_| has_any) {
            Some(seconds) => Span::styled(format!("{:>9}", span(seconds)), theme.delay(seconds)),
            None => Span::raw(format!("{:>9}", "-")),
        });
    }
    // The count of a lag is in milliseconds, and would be mistaken for a number of events.
    let count = if name.starts_with("lag") { String::new() } else { histogram.count().to_string() };
    spans.push(Span::raw(format!("{count:>12}")));
    Line::from(spans)
}

/// The causes with their shares of busy time, in the window and since the start.
fn causes(window: &LoopWindow, reactor: &Reactor, theme: Theme) -> Vec<Line<'static>> {
    const BAR: usize = 14;
    let total = parts(&reactor.split_seconds);
    let share = |parts: &Parts, n: usize| parts[n] / parts.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let busy = |share: Option<f64>| share.map_or_else(|| "unknown".into(), percent);
    let recent = format!("busy {}, last {:.0} s", busy(window.utilization), window.seconds);
    let mut text = vec![Line::styled(
        format!(" {:<26}{recent:<26}busy {}, since start", "", busy(reactor.utilization)),
        theme.heading(),
    )];
    for (n, cause) in Cause::PARTS.into_iter().enumerate().filter(|(n, _)| total[*n] > 0.0) {
        let (recent, total) = (share(&window.parts, n), share(&total, n));
        let bar = |share: f64| Span::raw(format!("{:<BAR$}", bar(share, BAR, theme)));
        let number = |share: f64| Span::raw(format!("{:>8}  ", percent(share)));
        let name = Span::raw(format!(" {:<24}", cause_name(cause)));
        text.push(Line::from(vec![
            name,
            number(recent),
            bar(recent),
            Span::raw("  "),
            number(total),
            bar(total),
        ]));
    }
    text.push(Line::raw(""));
    text
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a share of a few cells"
)]
fn bar(share: f64, width: usize, theme: Theme) -> String {
    theme.bar_cells().0.repeat((share * width as f64).round() as usize)
}

/// A stack, one function a line.
fn stack_lines(sample: &StackSample) -> impl Iterator<Item = Line<'static>> {
    let frames = sample.frames.iter().enumerate();
    let frames = frames.map(|(n, frame)| format!("     {} {frame}", if n == 0 { "in" } else { "by" }));
    let kernel = (!sample.kernel.is_empty()).then(|| format!("     kernel: {}", sample.kernel.join(" < ")));
    let missing = words::missing_stack(sample).map(|reason| format!("     {reason}"));
    frames.chain(kernel).chain(missing).map(Line::raw).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use ratatui::crossterm::event::KeyCode;

    use super::{super::testing, *};
    use crate::model::deferred::HookCounters;

    const PLAIN: Theme = Theme { has_colours: false, has_blocks: false };

    fn text_of(state: &State) -> String {
        of_selection(state, 80, PLAIN).iter().map(|line| line.to_string() + "\n").collect()
    }

    #[test]
    fn a_loop_has_its_causes_and_stacks() {
        let mut state = State::default();
        state.update(testing::snapshot(5.0, |reactor| testing::slept(reactor, 3)));
        let text = text_of(&state);
        for part in [
            "Event loop reactor (11) of app (10)",
            "/usr/bin/app",
            "lag, last 5 s",
            "asleep                    80.0 %  ###########",
            "STALLS: 3 of 50.0 ms or longer, 360 ms in total",
            "     in sleep (app/db.py:12)",
            "     by handle (app/server.py:40)",
            "     kernel: do_nanosleep",
            "     for GET /job/7\n     in sleep",
            "LATEST STALLS",
            "asleep (clock_nanosleep) for GET /job/7 in sleep (app/db.py:12)",
        ] {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
        // Causes without time are left out.
        assert!(!text.contains("blocked by a lock"), "{text}");
    }

    #[test]
    fn a_kind_of_tasks_has_its_hooks() {
        let mut state = State::default();
        let mut snapshot = testing::snapshot(5.0, |_| {});
        let mut kind = testing::kind("mail", 50);
        (kind.pending, kind.oldest_seconds) = (3, Some(0.5));
        snapshot.targets[0].deferred = vec![kind];
        snapshot.targets[0].hooks = vec![HookCounters {
            profile: "generic".into(),
            verb: "restore",
            place: "task_run in libtask.so".into(),
            hits: 51,
            matches: 50,
        }];
        state.update(snapshot.clone());
        state.press(KeyCode::BackTab.into());
        let text = text_of(&state);
        for part in [
            "Deferred tasks mail of app (10)",
            "3 have not started",
            "was enqueued 500 ms ago",
            " last 5 s          12.0/s enqueued, 10.0/s started",
            "60 enqueued, 50 started, 50 finished, 10 dropped before they started",
            "waits, last 5 s",
            "runs, since start",
            "verb           hits   matches  function",
            "restore          51        50  task_run in libtask.so",
        ] {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
        let has_note = |state: &State| text_of(state).contains("known only at their start");
        assert!(!has_note(&state), "{text}");
        snapshot.targets[0].deferred[0].is_kind_known = false;
        state.update(snapshot);
        assert!(has_note(&state), "{}", text_of(&state));
    }

    #[test]
    fn a_queue_has_all_its_counts() {
        let mut state = State::default();
        state.update(testing::snapshot(5.0, |_| {}));
        state.press(KeyCode::Tab.into());
        let text = text_of(&state);
        for part in
            ["Listener 127.0.0.1:8080 of app (10)", "depth 0, limit 128, peak 9", "20.0/s arrived", "unknown"]
        {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
    }
}
