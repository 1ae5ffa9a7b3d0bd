//! The overview: the verdict, event loops, accept queues, and the history and stalls of what is selected.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::Style,
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row, Table, TableState},
};

use super::{
    details,
    graph::{history, queue_bar, split_bar},
    state::{List, Page, State},
    theme::Theme,
    verdict::{all_is_well, cause, findings, longest_wait, rate, stack},
};
use crate::{
    export::words::{percent, span},
    model::{
        histogram::Histogram,
        snapshot::{Reactor, Snapshot},
        stall::Stalls,
    },
};

/// The least that anything can be told in.
const LEAST: (u16, u16) = (50, 12);

/// From these widths on there is room for more columns.
const WIDE: u16 = 104;
const WIDER: u16 = 150;

const KEYS: &str = "q quit  p pause  s sort  / filter  Tab lists  Up/Down  Enter details  ? help";

/// What is shown beside the figures.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// Where Prometheus finds the figures.
    pub(super) endpoint: Option<String>,
    /// How long the observation is going to last, in seconds; `None` for as long as it is let.
    pub(super) duration: Option<f64>,
    /// The latest message that waits for the terminal to be given back.
    pub(super) message: Option<String>,
}

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, state: &mut State, facts: &Facts, theme: Theme) {
    let area = frame.area();
    if area.width < LEAST.0 || area.height < LEAST.1 {
        let text = format!("too small: {} x {} characters are the least; q quits", LEAST.0, LEAST.1);
        frame.render_widget(Paragraph::new(text).wrap(ratatui::widgets::Wrap { trim: true }), area);
        return;
    }
    let note = note(state, facts);
    let rows = [
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(u16::from(note.is_some())),
        Constraint::Length(1),
    ];
    let [title, page, note_area, keys] = Layout::vertical(rows).areas(area);
    frame.render_widget(title_line(state, facts, title.width, theme), title);
    match (state.page, state.snapshot()) {
        (Page::Help, _) => lines(frame, page, state, details::help()),
        (_, None) => frame.render_widget("waiting for the first figures", page),
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
        _ if state.is_typing => "type to filter by name, address or process id  Enter done  Esc no filter",
        Page::Overview => KEYS,
        Page::Details | Page::Help => "q quit  p pause  Up/Down scroll  Esc back  ? help",
    };
    frame.render_widget(Line::styled(help, theme.quiet()), keys);
}

/// A long page, of which as much is shown as fits.
fn lines(frame: &mut Frame<'_>, area: Rect, state: &mut State, text: Vec<Line<'static>>) {
    let surplus = text.len().saturating_sub(area.height.into());
    state.scrolled = state.scrolled.min(u16::try_from(surplus).unwrap_or(u16::MAX));
    frame.render_widget(Paragraph::new(text).scroll((state.scrolled, 0)), area);
}

fn title_line(state: &State, facts: &Facts, width: u16, theme: Theme) -> Line<'static> {
    let mut left = String::from(" observer");
    let mut right = String::new();
    if let Some(snapshot) = state.snapshot() {
        left = format!(" observer  {}", targets(snapshot));
        let seconds = snapshot.duration_seconds;
        right = match facts.duration {
            Some(duration) => format!("{seconds:.0} of {duration:.0} s "),
            None => {
                format!("{} ", humantime::format_duration(std::time::Duration::from_secs(whole(seconds))))
            }
        };
    }
    if let Some(endpoint) = facts.endpoint.as_ref().filter(|_| width >= WIDE) {
        right = format!("{endpoint}  {right}");
    }
    if state.is_paused() {
        right = format!("PAUSED  {right}");
    }
    let room = usize::from(width).saturating_sub(right.len());
    Line::styled(format!("{left:<room$.room$}{right}"), theme.title())
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an age of an observation")]
fn whole(seconds: f64) -> u64 {
    seconds as u64
}

/// `app (10)`, `3 processes: app (10), worker (11), ...`.
fn targets(snapshot: &Snapshot) -> String {
    let live: Vec<_> = snapshot.targets.iter().filter(|target| !target.exited).collect();
    let names: Vec<_> =
        live.iter().take(8).map(|target| format!("{} ({})", target.comm, target.pid)).collect();
    let gone = snapshot.targets.len() - live.len();
    let gone = if gone > 0 { format!(" ({gone} gone)") } else { String::new() };
    match live.len() {
        1 => format!("{}{gone}", names[0]),
        count => format!("{count} processes{gone}: {}", names.join(", ")),
    }
}

