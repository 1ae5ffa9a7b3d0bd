//! The long pages: all about one event loop or one accept queue, and the help.

use ratatui::text::{Line, Span};

use super::{
    finding::{rate, total},
    graph::history,
    recent::{LoopWindow, Parts, parts},
    state::{KindRow, List, LoopRow, QueueRow, State},
    theme::Theme,
    verdict::{cause, loop_name},
};
use crate::{
    export::words::{self, due_to, named, percent, span},
    model::{
        busy::Cause,
        deferred::Deferred,
        frame::Look,
        histogram::Histogram,
        snapshot::{Listener, Reactor, Target},
    },
};

/// Rows of a history.
const HISTORY: usize = 6;

/// The latest stalls that are listed one by one.
const LATEST: usize = 16;

const HELP: &str = "
 Is it late, and whose fault is it? The first lines answer that for the last ten
 seconds.

 q, Ctrl-C      leave the view and print the report of the whole observation
 p, Space       stop the picture and let it go on; nothing is missed meanwhile
 s              sort by lateness, by load, by name
 /, f           filter by a part of a name, an address or a process id; Esc
                ends it
 Tab            go from event loops to accept queues, to deferred work, and
                back
 Up, Down       select (k and j as well, PageUp, PageDown, Home, End)
 Enter          all about what is selected: quantiles, causes, stalls with
                their stacks
 Esc            back
 ?              this page

 mean, p99, longest  the delay that something due at a random moment meets, be
                it a request or a timer, in the last ten seconds; `ever` is the
                longest since the start
 busy           the share of time in which the loop did not wait for events
 the bar        where busy time goes: on a CPU, waiting for one, or blocked: in
                a lock, files, the network, asleep, by page faults, in
                something else
 stalls         slices of the threshold or more, with the code that was seen in
                most looks at them; the percentage is the share of the mean lag
                that would be gone with that code mended
 oldest         how long the first of those that wait to be accepted has
                waited; p99 and longest are waits too
 depth          connections that wait now and how many may; | in the bar is the
                most that were seen
 DEFERRED WORK  kinds of work that was put off: pieces that have not started
                (pending) and how long the first of them has waited (oldest),
                how many start, how long they waited and ran; orphans were
                forgotten before they started. Timers wait on purpose, and many
                are cancelled: neither is a fault. Kinds that only the start
                tells are pending as work of any kind
";

pub(super) fn help() -> Vec<Line<'static>> {
    HELP.lines().skip(1).map(Line::raw).collect()
}

