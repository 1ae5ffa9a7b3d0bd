//! Puts the terminal into the state that the view needs, and restores it after a quit, an error, a signal or a panic.

use std::{
    io::{self, Write as _, stdout},
    panic,
    sync::Once,
};

use ratatui::crossterm::{
    cursor::{Hide, Show},
    execute,
    terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode},
};

use super::messages;

/// Owns the terminal until it is dropped.
pub(super) struct Screen;

impl Screen {
    /// Switches the terminal to raw mode and the alternate screen, and buffers messages.
    pub(super) fn take() -> io::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let previous = panic::take_hook();
            // The panic message goes to the shell's screen. If observer survives the panic, `retake` restores the view.
            panic::set_hook(Box::new(move |info| {
                leave();
                previous(info);
            }));
        });
        enter()?;
        Ok(Self)
    }

    /// Takes the terminal again if a panic has restored it. Returns whether that was the case.
    pub(super) fn retake(&self) -> io::Result<bool> {
        let is_lost = !messages::is_buffering();
        if is_lost {
            enter()?;
        }
        Ok(is_lost)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        leave();
    }
}

fn enter() -> io::Result<()> {
    messages::start_buffering();
    let entered = enable_raw_mode().and_then(|()| execute!(stdout(), EnterAlternateScreen, Hide));
    if entered.is_err() {
        leave();
    }
    entered
}

/// Restores the terminal and writes the buffered messages. Does nothing when called again.
fn leave() {
    if messages::stop_buffering() {
        // These fail if the terminal is gone; then there is nothing to restore.
        let _shown = execute!(stdout(), LeaveAlternateScreen, Show);
        let _cooked = disable_raw_mode();
        let _flushed = stdout().flush();
        messages::flush();
    }
}

#[cfg(test)]
mod tests {
    use std::{env, process::Command, thread, time::Duration};

    use super::*;

    const INSIDE: &str = "OBSERVER_TEST_PANIC_IN_VIEW";

    /// Runs this test again inside a terminal, where it panics.
    #[test]
    fn a_panic_restores_the_terminal_and_is_readable() {
        if env::var_os(INSIDE).is_some() {
            let _screen = Screen::take().unwrap();
            io::Write::write_all(&mut messages::Messages, b"held back\n").unwrap();
            panic!("on purpose");
        }
        let socket = format!("observer-panic-{}", std::process::id());
        let tmux = |arguments: &[&str]| {
            let output =
                Command::new("tmux").args(["-L", &socket, "-f", "/dev/null"]).args(arguments).output();
            output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let name = "export::live::screen::tests::a_panic_restores_the_terminal_and_is_readable";
        let exe = env::current_exe().unwrap();
        let inside =
            format!("{INSIDE}=1 {} --nocapture --exact {name}; stty -a; exec sleep 60", exe.display());
        if tmux(&["new-session", "-d", "-x", "150", "-y", "50", &inside]).is_err() {
            eprintln!("skipped: {name}: tmux is not installed");
            return;
        }
        let mut screen = String::new();
        for _ in 0..300 {
            screen = tmux(&["display-message", "-p", "#{alternate_on} #{cursor_flag}"]).unwrap();
            screen += &tmux(&["capture-pane", "-p"]).unwrap();
            if screen.contains("icanon") {
                break;
            }
            thread::sleep(Duration::from_millis(100));
        }
        tmux(&["kill-server"]).unwrap();
        assert!(screen.starts_with("0 1\n"), "{screen}");
        for part in ["held back", "on purpose", "icanon", " echo ", "isig"] {
            assert!(screen.contains(part), "{part} is missing: {screen}");
        }
        assert!(!screen.contains("-icanon") && !screen.contains("-isig"), "{screen}");
    }
}
