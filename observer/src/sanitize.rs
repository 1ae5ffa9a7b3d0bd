//! Cleans text for terminals. Processes and their clients choose names and paths; these must not control the terminal,
//! forge lines of observer's output, or change the direction of the text beside them.

use std::{
    borrow::Cow,
    fmt,
    io::{self, Write},
};

/// Whether a character is shown unchanged. All others are shown as U+FFFD, or left out where columns must stay
/// aligned.
pub(crate) fn is_shown(character: char) -> bool {
    // Besides control characters: line and paragraph separators, and characters that change the direction of the text.
    let changes_layout = matches!(character, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !character.is_control() && !changes_layout
}

/// Cleans text of one line.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    if text.chars().all(is_shown) {
        return text.into();
    }
    text.chars().map(|c| if is_shown(c) { c } else { char::REPLACEMENT_CHARACTER }).collect()
}

/// Cleans text of several lines, such as an error message with its causes.
pub(crate) fn clean_lines(text: &str) -> String {
    text.split('\n').map(clean).collect::<Vec<_>>().join("\n")
}

/// A writer for which each `writeln!` produces exactly one line, whatever the arguments contain.
pub(crate) struct Lines<'a>(pub(crate) &'a mut dyn Write);

impl Lines<'_> {
    pub(crate) fn write_fmt(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        let text = text.to_string();
        let (line, end) = text.strip_suffix('\n').map_or((&*text, ""), |line| (line, "\n"));
        write!(self.0, "{}{end}", clean(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_controls_a_terminal_is_not_written() {
        assert_eq!(clean("söme → text 漢字"), "söme → text 漢字");
        // A terminal's title, an 8-bit colour sequence, a change of direction.
        assert_eq!(
            clean("\x1b]0;x\x07 \u{9b}31m \u{202e}txt.exe"),
            "\u{fffd}]0;x\u{fffd} \u{fffd}31m \u{fffd}txt.exe"
        );
        assert_eq!(clean_lines("a\r\n\tb\n"), "a\u{fffd}\n\u{fffd}b\n");
        let mut written = Vec::new();
        let mut lines = Lines(&mut written);
        let name = "@a\nLATE: b\u{2028}";
        writeln!(lines, "listener {name}").unwrap();
        write!(lines, "{}", 1).unwrap();
        writeln!(lines).unwrap();
        assert_eq!(String::from_utf8(written).unwrap(), "listener @a\u{fffd}LATE: b\u{fffd}\n1\n");
    }
}
