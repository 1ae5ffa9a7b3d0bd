//! Draws the screen. The overview has the verdict, the lists, and the history and stalls of the selected row.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    text::{Line, Span},
    widgets::Paragraph,
};

use super::{
    details,
    finding::{Finding, Verdict, site_total, stall_total},
    graph::history,
    state::{List, Page, State},
    tables::{WIDE, draw_kinds, draw_loops, draw_queues},
    theme::Theme,
    verdict::{findings, not_late},
};
use crate::{
    export::words::{for_requests, percent, stack},
    model::{
        snapshot::{Reactor, Snapshot},
        stall::Stalls,
    },
    sanitize::is_shown,
};

/// The smallest width and height in which the view can be shown.
const MIN_SIZE: (u16, u16) = (50, 12);

const KEYS: &str = "q quit  p pause  s sort  / filter  Tab list  Up/Down row  Enter details  ? help";

/// What the view shows beside the snapshot.
#[derive(Debug, Default)]
pub(super) struct Extras {
    /// URL at which Prometheus scrapes the metrics.
    pub(super) endpoint: Option<String>,
    /// Length of the observation, in seconds; `None` if it has no end.
    pub(super) duration: Option<f64>,
    /// The latest buffered log message.
    pub(super) message: Option<String>,
}

/// Draws the screen.
pub(super) fn draw(frame: &mut Frame<'_>, state: &mut State, extras: &Extras, theme: Theme) {
    let area = frame.area();
    if area.width < MIN_SIZE.0 || area.height < MIN_SIZE.1 {
        let text = format!("terminal too small: needs {} x {} characters; q quits", MIN_SIZE.0, MIN_SIZE.1);
        frame.render_widget(Paragraph::new(text).wrap(ratatui::widgets::Wrap { trim: true }), area);
        return;
    }
    let note = note(state, extras);
    let rows = [
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(u16::from(note.is_some())),
        Constraint::Length(1),
    ];
    let [title, page, note_area, keys] = Layout::vertical(rows).areas(area);
    frame.render_widget(title_line(state, extras, title.width, theme), title);
    match (state.page, state.snapshot()) {
        (Page::Help, _) => lines(frame, page, state, details::help()),
        (_, None) => frame.render_widget("waiting for the first snapshot", page),
        (Page::Overview, Some(_)) => overview(frame, page, state, theme),
        (Page::Details, Some(_)) => {
            let text = details::of_selection(state, page.width.into(), theme);
            lines(frame, page, state, text);
        }
    }
    if let Some(note) = note {
        frame.render_widget(Line::styled(note, theme.bad()), note_area);
    }
    let help = match state.page {
        _ if state.is_typing => "type a name, an address or a process id  Enter apply  Esc clear",
        Page::Overview => KEYS,
        Page::Details | Page::Help => "q quit  p pause  Up/Down scroll  Esc back  ? help",
    };
    frame.render_widget(Line::styled(help, theme.quiet()), keys);
    // A character without width, such as one that changes the direction of text, is part of the cell before it.
    for cell in &mut frame.buffer_mut().content {
        if !cell.symbol().chars().all(is_shown) {
            let kept: String = cell.symbol().chars().filter(|&character| is_shown(character)).collect();
            cell.set_symbol(&kept);
        }
    }
}

/// Draws a long page, scrolled.
fn lines(frame: &mut Frame<'_>, area: Rect, state: &mut State, text: Vec<Line<'static>>) {
    let surplus = text.len().saturating_sub(area.height.into());
    state.scrolled = state.scrolled.min(u16::try_from(surplus).unwrap_or(u16::MAX));
    frame.render_widget(Paragraph::new(text).scroll((state.scrolled, 0)), area);
}