/// What must not be overlooked: the filter, what could not be kept, the latest message.
fn note(state: &State, facts: &Facts) -> Option<String> {
    if state.is_typing || !state.filter.is_empty() {
        let cursor = if state.is_typing { "_" } else { "  (Esc: no filter)" };
        return Some(format!("filter: {}{cursor}", state.filter));
    }
    let lost: Vec<_> = state.snapshot()?.own.lost.iter().filter(|lost| lost.count > 0).collect();
    if let Some(first) = lost.first() {
        let more = if lost.len() > 1 { " and more" } else { "" };
        return Some(format!("not everything could be kept: {} ({} times){more}", first.cause, first.count));
    }
    facts.message.clone()
}

fn overview(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let verdict = verdict(state, usize::from((area.height / 5).max(2)), theme);
    let (loops, queues) = (height(state.loops().count()), height(state.queues().count()));
    // At 80x24 there is room for a few of each; whatever is more goes where there is more to tell.
    let most = area.height.saturating_sub(u16::try_from(verdict.len()).unwrap_or(u16::MAX)) / 4;
    let graph = (area.height / 5).clamp(3, 10);
    let has_stalls = stalling(state).is_some_and(|reactor| !reactor.stalls.sites.is_empty());
    let rows = [
        Constraint::Length(u16::try_from(verdict.len()).unwrap_or(u16::MAX)),
        Constraint::Length(loops.min(most.max(4))),
        Constraint::Length(if queues == 1 { 0 } else { queues.min(most.max(3)) }),
        // Where there are no stalls to tell, the history gets their room.
        if has_stalls { Constraint::Length(graph) } else { Constraint::Fill(1) },
        if has_stalls { Constraint::Fill(1) } else { Constraint::Length(1) },
    ];
    let [top, loops, queues, graph, stalls] = Layout::vertical(rows).areas(area);
    frame.render_widget(Paragraph::new(verdict), top);
    draw_loops(frame, loops, state, theme);
    draw_queues(frame, queues, state, theme);
    draw_history(frame, graph, state, theme);
    draw_stalls(frame, stalls, state, theme);
}

/// A list's rows and its heading.
fn height(rows: usize) -> u16 {
    u16::try_from(rows.max(1)).unwrap_or(u16::MAX).saturating_add(1)
}

fn verdict(state: &State, most: usize, theme: Theme) -> Vec<Line<'static>> {
    let findings = findings(state);
    if findings.is_empty() {
        let well = all_is_well(state);
        let head = Span::styled("NOT LATE ", theme.good());
        return vec![
            Line::from(vec![head, Span::raw(well.what)]),
            Line::styled(format!("         {}", well.why), theme.quiet()),
        ];
    }
    let shown = (most / 2).max(1);
    let more = findings.len().saturating_sub(shown);
    let mut text: Vec<_> = findings
        .into_iter()
        .take(shown)
        .flat_map(|finding| {
            let head = Span::styled("LATE ", theme.bad());
            [Line::from(vec![head, Span::raw(finding.what)]), Line::raw(format!("     {}", finding.why))]
        })
        .collect();
    if more > 0 {
        text.push(Line::styled(format!("     and {more} more"), theme.bad()));
    }
    text
}

fn right(text: impl Into<String>) -> Cell<'static> {
    Cell::from(Line::raw(text.into()).alignment(Alignment::Right))
}

/// A delay; nothing where nothing was delayed.
fn delay(seconds: Option<f64>, theme: Theme) -> Cell<'static> {
    seconds.map_or_else(|| right("-"), |seconds| right(span(seconds)).style(theme.delay(seconds)))
}

fn longest(histogram: &Histogram) -> Option<f64> {
    (histogram.count() > 0).then(|| histogram.max())
}