/// All about what is selected.
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
    text.unwrap_or_else(|| vec![Line::raw(" It is gone; Esc leads back.")])
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
    text.push(quantiles(&format!("late, last {:.0} s", window.seconds), &window.lag, theme));
    text.push(quantiles("late, ever", &reactor.lag, theme));
    text.push(quantiles("slices", &reactor.slice, theme));
    text.push(quantiles("wake-ups", &reactor.wakeup, theme));
    if let Some(age) = reactor.current_slice_seconds {
        text.push(Line::raw(format!(" in a slice for {}", span(age))));
    }
    text.extend(reactor.current_stack.iter().flat_map(look));
    text.push(Line::raw(""));
    text.extend(causes(window, reactor, theme));
    text.push(title("LAG, a second each", theme));
    text.extend(graph);
    text.push(Line::raw(""));
    text.push(title(&format!("STALLS{}", total(reactor)), theme));
    for (place, site) in reactor.stalls.sites.iter().enumerate() {
        let share = Span::styled(format!(" {} ", percent(site.lag_share)), theme.selected());
        let what =
            format!("of the lag: {} times, {} together, {}", site.count, span(site.seconds), cause(site));
        text.push(Line::from(vec![share, Span::raw(what)]));
        let requests = due_to(&reactor.stalls.requests_of(place));
        if !requests.is_empty() {
            text.push(Line::raw(format!("    {requests}")));
        }
        text.extend(look(&site.look));
    }
    if !reactor.stalls.recent.is_empty() {
        text.push(Line::raw(""));
        text.push(title("LATEST STALLS, newest first", theme));
    }
    for stall in reactor.stalls.recent.iter().rev().take(LATEST) {
        let call = stall.syscall.as_ref().map(|call| format!(" ({call})")).unwrap_or_default();
        let length = format!(" {}  {:>8}  {}{call}", stall.start, span(stall.seconds), named(stall.cause));
        let code = reactor.stalls.sites.get(stall.site).and_then(|site| site.look.frames.first());
        let code = code.map(|frame| format!(" in {frame}")).unwrap_or_default();
        let request = due_to(stall.origin.as_deref().as_slice());
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
    let full = if listener.limit > 0 && listener.depth >= listener.limit { " (FULL)" } else { "" };
    let row = |name: &str, text: String| Line::raw(format!(" {name:<18}{text}"));
    text.push(row(
        "queue",
        format!("{} of {} now{full}, {} at most", listener.depth, listener.limit, listener.peak),
    ));
    if let Some(age) = listener.oldest_seconds {
        let at_least = if listener.oldest_is_lower_bound { "at least " } else { "" };
        text.push(row("oldest", format!("has waited {at_least}{}", span(age))));
    }
    text.push(row(
        "now",
        format!(
            "{} arrive, {} are accepted (last {:.0} s)",
            rate(window.arrivals, window.seconds),
            rate(window.accepts, window.seconds),
            window.seconds
        ),
    ));
    text.push(row(
        "since the start",
        format!(
            "{} arrived, {} accepted, {} reset while they waited, {} dropped",
            listener.arrivals, listener.accepts, listener.aborted, listener.drops
        ),
    ));
    let overflows = listener.overflows.map_or_else(|| "unknown".into(), |count| count.to_string());
    text.push(row("by a full queue", format!("dropped: {overflows}")));
    text.push(row("handshakes", format!("{} not done", listener.half_open)));
    if listener.accepts_unknown_wait > 0 {
        text.push(row("unknown waits", format!("{} connections", listener.accepts_unknown_wait)));
    }
    text.push(Line::raw(""));
    text.push(quantile_heading(theme));
    text.push(quantiles(&format!("waits, last {:.0} s", window.seconds), &window.wait, theme));
    text.push(quantiles("waits, ever", &listener.wait, theme));
    text.push(Line::raw(""));
    text.push(title("WAITS, a second each", theme));
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
    let name = format!("Deferred work {} of {} ({})", kind.task, target.comm, target.pid);
    let mut text = about(&name, target, theme);
    let row = |name: &str, text: String| Line::raw(format!(" {name:<18}{text}"));
    text.push(row("pending", format!("{} have not started", kind.pending)));
    if let Some(age) = kind.oldest_seconds {
        text.push(row("oldest", format!("was put off {} ago", span(age))));
    }
    text.push(row(
        "now",
        format!(
            "{} put off, {} start (last {:.0} s)",
            rate(window.enqueued, window.seconds),
            rate(window.started, window.seconds),
            window.seconds
        ),
    ));
    text.push(row(
        "since the start",
        format!(
            "{} put off, {} started, {} ended, {} forgotten before they started",
            kind.enqueued, kind.started, kind.finished, kind.orphaned
        ),
    ));
    if !kind.is_kind_known {
        text.push(Line::raw(
            " Only the start of this work tells its kind: it is counted there. What is left here",
        ));
        text.push(Line::raw(" waits, timers included, or was forgotten, as timers are that are cancelled."));
    }
    text.push(Line::raw(""));
    text.push(quantile_heading(theme));
    text.push(plain_quantiles(&format!("waits, last {:.0} s", window.seconds), &window.wait));
    text.push(plain_quantiles("waits, ever", &kind.wait));
    text.push(plain_quantiles(&format!("runs, last {:.0} s", window.seconds), &window.run));
    text.push(plain_quantiles("runs, ever", &kind.run));
    text.push(Line::raw(""));
    text.push(title("WAITS, a second each", theme));
    text.extend(graph);
    text.push(Line::raw(""));
    text.push(title("PLACES that are watched for it, and how often they were come to and known", theme));
    for hook in &target.hooks {
        let counts = format!(" {:<9}{:>10}{:>10}", hook.verb, hook.hits, hook.matches);
        text.push(Line::raw(format!("{counts}  {}", hook.place)));
    }
    text
}

/// Whose it is.
fn about(name: &str, target: &Target, theme: Theme) -> Vec<Line<'static>> {
    let place = words::place(&target.place);
    vec![title(name, theme), Line::raw(format!(" {}{place}", target.exe)), Line::raw("")]
}

fn title(text: &str, theme: Theme) -> Line<'static> {
    Line::from(vec![Span::raw(" "), Span::styled(text.to_owned(), theme.heading())])
}

fn quantile_heading(theme: Theme) -> Line<'static> {
    let names = ["mean", "p50", "p90", "p99", "longest"].map(|name| format!("{name:>9}")).concat();
    Line::styled(format!(" {:<18}{names}{:>12}", "", "count"), theme.heading())
}

/// Quantiles of times that may be long on purpose.
fn plain_quantiles(name: &str, histogram: &Histogram) -> Line<'static> {
    Line::raw(quantiles(name, histogram, Theme { has_colours: false, has_blocks: false }).to_string())
}

fn quantiles(name: &str, histogram: &Histogram, theme: Theme) -> Line<'static> {
    let mut spans = vec![Span::raw(format!(" {name:<18}"))];
    let has_any = histogram.count() > 0;
    let figures =
        [Some(histogram.mean()), histogram.quantile(0.5), histogram.quantile(0.9), histogram.quantile(0.99)];
    for figure in figures.into_iter().chain([Some(histogram.max())]) {
        spans.push(match figure.filter(|_| has_any) {
            Some(seconds) => Span::styled(format!("{:>9}", span(seconds)), theme.delay(seconds)),
            None => Span::raw(format!("{:>9}", "-")),
        });
    }
    // A count of a lag is a millisecond, which says nothing to people beside slices and waits.
    let count = if name.starts_with("late") { String::new() } else { histogram.count().to_string() };
    spans.push(Span::raw(format!("{count:>12}")));
    Line::from(spans)
}