fn title_line(state: &State, extras: &Extras, width: u16, theme: Theme) -> Line<'static> {
    let mut left = String::from(" observer");
    let mut right = String::new();
    if let Some(snapshot) = state.snapshot() {
        let attaching = if snapshot.own.service.is_attaching { "  (attaching to runtimes)" } else { "" };
        left = format!(" observer  {}{attaching}", targets(snapshot));
        let seconds = snapshot.duration_seconds;
        right = match extras.duration {
            Some(duration) => format!("{seconds:.0} of {duration:.0} s "),
            None => {
                format!("{} ", humantime::format_duration(std::time::Duration::from_secs(whole(seconds))))
            }
        };
    }
    if let Some(endpoint) = extras.endpoint.as_ref().filter(|_| width >= WIDE) {
        right = format!("{endpoint}  {right}");
    }
    if state.is_paused() {
        right = format!("PAUSED  {right}");
    }
    let rest = usize::from(width).saturating_sub(right.len());
    Line::styled(format!("{left:<rest$.rest$}{right}"), theme.title())
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the duration of an observation")]
fn whole(seconds: f64) -> u64 {
    seconds as u64
}

/// `app (10)`, `3 processes: app (10), worker (11), ...`.
fn targets(snapshot: &Snapshot) -> String {
    let running: Vec<_> = snapshot.targets.iter().filter(|target| !target.exited).collect();
    let names: Vec<_> =
        running.iter().take(8).map(|target| format!("{} ({})", target.comm, target.pid)).collect();
    let exited = snapshot.targets.len() - running.len();
    let exited = if exited > 0 { format!(" ({exited} exited)") } else { String::new() };
    match running.len() {
        1 => format!("{}{exited}", names[0]),
        count => format!("{count} processes{exited}: {}", names.join(", ")),
    }
}

/// The line above the keys, by priority: the filter, lost data, the latest message.
fn note(state: &State, extras: &Extras) -> Option<String> {
    if state.is_typing || !state.filter.is_empty() {
        let cursor = if state.is_typing { "_" } else { "  (Esc clears it)" };
        return Some(format!("filter: {}{cursor}", state.filter));
    }
    let lost: Vec<_> = state.snapshot()?.own.lost.iter().filter(|lost| lost.count > 0).collect();
    if let Some(first) = lost.first() {
        let more = if lost.len() > 1 { " and more" } else { "" };
        return Some(format!("incomplete data: {} ({} times){more}", first.cause, first.count));
    }
    extras.message.clone()
}

fn overview(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let verdict = verdict(state, usize::from((area.height / 5).max(2)), theme);
    let kinds = state.kinds().count();
    // At 80 x 24 each list gets a few rows; a larger screen gives more rows to lists that have them.
    let lists = if kinds > 0 { 5 } else { 4 };
    let most = area.height.saturating_sub(u16::try_from(verdict.len()).unwrap_or(u16::MAX)) / lists;
    let graph = (area.height / 5).clamp(3, 10);
    let has_stalls = loop_with_stalls(state).is_some_and(|reactor| !reactor.stalls.sites.is_empty());
    let list = |rows: usize, least: u16| Constraint::Length(height(rows).min(most.max(least)));
    let rows = [
        Constraint::Length(u16::try_from(verdict.len()).unwrap_or(u16::MAX)),
        list(state.loops().count().max(1), 4),
        list(state.queues().count(), 3),
        list(kinds, 4),
        // Without stalls, the history gets the rows of the stalls.
        if has_stalls { Constraint::Length(graph) } else { Constraint::Fill(1) },
        if has_stalls { Constraint::Fill(1) } else { Constraint::Length(1) },
    ];
    let [top, loops, queues, kinds, graph, stalls] = Layout::vertical(rows).areas(area);
    frame.render_widget(Paragraph::new(verdict), top);
    draw_loops(frame, loops, state, theme);
    draw_queues(frame, queues, state, theme);
    draw_kinds(frame, kinds, state, theme);
    draw_history(frame, graph, state, theme);
    draw_stalls(frame, stalls, state, theme);
}

/// Height of a list with its heading; 0 if it is empty.
fn height(rows: usize) -> u16 {
    if rows == 0 { 0 } else { u16::try_from(rows).unwrap_or(u16::MAX).saturating_add(1) }
}