fn head(names: &[&str], theme: Theme) -> Row<'static> {
    let cells = names.iter().enumerate().map(|(place, name)| {
        let is_text = place < 2 || name.contains(' ');
        let alignment = if is_text { Alignment::Left } else { Alignment::Right };
        Cell::from(Line::raw((*name).to_owned()).alignment(alignment))
    });
    Row::new(cells).style(theme.heading())
}

/// Draws a list so that the selected row is in sight.
fn list(frame: &mut Frame<'_>, area: Rect, table: Table<'_>, selected: usize) {
    let mut place = TableState::new().with_selected(selected);
    frame.render_stateful_widget(table, area, &mut place);
}

fn mark(is_selected: bool, is_active: bool, theme: Theme) -> (Cell<'static>, Style) {
    if is_selected && is_active { (theme.mark().into(), theme.selected()) } else { ("".into(), Style::new()) }
}

fn draw_loops(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let is_wide = area.width >= WIDE;
    let heading = format!("LOOPS {}", state.sort.name());
    let mut widths = vec![Constraint::Length(1), Constraint::Length(if is_wide { 24 } else { 21 })];
    let mut names = vec!["", heading.as_str()];
    if is_wide {
        widths.push(Constraint::Length(24));
        names.push("of process");
    }
    widths.extend([8, 8, 8, 5].map(Constraint::Length));
    names.extend(["mean", "p99", "longest", "busy"]);
    if area.width >= WIDER {
        widths.extend([9, 8].map(Constraint::Length));
        names.extend(["ever", "stalls"]);
    }
    widths.push(Constraint::Fill(1));
    names.push("where busy time goes");
    let fixed: u16 =
        widths.iter().map(|width| if let Constraint::Length(n) = width { n + 1 } else { 0 }).sum();
    let bar = usize::from(area.width.saturating_sub(fixed));
    let selected = state.selected_loop();
    let rows = state.loops().enumerate().map(|(place, (row, target, reactor))| {
        let (mark, style) = mark(place == selected, state.list == List::Loops, theme);
        let window = &row.window;
        let mut cells = vec![mark, format!("{} {}", reactor.name, reactor.tid).into()];
        if is_wide {
            cells.push(format!("{} {}", target.comm, target.pid).into());
        }
        cells.extend([
            delay(longest(&window.lag).map(|_| window.lag.mean()), theme),
            delay(window.lag.quantile(0.99), theme),
            delay(longest(&window.lag), theme),
            right(window.utilization.map_or("-".into(), |share| format!("{:.0} %", share * 100.0))),
        ]);
        if area.width >= WIDER {
            cells.extend([delay(longest(&reactor.lag), theme), right(reactor.stalls.count.to_string())]);
        }
        cells.push(Line::from(split_bar(&window.parts, bar, theme)).into());
        Row::new(cells).style(style)
    });
    let mut rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        let why = if state.filter.is_empty() { "none has waited for events yet" } else { "none found" };
        rows.push(Row::new(["", why]));
    }
    list(frame, area, Table::new(rows, widths).header(head(&names, theme)), selected);
}

fn draw_queues(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let is_wide = area.width >= WIDE;
    let mut widths = vec![Constraint::Length(1), Constraint::Length(if is_wide { 24 } else { 21 })];
    let mut names = vec!["", "ACCEPT QUEUES"];
    if is_wide {
        widths.push(Constraint::Length(24));
        names.push("of process");
    }
    widths.extend([8, 8, 8, 11].map(Constraint::Length));
    names.extend(["oldest", "p99", "longest", "depth"]);
    if is_wide {
        widths.extend([9, 8].map(Constraint::Length));
        names.extend(["accepts", "dropped"]);
    }
    if area.width >= WIDER {
        widths.extend([9, 8].map(Constraint::Length));
        names.extend(["arrivals", "resets"]);
    }
    widths.push(Constraint::Fill(1));
    names.push("of the limit");
    let fixed: u16 =
        widths.iter().map(|width| if let Constraint::Length(n) = width { n + 1 } else { 0 }).sum();
    let bar = usize::from(area.width.saturating_sub(fixed));
    let selected = state.selected_queue();
    let rows = state.queues().enumerate().map(|(place, (row, target, listener))| {
        let (mark, style) = mark(place == selected, state.list == List::Queues, theme);
        let window = &row.window;
        let mut cells = vec![mark, listener.name().into()];
        if is_wide {
            cells.push(format!("{} {}", target.comm, target.pid).into());
        }
        let longest = longest_wait(row, listener);
        cells.extend([
            delay(listener.oldest_seconds, theme),
            delay(window.wait.quantile(0.99), theme),
            delay((longest > 0.0).then_some(longest), theme),
            right(format!("{}/{}", listener.depth, listener.limit)),
        ]);
        if is_wide {
            let dropped = right(listener.drops.to_string());
            let dropped = if window.drops > 0 { dropped.style(theme.bad()) } else { dropped };
            cells.extend([right(rate(window.accepts, window.seconds)), dropped]);
        }
        if area.width >= WIDER {
            cells.extend([right(rate(window.arrivals, window.seconds)), right(listener.aborted.to_string())]);
        }
        cells.push(queue_bar(listener.depth, listener.peak, listener.limit, bar, theme).into());
        Row::new(cells).style(style)
    });
    list(frame, area, Table::new(rows, widths).header(head(&names, theme)), selected);
}

