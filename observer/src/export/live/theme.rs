//! Colours and characters of the live view. NO_COLOR turns colours off, and the locale decides whether block characters
//! are used. No information is shown by colour alone.

use std::env;

use observer_common::block::Block;
use ratatui::style::{Color, Modifier, Style};

use crate::model::{busy::Cause, late::LATE};

/// Delays from here on are highlighted, in seconds.
const NOTABLE: f64 = 0.010;

/// What the terminal can display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Theme {
    pub(super) has_colours: bool,
    /// Whether the terminal shows block characters; if not, only ASCII is used.
    pub(super) has_blocks: bool,
}

impl Theme {
    /// Reads NO_COLOR and the locale.
    pub(super) fn of_environment() -> Self {
        let is_set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find(|name| is_set(name));
        let locale = locale.and_then(|name| env::var(name).ok()).unwrap_or_default().to_lowercase();
        Self {
            has_colours: !is_set("NO_COLOR"),
            has_blocks: locale.contains("utf-8") || locale.contains("utf8"),
        }
    }

    fn coloured(self, colour: Color, otherwise: Modifier) -> Style {
        if self.has_colours { Style::new().fg(colour) } else { Style::new().add_modifier(otherwise) }
    }

    pub(super) fn bad(self) -> Style {
        self.coloured(Color::Red, Modifier::BOLD).add_modifier(Modifier::BOLD)
    }

    pub(super) fn good(self) -> Style {
        self.coloured(Color::Green, Modifier::BOLD)
    }

    pub(super) fn heading(self) -> Style {
        self.coloured(Color::Cyan, Modifier::UNDERLINED).add_modifier(Modifier::BOLD)
    }

    pub(super) fn quiet(self) -> Style {
        self.coloured(Color::DarkGray, Modifier::empty())
    }

    pub(super) fn title(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }

    pub(super) fn selected(self) -> Style {
        Style::new().add_modifier(Modifier::BOLD)
    }

    pub(super) fn delay(self, seconds: f64) -> Style {
        match seconds {
            s if s >= LATE => self.bad(),
            s if s >= NOTABLE => self.coloured(Color::Yellow, Modifier::empty()),
            _ => Style::new(),
        }
    }

    /// The style of a part of a bar. Without colours every other part is `reversed`, so that neighbours differ.
    pub(super) fn part(self, cause: Cause, reversed: bool) -> Style {
        if !self.has_colours {
            return if reversed { Style::new().add_modifier(Modifier::REVERSED) } else { Style::new() };
        }
        let colour = match cause {
            Cause::Cpu => Color::Green,
            Cause::Runqueue => Color::Yellow,
            Cause::Blocked(Block::Sleep) => Color::Magenta,
            Cause::Blocked(Block::Lock) => Color::Red,
            Cause::Blocked(Block::Disk) => Color::Cyan,
            Cause::Blocked(Block::Network) => Color::Blue,
            Cause::Blocked(Block::PageFault) => Color::LightRed,
            Cause::Blocked(Block::Other) => Color::Gray,
            Cause::Gc => Color::LightGreen,
        };
        Style::new().fg(Color::Black).bg(colour)
    }

    /// Characters from an empty cell to a full one.
    pub(super) const fn levels(self) -> &'static [&'static str] {
        if self.has_blocks {
            &[" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"]
        } else {
            &[" ", ".", "o", "#"]
        }
    }

    /// A cell that only the maximum reaches.
    pub(super) const fn light(self) -> &'static str {
        if self.has_blocks { "░" } else { ":" }
    }

    /// The filled and the empty cell of a bar.
    pub(super) const fn bar_cells(self) -> (&'static str, &'static str) {
        if self.has_blocks { ("█", "░") } else { ("#", ".") }
    }

    /// The marker of the selected row.
    pub(super) const fn mark(self) -> &'static str {
        if self.has_blocks { "▶" } else { ">" }
    }
}

/// The names of causes in a bar.
pub(super) const fn short_name(cause: Cause) -> &'static str {
    match cause {
        Cause::Cpu => "cpu",
        Cause::Runqueue => "wait cpu",
        Cause::Blocked(Block::Lock) => "lock",
        Cause::Blocked(Block::Disk) => "file I/O",
        Cause::Blocked(Block::Network) => "network",
        Cause::Blocked(Block::Sleep) => "asleep",
        Cause::Blocked(Block::PageFault) => "page faults",
        Cause::Blocked(Block::Other) => "other",
        Cause::Gc => "gc",
    }
}
