//! Draws the picture of the live view in the README: the real view on an example, as SVG.

use std::fmt::Write as _;

use observer_common::block::Block;
use ratatui::{
    Terminal,
    backend::TestBackend,
    buffer::{Buffer, Cell},
    style::{Color, Modifier},
};

use super::{
    state::State,
    testing::{frame, histogram, kind, snapshot},
    theme::Theme,
    view::{Extras, draw},
};
use crate::{
    generated::assert_current,
    model::{
        busy::{Cause, Split},
        frame::StackSample,
        snapshot::Snapshot,
        stall::{Stall, Stalls},
    },
};

/// Size of the terminal in characters.
const SIZE: (u16, u16) = (104, 28);

/// Size of a character in pixels, and the position of its baseline.
const CELL: (f32, f32) = (8.4, 18.0);
const BASELINE: f32 = 13.5;

const FOREGROUND: &str = "#d8dee9";
const BACKGROUND: &str = "#1e2430";

const COLOURS: Theme = Theme { has_colours: true, has_blocks: true };

fn hex(colour: Color) -> Option<&'static str> {
    match colour {
        Color::Black => Some(BACKGROUND),
        Color::Red | Color::LightRed => Some("#f07178"),
        Color::Green | Color::LightGreen => Some("#a3be8c"),
        Color::Yellow => Some("#ebcb8b"),
        Color::Blue => Some("#81a1c1"),
        Color::Magenta => Some("#b48ead"),
        Color::Cyan => Some("#88c0d0"),
        Color::Gray => Some("#aeb6c5"),
        Color::DarkGray => Some("#7d8799"),
        _ => None,
    }
}

/// Foreground, background and attributes of a cell.
type Look = (&'static str, Option<&'static str>, Modifier);

fn look(cell: &Cell) -> Look {
    let (foreground, background) = (hex(cell.fg).unwrap_or(FOREGROUND), hex(cell.bg));
    if cell.modifier.contains(Modifier::REVERSED) {
        (background.unwrap_or(BACKGROUND), Some(foreground), cell.modifier)
    } else {
        (foreground, background, cell.modifier)
    }
}

fn svg(buffer: &Buffer) -> String {
    let (width, height) = (f32::from(SIZE.0) * CELL.0 + 20.0, f32::from(SIZE.1) * CELL.1 + 20.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"ui-monospace, \
         SFMono-Regular, Menlo, Consolas, monospace\" font-size=\"14\">\n\
         <title>The live view of observer</title>\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"{BACKGROUND}\"/>\n"
    );
    for (row, line) in buffer.content().chunks(SIZE.0.into()).enumerate() {
        let y = 10.0 + row as f32 * CELL.1;
        let mut column = 0;
        for run in line.chunk_by(|a, b| look(a) == look(b)) {
            let (x, length) = (10.0 + column as f32 * CELL.0, run.len() as f32 * CELL.0);
            column += run.len();
            write_run(&mut svg, run, (x, y), length);
        }
    }
    svg + "</svg>\n"
}

/// Writes cells of one style.
fn write_run(svg: &mut String, run: &[Cell], (x, y): (f32, f32), length: f32) {
    let (foreground, background, modifier) = look(&run[0]);
    if let Some(background) = background {
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{}\" fill=\"{background}\"/>",
            CELL.1
        );
    }
    let text: String = run.iter().map(Cell::symbol).collect();
    if text.trim().is_empty() {
        return;
    }
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let bold = if modifier.contains(Modifier::BOLD) { " font-weight=\"bold\"" } else { "" };
    let line = if modifier.contains(Modifier::UNDERLINED) { " text-decoration=\"underline\"" } else { "" };
    // The length keeps columns aligned where a font is wider than assumed.
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{:.1}\" textLength=\"{length:.1}\" lengthAdjust=\"spacingAndGlyphs\" \
         xml:space=\"preserve\" fill=\"{foreground}\"{bold}{line}>{text}</text>",
        y + BASELINE
    );
}