/// A heading and what is selected.
fn heading(title: &str, rest: String, theme: Theme) -> Line<'static> {
    Line::from(vec![Span::styled(format!(" {title}"), theme.heading()), Span::raw(format!(" {rest}"))])
}

fn draw_history(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let (width, height) = (usize::from(area.width), usize::from(area.height.saturating_sub(1)));
    let legend = format!("a second each: {} p99, {} longest", theme.places().0, theme.light());
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
    };
    if let Some((title, graph)) = text {
        let text: Vec<_> = std::iter::once(title).chain(graph).collect();
        frame.render_widget(Paragraph::new(text), area);
    }
}

/// The selected loop, or the first loop of the selected queue's process: the one whose stalls are shown.
fn stalling(state: &State) -> Option<&Reactor> {
    let selected = match state.list {
        List::Loops => state.loops().nth(state.selected_loop()),
        List::Queues => {
            let queue = state.queues().nth(state.selected_queue());
            queue.and_then(|(_, target, _)| state.all_loops().find(|(_, of, _)| of.pid == target.pid))
        }
    };
    selected.map(|(.., reactor)| reactor)
}

/// The worst stalls.
fn draw_stalls(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let Some(reactor) = stalling(state) else { return };
    let mut text =
        vec![heading("STALLS", format!("of {} {}{}", reactor.name, reactor.tid, total(reactor)), theme)];
    text.extend(stall_lines(&reactor.stalls, theme));
    frame.render_widget(Paragraph::new(text), area);
}

/// How many, and how long together.
pub(super) fn total(reactor: &Reactor) -> String {
    let stalls = &reactor.stalls;
    let threshold = span(stalls.threshold_seconds);
    match stalls.count {
        0 => format!(": none of {threshold} or more since the start"),
        count => format!(": {count} of {threshold} or more, {} together", span(stalls.seconds)),
    }
}