fn verdict(state: &State, most: usize, theme: Theme) -> Vec<Line<'static>> {
    let findings = findings(state);
    let shown = (most / 2).max(1);
    let mut text = Vec::new();
    let is_late = findings.iter().any(|finding| finding.verdict == Verdict::Late);
    if !is_late {
        let verdict = not_late(state);
        text.push(Line::from(vec![head(verdict.verdict, theme), Span::raw(verdict.what)]));
        text.push(Line::styled(format!("         {}", verdict.why), theme.quiet()));
    }
    let limit = shown.saturating_sub(usize::from(!is_late));
    let more = findings.len().saturating_sub(limit);
    text.extend(findings.into_iter().take(limit).flat_map(|finding| finding_lines(finding, theme)));
    if more > 0 {
        text.push(Line::styled(format!("     and {more} more"), theme.bad()));
    }
    text
}

fn finding_lines(finding: Finding, theme: Theme) -> [Line<'static>; 2] {
    let head = head(finding.verdict, theme);
    [Line::from(vec![head, Span::raw(finding.what)]), Line::raw(format!("     {}", finding.why))]
}

fn head(verdict: Verdict, theme: Theme) -> Span<'static> {
    match verdict {
        Verdict::NotLate => Span::styled("NOT LATE ", theme.good()),
        Verdict::NotKnown => Span::styled("NOT KNOWN ", theme.heading()),
        Verdict::Late => Span::styled("LATE ", theme.bad()),
        Verdict::Busy => Span::styled("BUSY ", theme.heading()),
        Verdict::Workers => Span::styled("WORKERS ", theme.heading()),
        Verdict::Lost => Span::styled("LOST ", theme.bad()),
    }
}

/// A heading, and the name of the selected row.
fn heading(title: &str, rest: String, theme: Theme) -> Line<'static> {
    Line::from(vec![Span::styled(format!(" {title}"), theme.heading()), Span::raw(format!(" {rest}"))])
}

fn draw_history(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let (width, height) = (usize::from(area.width), usize::from(area.height.saturating_sub(1)));
    let legend = format!("1 s per column: {} p99, {} max", theme.bar_cells().0, theme.light());
    let text = match state.list {
        List::Loops => state.loops().nth(state.selected_loop()).map(|(_, target, reactor)| {
            let points = state.history_of_loop((target.pid, reactor.tid));
            let title = heading("LAG", format!("of {} {}, {legend}", reactor.name, reactor.tid), theme);
            (title, history(points, width, height, theme))
        }),
        List::Queues => state.queues().nth(state.selected_queue()).map(|(_, target, listener)| {
            let key = (target.pid, listener.name());
            let points = state.history_of_queue(&key);
            let title = heading("WAITS", format!("at {}, {legend}", listener.name()), theme);
            (title, history(points, width, height, theme))
        }),
        List::Kinds => state.kinds().nth(state.selected_kind()).map(|(_, target, kind)| {
            let key = (target.pid, kind.task.clone());
            let points = state.history_of_kind(&key);
            let title = heading("WAITS", format!("of {}, {legend}", kind.task), theme);
            (title, history(points, width, height, theme))
        }),
    };
    if let Some((title, graph)) = text {
        let text: Vec<_> = std::iter::once(title).chain(graph).collect();
        frame.render_widget(Paragraph::new(text), area);
    }
}

/// The event loop whose stalls are shown: the selected one, or the first one of the process of the selected row.
fn loop_with_stalls(state: &State) -> Option<&Reactor> {
    let first_of = |pid: u32| state.all_loops().find(|(_, of, _)| of.pid == pid);
    let selected = match state.list {
        List::Loops => state.loops().nth(state.selected_loop()),
        List::Queues => {
            let queue = state.queues().nth(state.selected_queue());
            queue.and_then(|(_, target, _)| first_of(target.pid))
        }
        List::Kinds => {
            let kind = state.kinds().nth(state.selected_kind());
            kind.and_then(|(_, target, _)| first_of(target.pid))
        }
    };
    selected.map(|(.., reactor)| reactor)
}

/// Draws the sites of the stalls, the one with the largest share of the lag first.
fn draw_stalls(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let Some(reactor) = loop_with_stalls(state) else { return };
    let mut text = vec![heading(
        "STALLS",
        format!("of {} {}{}", reactor.name, reactor.tid, stall_total(reactor)),
        theme,
    )];
    text.extend(stall_lines(&reactor.stalls, theme));
    frame.render_widget(Paragraph::new(text), area);
}

