//! The live view: a terminal interface about the last ten seconds, redrawn once a second and after every key.

mod messages;
mod screen;
mod recent;
mod state;
mod finding;
mod tasks;
mod verdict;
mod theme;
mod graph;
mod tables;
mod details;
mod view;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod picture;

use std::{
    env,
    io::{IsTerminal as _, Stdin, Stdout, stdin, stdout},
    os::fd::AsFd as _,
    time::Duration,
};

use anyhow::Result;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{getpgrp, tcgetpgrp},
};
use ratatui::{
    Terminal,
    backend::CrosstermBackend,
    crossterm::event::{self, Event, KeyEventKind},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    select,
    signal::unix::{Signal, SignalKind, signal},
};

pub(crate) use messages::Messages;

use crate::model::snapshot::Snapshot;
use screen::Screen;
use state::{Outcome, State};
use theme::Theme;
use view::{Extras, draw};

/// Whether the view can be shown: standard input and output are a terminal that can position text, and observer is its
/// foreground job.
pub(crate) fn is_possible() -> bool {
    let is_able = env::var("TERM").is_ok_and(|name| !name.is_empty() && name != "dumb");
    let is_ours = || tcgetpgrp(stdout()).is_ok_and(|group| group == getpgrp());
    is_able && stdin().is_terminal() && stdout().is_terminal() && is_ours()
}

/// The view on the terminal. Dropping it restores the terminal.
pub(crate) struct Live {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    state: State,
    extras: Extras,
    theme: Theme,
    keys: AsyncFd<Stdin>,
    resized: Signal,
    hung_up: Signal,
    quit: Signal,
    /// The last field, so that it is dropped after everything that draws.
    screen: Screen,
}

impl Live {
    /// Takes the terminal and draws the view. `endpoint` is the URL of the metrics, `duration` the length of the observation.
    pub(crate) fn start(endpoint: Option<String>, duration: Option<Duration>) -> Result<Self> {
        // SAFETY: standard input's descriptor is never closed.
        let keys = unsafe { AsyncFd::register_with_interest(stdin(), Interest::READABLE) }
            .map_err(|error| error.into_parts().1)?;
        // By default these signals end the process, and the terminal would not be restored.
        let (hung_up, quit) = (signal(SignalKind::hangup())?, signal(SignalKind::quit())?);
        let resized = signal(SignalKind::window_change())?;
        let screen = Screen::take()?;
        let mut live = Self {
            terminal: Terminal::new(CrosstermBackend::new(stdout()))?,
            state: State::default(),
            extras: Extras {
                endpoint,
                duration: duration.map(|duration| duration.as_secs_f64()),
                message: None,
            },
            theme: Theme::of_environment(),
            keys,
            resized,
            hung_up,
            quit,
            screen,
        };
        live.draw()?;
        Ok(live)
    }

    /// Shows a snapshot.
    pub(crate) fn show(&mut self, snapshot: Snapshot) -> Result<()> {
        self.state.update(snapshot);
        self.draw()
    }

    /// Handles keys and changes of the terminal's size; returns when the user quits or the terminal hangs up.
    pub(crate) async fn until_quit(&mut self) -> Result<()> {
        loop {
            select! {
                ready = self.keys.readable() => {
                    let mut ready = ready?;
                    let outcome = take_keys(&mut self.state)?;
                    ready.clear_ready();
                    if outcome == Outcome::Quit {
                        return Ok(());
                    }
                }
                _ = self.resized.recv() => {}
                _ = self.hung_up.recv() => return Ok(()),
                _ = self.quit.recv() => return Ok(()),
            }
            self.draw()?;
        }
    }

    fn draw(&mut self) -> Result<()> {
        if self.screen.retake()? {
            self.terminal.clear()?;
        }
        self.extras.message = messages::latest();
        self.terminal.draw(|frame| draw(frame, &mut self.state, &self.extras, self.theme))?;
        Ok(())
    }
}

/// How long to wait for the rest of a key's escape sequence.
const KEY_TIMEOUT: Duration = Duration::from_millis(20);

/// Whether standard input has data.
fn has_input() -> bool {
    let stdin = stdin();
    let mut input = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    poll(&mut input, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Handles all keys that have been pressed.
fn take_keys(state: &mut State) -> Result<Outcome> {
    // With a timeout of zero, `event::poll` does not read standard input.
    while event::poll(if has_input() { KEY_TIMEOUT } else { Duration::ZERO })? {
        if let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
            && state.press(key) == Outcome::Quit
        {
            return Ok(Outcome::Quit);
        }
    }
    Ok(Outcome::Stay)
}