/// Each cause with its share of busy time, of late and ever.
fn causes(window: &LoopWindow, reactor: &Reactor, theme: Theme) -> Vec<Line<'static>> {
    const BAR: usize = 14;
    let ever = parts(&reactor.split_seconds);
    let share = |parts: &Parts, n: usize| parts[n] / parts.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let busy = |share: Option<f64>| share.map_or_else(|| "unknown".into(), percent);
    let recent = format!("busy {}, last {:.0} s", busy(window.utilization), window.seconds);
    let mut text = vec![Line::styled(
        format!(" {:<26}{recent:<26}busy {}, ever", "", busy(reactor.utilization)),
        theme.heading(),
    )];
    for (n, cause) in Cause::PARTS.into_iter().enumerate().filter(|(n, _)| ever[*n] > 0.0) {
        let (recent, ever) = (share(&window.parts, n), share(&ever, n));
        let bar = |share: f64| Span::raw(format!("{:<BAR$}", bar(share, BAR, theme)));
        let number = |share: f64| Span::raw(format!("{:>8}  ", percent(share)));
        let name = Span::raw(format!(" {:<24}", named(cause)));
        text.push(Line::from(vec![
            name,
            number(recent),
            bar(recent),
            Span::raw("  "),
            number(ever),
            bar(ever),
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
    theme.places().0.repeat((share * width as f64).round() as usize)
}

/// A stack, a function a line.
fn look(look: &Look) -> impl Iterator<Item = Line<'static>> {
    let frames = look.frames.iter().enumerate();
    let frames = frames.map(|(n, frame)| format!("     {} {frame}", if n == 0 { "in" } else { "by" }));
    let kernel = (!look.kernel.is_empty()).then(|| format!("     kernel: {}", look.kernel.join(" < ")));
    let missing = look.missing.as_ref().map(|why| format!("     not all is known: {why}"));
    frames.chain(kernel).chain(missing).map(Line::raw).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use ratatui::crossterm::event::KeyCode;

    use super::{super::testing, *};
    use crate::model::deferred::HookFigures;

    const PLAIN: Theme = Theme { has_colours: false, has_blocks: false };

    fn text(state: &State) -> String {
        of_selection(state, 80, PLAIN).iter().map(|line| line.to_string() + "\n").collect()
    }

    #[test]
    fn a_loop_is_told_with_its_causes_and_stacks() {
        let mut state = State::default();
        state.look(testing::snapshot(5.0, |reactor| testing::slept(reactor, 3)));
        let text = text(&state);
        for part in [
            "Event loop reactor (11) of app (10)",
            "/usr/bin/app",
            "late, last 5 s",
            "asleep                    80.0 %  ###########",
            "STALLS: 3 of 50.0 ms or more, 360 ms together",
            "     in sleep (app/db.py:12)",
            "     by handle (app/server.py:40)",
            "     kernel: do_nanosleep",
            "     for GET /job/7\n     in sleep",
            "LATEST STALLS",
            "asleep (clock_nanosleep) for GET /job/7 in sleep (app/db.py:12)",
        ] {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
        // What nothing was blocked in is left out.
        assert!(!text.contains("blocked by a lock"), "{text}");
    }

    #[test]
    fn a_kind_of_work_is_told_with_its_places() {
        let mut state = State::default();
        let mut snapshot = testing::snapshot(5.0, |_| {});
        let mut kind = testing::kind("mail", 50);
        (kind.pending, kind.oldest_seconds) = (3, Some(0.5));
        snapshot.targets[0].deferred = vec![kind];
        snapshot.targets[0].hooks = vec![HookFigures {
            profile: "generic".into(),
            verb: "restore",
            place: "task_run in libtask.so".into(),
            hits: 51,
            matches: 50,
        }];
        state.look(snapshot);
        state.press(KeyCode::BackTab.into());
        let text = text(&state);
        for part in [
            "Deferred work mail of app (10)",
            "3 have not started",
            "was put off 500 ms ago",
            "12.0/s put off, 10.0/s start (last 5 s)",
            "60 put off, 50 started, 50 ended, 10 forgotten before they started",
            "waits, last 5 s",
            "runs, ever",
            "restore          51        50  task_run in libtask.so",
        ] {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
        assert!(!text.contains("tells its kind"), "{text}");
    }

    #[test]
    fn a_queue_is_told_with_all_its_counts() {
        let mut state = State::default();
        state.look(testing::snapshot(5.0, |_| {}));
        state.press(KeyCode::Tab.into());
        let text = text(&state);
        for part in
            ["Listener 127.0.0.1:8080 of app (10)", "0 of 128 now, 9 at most", "20.0/s arrive", "unknown"]
        {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
    }
}