/// A server whose loop now and then waits for a database, computes for long, and enqueues tasks, after `seconds`.
fn example(seconds: u32) -> Snapshot {
    let blocks = seconds.saturating_sub(2) / 3;
    let mut snapshot = snapshot(f64::from(seconds), |reactor| {
        "MainThread".clone_into(&mut reactor.name);
        let (count, waits) = (u64::from(blocks), u64::from(seconds) * 120);
        // An event that arrives during a block waits for the rest of it.
        let in_blocks = [(20, 80), (60, 80), (100, 70), (150, 60), (200, 40)];
        let idle = [(0, u64::from(seconds) * 1000 - count * 330)];
        reactor.lag = histogram(&[&in_blocks.map(|(ms, n)| (ms, n * count))[..], &idle].concat());
        reactor.slice = histogram(&[(1, waits), (120, count), (210, count)]);
        reactor.event_delay = histogram(&[(120, count), (210, count)]);
        (reactor.waits, reactor.events, reactor.slices) = (waits, waits, waits);
        reactor.wait_seconds = f64::from(seconds) * 0.85;
        reactor.busy_seconds = f64::from(seconds) * 0.04 + f64::from(blocks) * 0.33;
        reactor.utilization = Some(reactor.busy_seconds / (reactor.busy_seconds + reactor.wait_seconds));
        let mut split =
            Split { cpu: f64::from(seconds) * 0.04 + f64::from(blocks) * 0.11, ..Split::default() };
        split.runqueue = f64::from(blocks) * 0.01;
        split.blocked.network = f64::from(blocks) * 0.21;
        reactor.split_seconds = split;
        let mut stalls = Stalls::over(0.05);
        for _ in 0..blocks {
            let network = Cause::Blocked(Block::Network);
            stalls.add(stall(0.21, network, Some("recvfrom")), stack([("query", 88), ("orders", 41)]));
            stalls.add(stall(0.12, Cause::Cpu, None), stack([("render", 203), ("invoice", 57)]));
        }
        reactor.stalls = stalls.ranked(reactor.lag.sum() * 0.001);
    });
    let target = &mut snapshot.targets[0];
    (target.pid, target.comm) = (4711, "shop".into());
    target.reactors[0].tid = 4711;
    let listener = &mut target.listeners[0];
    "0.0.0.0:8000".clone_into(&mut listener.address);
    (listener.depth, listener.peak) = (3, 17);
    listener.arrivals = u64::from(seconds) * 90;
    listener.accepts = listener.arrivals - 3;
    listener.oldest_seconds = Some(0.062);
    listener.wait = histogram(&[(1, listener.accepts * 9 / 10), (90, listener.accepts / 10)]);
    target.deferred =
        vec![kind("send_receipt", u64::from(seconds) * 12), kind("resize_image", u64::from(seconds) * 4)];
    target.deferred[0].pending = 31;
    target.deferred[0].oldest_seconds = Some(0.84);
    snapshot
}

fn stack(functions: [(&str, u32); 2]) -> StackSample {
    let frames = functions.map(|(function, line)| frame(function, "/srv/shop/app.py", line));
    StackSample { frames: frames.into(), ..StackSample::default() }
}

fn stall(seconds: f64, cause: Cause, syscall: Option<&str>) -> Stall {
    let mut split = Split::default();
    match cause {
        Cause::Cpu => split.cpu = seconds,
        _ => split.blocked.network = seconds,
    }
    Stall {
        start: "2026-11-24T12:00:00Z".into(),
        seconds,
        cause,
        syscall: syscall.map(Into::into),
        behind: None,
        events_waited: Some(true),
        split_seconds: split,
        origin: None,
        site: 0,
    }
}

#[test]
fn generated_picture_shows_the_view() {
    let mut state = State::default();
    for seconds in 1..=30 {
        state.update(example(seconds));
    }
    let mut terminal = Terminal::new(TestBackend::new(SIZE.0, SIZE.1)).unwrap();
    terminal.draw(|frame| draw(frame, &mut state, &Extras::default(), COLOURS)).unwrap();
    assert_current("live.svg", &svg(terminal.backend().buffer()));
}
