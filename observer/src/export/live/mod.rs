//! The live view: the terminal shows the last seconds, once a second and after every key, until the observation ends.

mod messages;
mod screen;
mod recent;
mod state;
mod finding;
mod work;
mod verdict;
mod theme;
mod graph;
mod tables;
mod details;
mod view;
#[cfg(test)]
pub(crate) mod testing;

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
use view::{Facts, draw};

/// Whether there is a terminal that the view can be shown on, and whose keys come here: not one that cannot place
/// text, and not one that another job has.
pub(crate) fn is_possible() -> bool {
    let is_able = env::var("TERM").is_ok_and(|name| !name.is_empty() && name != "dumb");
    let is_ours = || tcgetpgrp(stdout()).is_ok_and(|group| group == getpgrp());
    is_able && stdin().is_terminal() && stdout().is_terminal() && is_ours()
}

/// The view while it is shown. Dropping it gives the terminal back.
pub(crate) struct Live {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    state: State,
    facts: Facts,
    theme: Theme,
    keys: AsyncFd<Stdin>,
    resized: Signal,
    hung_up: Signal,
    quit: Signal,
    /// Dropped last, so that nothing is drawn after it.
    screen: Screen,
}

impl Live {
    /// Takes the terminal.
    pub(crate) fn start(endpoint: Option<String>, duration: Option<Duration>) -> Result<Self> {
        // SAFETY: standard input's descriptor is never closed.
        let keys = unsafe { AsyncFd::register_with_interest(stdin(), Interest::READABLE) }
            .map_err(|error| error.into_parts().1)?;
        // These would end observer without giving the terminal back.
        let (hung_up, quit) = (signal(SignalKind::hangup())?, signal(SignalKind::quit())?);
        let resized = signal(SignalKind::window_change())?;
        let screen = Screen::take()?;
        let mut live = Self {
            terminal: Terminal::new(CrosstermBackend::new(stdout()))?,
            state: State::default(),
            facts: Facts {
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

    /// Shows what is known now.
    pub(crate) fn show(&mut self, snapshot: Snapshot) -> Result<()> {
        self.state.look(snapshot);
        self.draw()
    }

    /// Follows keys and changes of the terminal's size; returns when the user has had enough.
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
        self.facts.message = messages::latest();
        self.terminal.draw(|frame| draw(frame, &mut self.state, &self.facts, self.theme))?;
        Ok(())
    }
}

/// How long a key may take that has begun to arrive.
const MOMENT: Duration = Duration::from_millis(20);

/// Whether a key has begun to arrive.
fn has_input() -> bool {
    let stdin = stdin();
    let mut input = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    poll(&mut input, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Takes in all keys that have been pressed.
fn take_keys(state: &mut State) -> Result<Outcome> {
    // Given no time, it does not even look.
    while event::poll(if has_input() { MOMENT } else { Duration::ZERO })? {
        if let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
            && state.press(key) == Outcome::Quit
        {
            return Ok(Outcome::Quit);
        }
    }
    Ok(Outcome::Stay)
}