/// Two lines each: what it was, and in which code.
fn stall_lines(stalls: &Stalls, theme: Theme) -> impl Iterator<Item = Line<'static>> + '_ {
    stalls.sites.iter().flat_map(move |site| {
        let what =
            format!("of the lag: {} times, {} together, {}", site.count, span(site.seconds), cause(site));
        let share = Span::styled(format!(" {:>7} ", percent(site.lag_share)), theme.selected());
        [
            Line::from(vec![share, Span::raw(what)]),
            Line::styled(format!("         {}", stack(&site.look)), theme.quiet()),
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
        state.look(testing::snapshot(1.0, |reactor| testing::slept(reactor, 3)));
        state.look(testing::snapshot(2.0, |reactor| testing::slept(reactor, 6)));
        state
    }

    /// The screen as text, after these keys.
    fn screen(state: &mut State, size: (u16, u16), facts: &Facts, keys: &[KeyCode]) -> String {
        for &key in keys {
            state.press(key.into());
        }
        let mut terminal = Terminal::new(TestBackend::new(size.0, size.1)).unwrap();
        terminal.draw(|frame| draw(frame, state, facts, PLAIN)).unwrap();
        let buffer = terminal.backend().buffer();
        let lines = buffer.content().chunks(size.0.into());
        lines.map(|line| line.iter().map(|cell| cell.symbol()).collect::<String>() + "\n").collect()
    }

    #[test]
    fn the_first_screen_tells_who_is_late_and_whose_fault_it_is() {
        for size in [(80, 24), (120, 40), (200, 60)] {
            let text = screen(&mut late(), size, &Facts::default(), &[]);
            let lines: Vec<_> = text.lines().collect();
            assert!(lines[0].starts_with(" observer  app (10)"), "{text}");
            assert!(lines[1].starts_with("LATE reactor (11) of app (10): up to 120 ms"), "{text}");
            assert!(lines[2].contains("asleep (clock_nanosleep) in sleep (app/db.py:12)"), "{text}");
            for part in
                ["LOOPS latest first", "ACCEPT QUEUES", "127.0.0.1:8080", " LAG ", " STALLS ", "asleep 80%"]
            {
                assert!(text.contains(part), "{part} is missing: {text}");
            }
            assert!(lines.last().unwrap().starts_with("q quit"), "{text}");
        }
    }

    #[test]
    fn wide_screens_show_more() {
        let facts = Facts { endpoint: Some("http://127.0.0.1:9464/metrics".into()), ..Facts::default() };
        let narrow = screen(&mut late(), (80, 24), &facts, &[]);
        let wide = screen(&mut late(), (200, 60), &facts, &[]);
        for part in ["of process", "app 10", "accepts", "arrivals", "ever", "9464"] {
            assert!(!narrow.contains(part) && wide.contains(part), "{part}: {narrow}{wide}");
        }
    }

    #[test]
    fn every_size_is_drawn() {
        for (width, height) in [(1, 1), (10, 3), (49, 24), (80, 11), (50, 12), (500, 200)] {
            for keys in [&[][..], &[KeyCode::Enter], &[KeyCode::Char('?')]] {
                let text = screen(&mut late(), (width, height), &Facts::default(), keys);
                let is_small = width < LEAST.0 || height < LEAST.1;
                assert_eq!(text.contains("too small") || width < 12, is_small, "{text}");
            }
        }
        let before_the_first = screen(&mut State::default(), (80, 24), &Facts::default(), &[]);
        assert!(before_the_first.contains("waiting for the first figures"));
    }

    #[test]
    fn the_selected_row_is_in_sight() {
        let mut state = State::default();
        let mut snapshot = testing::snapshot(1.0, |_| {});
        for n in 0..50 {
            let mut reactor = snapshot.targets[0].reactors[0].clone();
            (reactor.tid, reactor.name) = (100 + n, format!("worker-{n:02}"));
            snapshot.targets[0].reactors.push(reactor);
        }
        state.look(snapshot);
        let text = screen(&mut state, (80, 24), &Facts::default(), &[KeyCode::End]);
        assert!(text.contains("> worker-49 149"), "{text}");
        assert!(!text.contains("worker-01"), "{text}");
    }

    #[test]
    fn losses_messages_and_the_filter_have_their_line() {
        let mut state = late();
        let facts = Facts { message: Some("[WARN observer] careful".into()), ..Facts::default() };
        assert!(screen(&mut state, (80, 24), &facts, &[]).contains("careful"));
        let mut snapshot = testing::snapshot(3.0, |_| {});
        snapshot.own.lost.push(Lost { cause: "stall_dropped", count: 3 });
        state.look(snapshot);
        assert!(screen(&mut state, (80, 24), &facts, &[]).contains("stall_dropped (3 times)"));
        let typed = [KeyCode::Char('/'), KeyCode::Char('x')];
        let text = screen(&mut state, (80, 24), &facts, &typed);
        assert!(text.contains("filter: x_") && text.contains("none found"), "{text}");
    }

    #[test]
    fn names_with_control_characters_do_no_harm() {
        let mut state = State::default();
        state.look(testing::snapshot(1.0, |reactor| reactor.name = "\u{1b}[2Jevil\n".into()));
        let text = screen(&mut state, (80, 24), &Facts::default(), &[]);
        assert!(!text.contains('\u{1b}') && text.lines().count() == 24, "{text:?}");
    }
}