/// Two lines for each site: its share, number, length and cause; and its requests and stack.
fn stall_lines(stalls: &Stalls, theme: Theme) -> impl Iterator<Item = Line<'static>> + '_ {
    stalls.sites.iter().enumerate().flat_map(move |(place, site)| {
        let share = Span::styled(format!(" {:>7} ", percent(site.lag_share)), theme.selected());
        let requests = for_requests(&stalls.requests_of(place));
        [
            Line::from(vec![share, Span::raw(site_total(site))]),
            Line::styled(format!("        {requests} {}", stack(&site.sample, usize::MAX)), theme.quiet()),
        ]
    })
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend, crossterm::event::KeyCode};

    use super::{super::testing, *};
    use crate::model::snapshot::Lost;

    const PLAIN: Theme = Theme { has_colours: false, has_blocks: false };

    fn late() -> State {
        let mut state = State::default();
        state.update(testing::snapshot(1.0, |reactor| testing::slept(reactor, 3)));
        state.update(testing::snapshot(2.0, |reactor| testing::slept(reactor, 6)));
        state
    }

    /// The screen as text after pressing `keys`.
    fn screen(state: &mut State, size: (u16, u16), extras: &Extras, keys: &[KeyCode]) -> String {
        for &key in keys {
            state.press(key.into());
        }
        let mut terminal = Terminal::new(TestBackend::new(size.0, size.1)).unwrap();
        terminal.draw(|frame| draw(frame, state, extras, PLAIN)).unwrap();
        let buffer = terminal.backend().buffer();
        let lines = buffer.content().chunks(size.0.into());
        lines.map(|line| line.iter().map(|cell| cell.symbol()).collect::<String>() + "\n").collect()
    }

    #[test]
    fn the_first_screen_shows_what_is_late_and_why() {
        for size in [(80, 24), (120, 40), (200, 60)] {
            let text = screen(&mut late(), size, &Extras::default(), &[]);
            let lines: Vec<_> = text.lines().collect();
            assert!(lines[0].starts_with(" observer  app (10)"), "{text}");
            assert!(lines[1].starts_with("LATE reactor (11) of app (10): lag up to 120 ms"), "{text}");
            assert!(lines[2].contains("asleep (clock_nanosleep) in sleep (app/db.py:12)"), "{text}");
            for part in
                ["EVENT LOOPS by lag", "ACCEPT QUEUES", "127.0.0.1:8080", " LAG ", " STALLS ", "asleep 80%"]
            {
                assert!(text.contains(part), "{part} is missing: {text}");
            }
            assert!(lines.last().unwrap().starts_with("q quit"), "{text}");
        }
    }

    #[test]
    fn deferred_tasks_are_listed_if_there_are_any() {
        let with_tasks = || {
            let mut state = late();
            let mut snapshot = testing::snapshot(3.0, |reactor| testing::slept(reactor, 9));
            let mut pending = testing::kind("thumbnail", 0);
            (pending.pending, pending.oldest_seconds) = (7, Some(2.5));
            snapshot.targets[0].deferred = vec![testing::kind("mail", 300), pending];
            state.update(snapshot);
            state
        };
        for size in [(80, 24), (120, 40), (200, 60)] {
            assert!(!screen(&mut late(), size, &Extras::default(), &[]).contains("DEFERRED TASKS"));
            let text = screen(&mut with_tasks(), size, &Extras::default(), &[]);
            let line = |part: &str| {
                let found = text.lines().find(|line| line.contains(part));
                found.unwrap_or_else(|| panic!("{part} is missing: {text}")).to_owned()
            };
            for part in ["pending", "oldest", "p99 wait", "p99 run", "dropped"] {
                assert!(line("DEFERRED TASKS").contains(part), "{part} is missing: {text}");
            }
            for part in ["2.00 ms", "30.0 ms", "300/s", " 60 "] {
                assert!((line("  mail ") + " ").contains(part), "{part} is missing: {text}");
            }
            assert!(line("  thumbnail ").contains("2.50 s"), "{text}");
            assert!(
                text.contains(" STALLS ") && text.contains("         for GET /job/7 in sleep (app/db.py:12)")
            );
            let text = screen(&mut with_tasks(), size, &Extras::default(), &[KeyCode::BackTab]);
            assert!(text.contains("> mail") && text.contains(" WAITS of mail"), "{text}");
        }
        // If nothing is late, the verdict comes first, and dropped tasks after it.
        let mut state = State::default();
        let mut snapshot = testing::snapshot(1.0, |_| {});
        snapshot.targets[0].deferred = vec![testing::kind("mail", 50)];
        state.update(snapshot);
        let text = screen(&mut state, (80, 24), &Extras::default(), &[]);
        let lines: Vec<_> = text.lines().collect();
        assert!(
            lines[1].starts_with("NOT LATE so far") && lines[3].starts_with("LOST tasks mail of app (10)"),
            "{text}"
        );
    }

    #[test]
    fn wide_screens_show_more() {
        let extras = Extras { endpoint: Some("http://127.0.0.1:9464/metrics".into()), ..Extras::default() };
        let narrow = screen(&mut late(), (80, 24), &extras, &[]);
        let wide = screen(&mut late(), (200, 60), &extras, &[]);
        for part in ["of process", "app 10", "accepts", "arrivals", "ever", "9464"] {
            assert!(!narrow.contains(part) && wide.contains(part), "{part}: {narrow}{wide}");
        }
    }

    #[test]
    fn every_size_can_be_drawn() {
        for (width, height) in [(1, 1), (10, 3), (49, 24), (80, 11), (50, 12), (500, 200)] {
            for keys in [&[][..], &[KeyCode::Enter], &[KeyCode::Char('?')]] {
                let text = screen(&mut late(), (width, height), &Extras::default(), keys);
                let is_small = width < MIN_SIZE.0 || height < MIN_SIZE.1;
                assert_eq!(text.contains("too small") || width < 12, is_small, "{text}");
            }
        }
        let empty = screen(&mut State::default(), (80, 24), &Extras::default(), &[]);
        assert!(empty.contains("waiting for the first snapshot"));
    }

    #[test]
    fn the_selected_row_is_visible() {
        let mut state = State::default();
        let mut snapshot = testing::snapshot(1.0, |_| {});
        for n in 0..50 {
            let mut reactor = snapshot.targets[0].reactors[0].clone();
            (reactor.tid, reactor.name) = (100 + n, format!("worker-{n:02}"));
            snapshot.targets[0].reactors.push(reactor);
        }
        state.update(snapshot);
        let text = screen(&mut state, (80, 24), &Extras::default(), &[KeyCode::End]);
        assert!(text.contains("> worker-49 149"), "{text}");
        assert!(!text.contains("worker-01"), "{text}");
    }

    #[test]
    fn lost_data_messages_and_the_filter_are_shown() {
        let mut state = late();
        let extras = Extras { message: Some("[WARN observer] careful".into()), ..Extras::default() };
        assert!(screen(&mut state, (80, 24), &extras, &[]).contains("careful"));
        let mut snapshot = testing::snapshot(3.0, |_| {});
        snapshot.own.lost.push(Lost { cause: "stall_dropped", count: 3 });
        state.update(snapshot);
        assert!(screen(&mut state, (80, 24), &extras, &[]).contains("stall_dropped (3 times)"));
        let typed = [KeyCode::Char('/'), KeyCode::Char('x')];
        let text = screen(&mut state, (80, 24), &extras, &typed);
        assert!(text.contains("filter: x_") && text.contains("no match"), "{text}");
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        let mut state = State::default();
        state.update(testing::snapshot(1.0, |reactor| reactor.name = "\u{1b}[2Jev\u{202e}il\u{9b}\n".into()));
        let text = screen(&mut state, (80, 24), &Extras::default(), &[]);
        assert!(text.contains("[2Jevil") && text.lines().count() == 24, "{text:?}");
        assert!(text.lines().all(|line| line.chars().all(is_shown)), "{text:?}");
    }
}
