//! Draws bars and the history graph with characters.

use ratatui::text::{Line, Span};

use super::{
    recent::{Parts, Point},
    theme::{Theme, short_name},
};
use crate::{
    export::words::span,
    model::{busy::Cause, late::LATE},
};

/// The lowest value at the top of a history, in seconds: the history of a loop without lag stays flat.
const MIN_SCALE: f64 = 0.001;

/// Width of the labels of a history's scale.
const SCALE_WIDTH: usize = 8;

/// A bar of time by cause: each part is as wide as its share, and is named if the name fits.
pub(super) fn split_bar(parts: &Parts, width: usize, theme: Theme) -> Vec<Span<'static>> {
    let total: f64 = parts.iter().sum();
    if total <= 0.0 {
        return Vec::new();
    }
    let (mut up_to, mut begun, mut is_reversed) = (0.0, 0, true);
    let mut spans = Vec::new();
    for (cause, part) in Cause::PARTS.into_iter().zip(parts) {
        up_to += part;
        let end = cells(up_to / total, width);
        if end > begun {
            let text = label(cause, part / total, end - begun, theme);
            spans.push(Span::styled(text, theme.part(cause, is_reversed)));
            is_reversed = !is_reversed;
        }
        begun = end;
    }
    spans
}

/// A part's name and share, its name, or its first letter, whichever fits.
fn label(cause: Cause, share: f64, width: usize, theme: Theme) -> String {
    let name = short_name(cause);
    let candidates = [format!(" {name} {:.0}% ", share * 100.0), format!("{name} {:.0}%", share * 100.0)];
    let fits = candidates.into_iter().chain([name.to_owned()]).find(|text| text.len() <= width);
    match fits {
        Some(text) => format!("{text:width$}"),
        // Colours identify the part; without them its first letter does.
        None if theme.has_colours => " ".repeat(width),
        None => name[..1].repeat(width),
    }
}

/// A bar of a queue's depth relative to its limit, with a mark at the peak.
pub(super) fn queue_bar(depth: u32, peak: u32, limit: u32, width: usize, theme: Theme) -> String {
    let (taken, free) = theme.bar_cells();
    let share = |connections: u32| f64::from(connections) / f64::from(limit.max(1));
    // A single connection is visible even if the limit is high.
    let at_least_one = |connections: u32| cells(share(connections), width).max(usize::from(connections > 0));
    let (taken_cells, peak_cells) = (at_least_one(depth), at_least_one(peak));
    (1..=width)
        .map(|cell| match cell {
            n if n <= taken_cells => taken,
            n if n == peak_cells => "|",
            _ => free,
        })
        .collect()
}

/// The number of cells that a share of `width` cells takes.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and the width")]
fn cells(share: f64, width: usize) -> usize {
    (share.clamp(0.0, 1.0) * float(width)).round() as usize
}

#[expect(clippy::cast_precision_loss, reason = "as wide as a terminal")]
fn float(width: usize) -> f64 {
    width as f64
}

/// A graph of delays with one column for each second, the newest at the right: solid up to the 99th percentile, light up
/// to the maximum. `points` are newest first.
pub(super) fn history(
    points: impl Iterator<Item = Point>,
    width: usize,
    height: usize,
    theme: Theme,
) -> Vec<Line<'static>> {
    let columns = width.saturating_sub(SCALE_WIDTH + 1);
    let mut points: Vec<Point> = points.take(columns).collect();
    points.reverse();
    let scale = points.iter().map(|point| point.max).fold(MIN_SCALE, f64::max);
    let missing = columns - points.len();
    (0..height)
        .rev()
        .map(|row| {
            let mut graph = " ".repeat(missing);
            graph.extend(points.iter().map(|point| cell(*point, scale, row, height, theme)));
            let mark = match row {
                _ if row + 1 == height => span(scale),
                0 => "0".into(),
                _ => String::new(),
            };
            Line::from(vec![
                Span::styled(format!("{mark:>SCALE_WIDTH$} "), theme.quiet()),
                Span::styled(graph, if scale >= LATE { theme.delay(scale) } else { theme.good() }),
            ])
        })
        .collect()
}

/// The cell of one second in one row; rows count from the bottom.
fn cell(point: Point, scale: f64, row: usize, height: usize, theme: Theme) -> &'static str {
    let levels = theme.levels();
    let full = levels.len() - 1;
    // A delay above zero fills at least the lowest level.
    let level_of = |delay: f64| {
        let level = cells(delay / scale, height * full).max(usize::from(delay > 0.0));
        level.saturating_sub(row * full).min(full)
    };
    match (level_of(point.p99), level_of(point.max)) {
        (0, 0) => " ",
        // A light cell is a full one, which would exaggerate a delay that fills less than half of it.
        (0, light) if 2 * light >= full => theme.light(),
        (0, _) => levels[1],
        (solid, _) => levels[solid],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLOURED: Theme = Theme { has_colours: true, has_blocks: true };
    const PLAIN: Theme = Theme { has_colours: false, has_blocks: false };

    fn text(spans: &[Span<'_>]) -> String {
        spans.iter().map(|span| span.content.as_ref()).collect()
    }

    #[test]
    fn parts_are_as_wide_as_their_shares() {
        let mut parts = Parts::default();
        assert!(split_bar(&parts, 20, COLOURED).is_empty());
        (parts[0], parts[1], parts[5]) = (0.25, 0.05, 0.70);
        let bar = split_bar(&parts, 40, COLOURED);
        assert_eq!(text(&bar), " cpu 25%     asleep 70%                 ");
        assert_eq!(bar.iter().map(|span| span.content.len()).collect::<Vec<_>>(), [10, 2, 28]);
        assert_eq!(text(&split_bar(&parts, 40, PLAIN)), " cpu 25%  ww asleep 70%                 ");
        assert_eq!(text(&split_bar(&parts, 4, PLAIN)), "caaa");
    }

    #[test]
    fn a_queue_shows_each_connection_its_peak_and_its_limit() {
        assert_eq!(queue_bar(0, 0, 128, 8, PLAIN), "........");
        assert_eq!(queue_bar(1, 64, 4096, 8, PLAIN), "#.......");
        assert_eq!(queue_bar(32, 96, 128, 8, PLAIN), "##...|..");
        assert_eq!(queue_bar(200, 200, 128, 8, PLAIN), "########");
        assert_eq!(queue_bar(1, 1, 0, 8, PLAIN), "########");
    }

    #[test]
    fn a_history_is_scaled_to_its_worst_second() {
        let points =
            [Point { p99: 0.0, max: 0.0 }, Point { p99: 0.05, max: 0.1 }, Point { p99: 0.1, max: 0.1 }];
        let lines = history(points.into_iter(), 13, 2, PLAIN);
        let rows: Vec<String> = lines.iter().map(|line| text(&line.spans)).collect();
        assert_eq!(rows, ["  100 ms  #: ", "       0  ## "]);
        assert_eq!(history(points.into_iter(), 5, 1, COLOURED).len(), 1);
        assert!(history([].into_iter(), 0, 1, COLOURED).len() == 1);
    }
}
