//! The tables of the overview: event loops, accept queues and kinds of deferred tasks, with as many columns as fit.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Rect},
    style::Style,
    text::Line,
    widgets::{Cell, Row, Table, TableState},
};

use super::{
    finding::rate,
    graph::{queue_bar, split_bar},
    state::{List, State},
    theme::Theme,
    verdict::longest_wait,
};
use crate::{export::words::span, model::histogram::Histogram};

/// Widths of the screen from which on tables have more columns.
pub(super) const WIDE: u16 = 104;
const WIDER: u16 = 150;

/// Headings of the columns after the first two that are aligned to the left.
const PROCESS: &str = "of process";
const BUSY_BAR: &str = "busy time by cause";
const QUEUE_BAR: &str = "share of limit";

fn right(text: impl Into<String>) -> Cell<'static> {
    Cell::from(Line::raw(text.into()).alignment(Alignment::Right))
}

/// A delay, highlighted if it is long; `-` if there is none.
fn delay(seconds: Option<f64>, theme: Theme) -> Cell<'static> {
    seconds.map_or_else(|| right("-"), |seconds| right(span(seconds)).style(theme.delay(seconds)))
}

fn longest(histogram: &Histogram) -> Option<f64> {
    (histogram.count() > 0).then(|| histogram.max())
}

fn head(names: &[&str], theme: Theme) -> Row<'static> {
    let cells = names.iter().enumerate().map(|(column, name)| {
        let is_left = column < 2 || [PROCESS, BUSY_BAR, QUEUE_BAR].contains(name);
        let alignment = if is_left { Alignment::Left } else { Alignment::Right };
        Cell::from(Line::raw((*name).to_owned()).alignment(alignment))
    });
    Row::new(cells).style(theme.heading())
}

/// Draws a table, scrolled so that the selected row is visible.
fn draw_table(frame: &mut Frame<'_>, area: Rect, table: Table<'_>, selected: usize) {
    let mut scroll = TableState::new().with_selected(selected);
    frame.render_stateful_widget(table, area, &mut scroll);
}

fn mark(is_selected: bool, is_active: bool, theme: Theme) -> (Cell<'static>, Style) {
    if is_selected && is_active { (theme.mark().into(), theme.selected()) } else { ("".into(), Style::new()) }
}

pub(super) fn draw_loops(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let is_wide = area.width >= WIDE;
    let heading = format!("EVENT LOOPS {}", state.sort.name());
    let mut widths = vec![Constraint::Length(1), Constraint::Length(if is_wide { 24 } else { 21 })];
    let mut names = vec!["", heading.as_str()];
    if is_wide {
        widths.push(Constraint::Length(24));
        names.push(PROCESS);
    }
    widths.extend([8, 8, 8, 5].map(Constraint::Length));
    names.extend(["mean lag", "p99 lag", "max lag", "busy"]);
    if area.width >= WIDER {
        widths.extend([9, 8].map(Constraint::Length));
        names.extend(["max ever", "stalls"]);
    }
    widths.push(Constraint::Fill(1));
    names.push(BUSY_BAR);
    let fixed: u16 =
        widths.iter().map(|width| if let Constraint::Length(n) = width { n + 1 } else { 0 }).sum();
    let bar = usize::from(area.width.saturating_sub(fixed));
    let selected = state.selected_loop();
    let rows = state.loops().enumerate().map(|(index, (row, target, reactor))| {
        let (mark, style) = mark(index == selected, state.list == List::Loops, theme);
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
        let why = if state.filter.is_empty() { "none yet" } else { "no match" };
        rows.push(Row::new(["", why]));
    }
    draw_table(frame, area, Table::new(rows, widths).header(head(&names, theme)), selected);
}

pub(super) fn draw_queues(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let is_wide = area.width >= WIDE;
    let mut widths = vec![Constraint::Length(1), Constraint::Length(if is_wide { 24 } else { 21 })];
    let mut names = vec!["", "ACCEPT QUEUES"];
    if is_wide {
        widths.push(Constraint::Length(24));
        names.push(PROCESS);
    }
    widths.extend([8, 8, 8, 11].map(Constraint::Length));
    names.extend(["oldest", "p99 wait", "max wait", "depth"]);
    if is_wide {
        widths.extend([9, 8].map(Constraint::Length));
        names.extend(["accepts", "dropped"]);
    }
    if area.width >= WIDER {
        widths.extend([9, 8].map(Constraint::Length));
        names.extend(["arrivals", "aborted"]);
    }
    widths.push(Constraint::Fill(1));
    names.push(QUEUE_BAR);
    let fixed: u16 =
        widths.iter().map(|width| if let Constraint::Length(n) = width { n + 1 } else { 0 }).sum();
    let bar = usize::from(area.width.saturating_sub(fixed));
    let selected = state.selected_queue();
    let rows = state.queues().enumerate().map(|(index, (row, target, listener))| {
        let (mark, style) = mark(index == selected, state.list == List::Queues, theme);
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
    draw_table(frame, area, Table::new(rows, widths).header(head(&names, theme)), selected);
}

pub(super) fn draw_kinds(frame: &mut Frame<'_>, area: Rect, state: &State, theme: Theme) {
    let is_wide = area.width >= WIDE;
    let mut widths = vec![Constraint::Length(1), Constraint::Fill(1)];
    let mut names = vec!["", "DEFERRED TASKS"];
    if is_wide {
        widths.push(Constraint::Length(24));
        names.push(PROCESS);
    }
    widths.extend([7, 7].map(Constraint::Length));
    names.extend(["pending", "oldest"]);
    if is_wide {
        widths.push(Constraint::Length(8));
        names.push("enqueued");
    }
    widths.extend([8, 8, 8, 8].map(Constraint::Length));
    names.extend(["started", "p99 wait", "p99 run", "dropped"]);
    if area.width >= WIDER {
        widths.extend([9, 9, 11].map(Constraint::Length));
        names.extend(["p50 wait", "max wait", "finished"]);
    }
    let selected = state.selected_kind();
    let rows = state.kinds().enumerate().map(|(index, (row, target, kind))| {
        let (mark, style) = mark(index == selected, state.list == List::Kinds, theme);
        let window = &row.window;
        let mut cells = vec![mark, kind.task.clone().into()];
        if is_wide {
            cells.push(format!("{} {}", target.comm, target.pid).into());
        }
        cells.extend([right(kind.pending.to_string()), time(kind.oldest_seconds)]);
        if is_wide {
            cells.push(right(rate(window.enqueued, window.seconds)));
        }
        cells.extend([
            right(rate(window.started, window.seconds)),
            time(window.wait.quantile(0.99)),
            time(window.run.quantile(0.99)),
            right(kind.orphaned.to_string()),
        ]);
        if area.width >= WIDER {
            let (half, most) = (window.wait.quantile(0.5), longest(&window.wait));
            cells.extend([time(half), time(most), right(kind.finished.to_string())]);
        }
        Row::new(cells).style(style)
    });
    draw_table(frame, area, Table::new(rows, widths).header(head(&names, theme)), selected);
}

/// A time that may be long on purpose, such as the wait of a timer; never highlighted.
fn time(seconds: Option<f64>) -> Cell<'static> {
    right(seconds.map_or("-".into(), span))
}
