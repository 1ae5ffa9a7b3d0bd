//! What is shown: rows in their order, the filter, what is selected, which page. Knows keys, but no terminal.

use std::cmp::Ordering;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::recent::{KindKey, KindWindow, LoopKey, LoopWindow, Point, QueueKey, QueueWindow, Recent};
use crate::model::{
    deferred::Deferred,
    snapshot::{Listener, Reactor, Snapshot, Target},
};

/// The order of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    /// Those that are late most come first.
    Late,
    /// Those that have most to do come first.
    Busy,
    /// By process and name.
    Name,
}

impl Sort {
    /// As the heading has it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Late => "latest first",
            Self::Busy => "busiest first",
            Self::Name => "by name",
        }
    }

    const fn next(self) -> Self {
        match self {
            Self::Late => Self::Busy,
            Self::Busy => Self::Name,
            Self::Name => Self::Late,
        }
    }
}

/// One of the lists, in the order in which they are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum List {
    Loops,
    Queues,
    Kinds,
}

impl List {
    const ALL: [Self; 3] = [Self::Loops, Self::Queues, Self::Kinds];
}

/// What fills the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    Overview,
    /// All about what is selected.
    Details,
    Help,
}

/// What a key leads to, beside another picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Stay,
    Quit,
}

/// An event loop, by its places in the snapshot.
pub(super) struct LoopRow {
    target: usize,
    reactor: usize,
    pub(super) window: LoopWindow,
}

/// An accept queue, by its places in the snapshot.
pub(super) struct QueueRow {
    target: usize,
    listener: usize,
    pub(super) window: QueueWindow,
}

/// A kind of deferred work, by its places in the snapshot.
pub(super) struct KindRow {
    target: usize,
    kind: usize,
    pub(super) window: KindWindow,
}

/// Everything that decides what the screen shows.
pub(super) struct State {
    recent: Recent,
    /// What is shown; `None` before the first look.
    snapshot: Option<Snapshot>,
    loops: Vec<LoopRow>,
    queues: Vec<QueueRow>,
    kinds: Vec<KindRow>,
    /// Looks taken since the picture was stopped; `None` while it moves.
    paused: Option<usize>,
    pub(super) page: Page,
    pub(super) list: List,
    pub(super) sort: Sort,
    pub(super) filter: String,
    /// Whether keys go into the filter.
    pub(super) is_typing: bool,
    /// What the user has chosen; where there is none or it is gone, the first row is.
    chosen_loop: Option<LoopKey>,
    chosen_queue: Option<QueueKey>,
    chosen_kind: Option<KindKey>,
    /// Lines of a long page that are above the screen; drawing limits it.
    pub(super) scrolled: u16,
}

impl Default for State {
    fn default() -> Self {
        Self {
            recent: Recent::default(),
            snapshot: None,
            loops: Vec::new(),
            queues: Vec::new(),
            kinds: Vec::new(),
            paused: None,
            page: Page::Overview,
            list: List::Loops,
            sort: Sort::Late,
            filter: String::new(),
            is_typing: false,
            chosen_loop: None,
            chosen_queue: None,
            chosen_kind: None,
            scrolled: 0,
        }
    }
}

impl State {
    /// Takes a look in; shows it unless the picture is stopped.
    pub(super) fn look(&mut self, snapshot: Snapshot) {
        self.recent.look(&snapshot);
        if let Some(looks) = &mut self.paused {
            *looks += 1;
            return;
        }
        let targets = || snapshot.targets.iter().enumerate();
        self.loops = targets()
            .flat_map(|(target, t)| (0..t.reactors.len()).map(move |reactor| (target, t, reactor)))
            .filter(|(_, t, reactor)| !t.reactors[*reactor].exited)
            .map(|(target, t, reactor)| {
                let window = self.recent.of_loop(t.pid, &t.reactors[reactor]);
                LoopRow { target, reactor, window }
            })
            .collect();
        self.queues = targets()
            .flat_map(|(target, t)| (0..t.listeners.len()).map(move |listener| (target, t, listener)))
            .filter(|(_, t, listener)| !t.listeners[*listener].closed)
            .map(|(target, t, listener)| {
                let window = self.recent.of_queue(t.pid, &t.listeners[listener]);
                QueueRow { target, listener, window }
            })
            .collect();
        self.kinds = targets()
            .filter(|(_, t)| !t.exited)
            .flat_map(|(target, t)| (0..t.deferred.len()).map(move |kind| (target, t, kind)))
            .map(|(target, t, kind)| {
                let window = self.recent.of_kind(t.pid, &t.deferred[kind]);
                KindRow { target, kind, window }
            })
            .collect();
        self.snapshot = Some(snapshot);
        self.arrange();
    }

    pub(super) fn snapshot(&self) -> Option<&Snapshot> {
        self.snapshot.as_ref()
    }

    pub(super) const fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// All event loops there are, in their order, whatever the filter says.
    pub(super) fn all_loops(&self) -> impl Iterator<Item = (&LoopRow, &Target, &Reactor)> {
        let targets = self.snapshot.as_ref().map_or(&[][..], |snapshot| &snapshot.targets);
        self.loops.iter().map(|row| {
            let target = &targets[row.target];
            (row, target, &target.reactors[row.reactor])
        })
    }

    /// All accept queues there are, in their order, whatever the filter says.
    pub(super) fn all_queues(&self) -> impl Iterator<Item = (&QueueRow, &Target, &Listener)> {
        let targets = self.snapshot.as_ref().map_or(&[][..], |snapshot| &snapshot.targets);
        self.queues.iter().map(|row| {
            let target = &targets[row.target];
            (row, target, &target.listeners[row.listener])
        })
    }

    /// All kinds of deferred work there are, in their order, whatever the filter says.
    pub(super) fn all_kinds(&self) -> impl Iterator<Item = (&KindRow, &Target, &Deferred)> {
        let targets = self.snapshot.as_ref().map_or(&[][..], |snapshot| &snapshot.targets);
        self.kinds.iter().map(|row| {
            let target = &targets[row.target];
            (row, target, &target.deferred[row.kind])
        })
    }

    /// Those whose name or process the filter finds.
    pub(super) fn loops(&self) -> impl Iterator<Item = (&LoopRow, &Target, &Reactor)> {
        self.all_loops()
            .filter(|(_, target, reactor)| self.is_wanted(target, &[&reactor.name, &reactor.tid.to_string()]))
    }

    /// Those whose address or process the filter finds.
    pub(super) fn queues(&self) -> impl Iterator<Item = (&QueueRow, &Target, &Listener)> {
        self.all_queues().filter(|(_, target, listener)| self.is_wanted(target, &[&listener.name()]))
    }

    /// Those whose name or process the filter finds.
    pub(super) fn kinds(&self) -> impl Iterator<Item = (&KindRow, &Target, &Deferred)> {
        self.all_kinds().filter(|(_, target, kind)| self.is_wanted(target, &[&kind.task]))
    }

    fn is_wanted(&self, target: &Target, names: &[&str]) -> bool {
        let filter = self.filter.to_lowercase();
        let pid = target.pid.to_string();
        let mut all = [target.comm.as_str(), &pid].into_iter().chain(names.iter().copied());
        all.any(|name| name.to_lowercase().contains(&filter))
    }

    /// Place of the selected loop among those shown.
    pub(super) fn selected_loop(&self) -> usize {
        let place = self.loops().position(|(_, target, reactor)| {
            self.chosen_loop.is_some_and(|chosen| chosen == (target.pid, reactor.tid))
        });
        place.unwrap_or(0)
    }

    /// Place of the selected queue among those shown.
    pub(super) fn selected_queue(&self) -> usize {
        let place = self.queues().position(|(_, target, listener)| {
            self.chosen_queue
                .as_ref()
                .is_some_and(|(pid, name)| *pid == target.pid && *name == listener.name())
        });
        place.unwrap_or(0)
    }

    /// Place of the selected kind of work among those shown.
    pub(super) fn selected_kind(&self) -> usize {
        let place = self.kinds().position(|(_, target, kind)| {
            self.chosen_kind.as_ref().is_some_and(|(pid, task)| *pid == target.pid && *task == kind.task)
        });
        place.unwrap_or(0)
    }

    /// Delays of a loop second by second, newest first.
    pub(super) fn history_of_loop(&self, key: LoopKey) -> impl Iterator<Item = Point> {
        self.recent.history_of_loop(key).rev().skip(self.paused.unwrap_or(0))
    }

    /// Waits in a queue second by second, newest first.
    pub(super) fn history_of_queue(&self, key: &QueueKey) -> impl Iterator<Item = Point> {
        self.recent.history_of_queue(key).rev().skip(self.paused.unwrap_or(0))
    }

    /// Waits of a kind of work second by second, newest first.
    pub(super) fn history_of_kind(&self, key: &KindKey) -> impl Iterator<Item = Point> {
        self.recent.history_of_kind(key).rev().skip(self.paused.unwrap_or(0))
    }

    /// Brings rows into their order.
    fn arrange(&mut self) {
        let Some(snapshot) = &self.snapshot else { return };
        let (sort, targets) = (self.sort, &snapshot.targets);
        let names = |target: usize| (&targets[target].comm, targets[target].pid);
        self.loops.sort_by(|a, b| {
            let lateness = |row: &LoopRow| (row.window.lag.mean(), row.window.lag.max());
            let busy = |row: &LoopRow| row.window.utilization.unwrap_or(0.0);
            let reactor = |row: &LoopRow| {
                let reactor = &targets[row.target].reactors[row.reactor];
                (names(row.target), &reactor.name, reactor.tid)
            };
            let order = match sort {
                Sort::Late => {
                    descending(lateness(a).0, lateness(b).0).then(descending(lateness(a).1, lateness(b).1))
                }
                Sort::Busy => descending(busy(a), busy(b)),
                Sort::Name => Ordering::Equal,
            };
            order.then_with(|| reactor(a).cmp(&reactor(b)))
        });
        self.queues.sort_by(|a, b| {
            let listener = |row: &QueueRow| &targets[row.target].listeners[row.listener];
            let longest =
                |row: &QueueRow| row.window.wait.max().max(listener(row).oldest_seconds.unwrap_or(0.0));
            let order = match sort {
                Sort::Late => descending(longest(a), longest(b)),
                Sort::Busy => b.window.accepts.cmp(&a.window.accepts),
                Sort::Name => Ordering::Equal,
            };
            let key = |row: &QueueRow| (names(row.target), listener(row).name());
            order.then_with(|| key(a).cmp(&key(b)))
        });
        self.kinds.sort_by(|a, b| {
            let kind = |row: &KindRow| &targets[row.target].deferred[row.kind];
            let order = match sort {
                Sort::Late => descending(a.window.wait.max(), b.window.wait.max()),
                Sort::Busy => b.window.started.cmp(&a.window.started),
                Sort::Name => Ordering::Equal,
            };
            let key = |row: &KindRow| (names(row.target), &kind(row).task);
            order.then_with(|| key(a).cmp(&key(b)))
        });
    }

    /// Does what a key asks for.
    pub(super) fn press(&mut self, key: KeyEvent) -> Outcome {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return if key.code == KeyCode::Char('c') { Outcome::Quit } else { Outcome::Stay };
        }
        if self.is_typing {
            self.type_into_filter(key.code);
            return Outcome::Stay;
        }
        match key.code {
            KeyCode::Char('q') => return Outcome::Quit,
            KeyCode::Char('?' | 'h') | KeyCode::F(1) => {
                self.show(if self.page == Page::Help { Page::Overview } else { Page::Help });
            }
            KeyCode::Char('p' | ' ') => {
                self.paused = if self.paused.is_some() { None } else { Some(0) };
            }
            KeyCode::Char('s') => {
                self.sort = self.sort.next();
                self.arrange();
            }
            KeyCode::Char('/' | 'f') => {
                self.show(Page::Overview);
                self.is_typing = true;
            }
            KeyCode::Esc if self.page == Page::Overview => self.filter.clear(),
            KeyCode::Esc | KeyCode::Backspace | KeyCode::Left => self.show(Page::Overview),
            KeyCode::Enter | KeyCode::Right if self.page == Page::Overview && self.has_selection() => {
                self.show(Page::Details);
            }
            KeyCode::Tab => self.change_list(1),
            KeyCode::BackTab => self.change_list(List::ALL.len() - 1),
            KeyCode::Up | KeyCode::Char('k') => self.go(-1),
            KeyCode::Down | KeyCode::Char('j') => self.go(1),
            KeyCode::PageUp => self.go(-10),
            KeyCode::PageDown => self.go(10),
            KeyCode::Home => self.go(-i32::from(u16::MAX)),
            KeyCode::End => self.go(i32::from(u16::MAX)),
            _ => {}
        }
        Outcome::Stay
    }

    fn type_into_filter(&mut self, code: KeyCode) {
        match code {
            KeyCode::Char(letter) => self.filter.push(letter),
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            _ => {}
        }
    }

    fn show(&mut self, page: Page) {
        self.page = page;
        self.scrolled = 0;
    }

    /// Goes so many lists on, or as many again where there is nothing in that one.
    fn change_list(&mut self, by: usize) {
        self.scrolled = 0;
        for _ in List::ALL {
            let place = List::ALL.iter().position(|list| *list == self.list).unwrap_or(0);
            self.list = List::ALL[(place + by) % List::ALL.len()];
            if self.has_selection() {
                return;
            }
        }
    }

    fn has_selection(&self) -> bool {
        match self.list {
            List::Loops => self.loops().next().is_some(),
            List::Queues => self.queues().next().is_some(),
            List::Kinds => self.kinds().next().is_some(),
        }
    }

    /// Moves by so many rows, or lines of a long page.
    fn go(&mut self, by: i32) {
        if self.page != Page::Overview {
            let line = i32::from(self.scrolled).saturating_add(by).clamp(0, u16::MAX.into());
            self.scrolled = u16::try_from(line).unwrap_or(u16::MAX);
            return;
        }
        let moved = |place: usize, count: usize| {
            let place = i32::try_from(place).unwrap_or(0).saturating_add(by).max(0);
            usize::try_from(place).unwrap_or(0).min(count.saturating_sub(1))
        };
        match self.list {
            List::Loops => {
                let place = moved(self.selected_loop(), self.loops().count());
                let chosen = self.loops().nth(place).map(|(_, target, reactor)| (target.pid, reactor.tid));
                self.chosen_loop = chosen;
            }
            List::Queues => {
                let place = moved(self.selected_queue(), self.queues().count());
                let chosen = self.queues().nth(place);
                self.chosen_queue = chosen.map(|(_, target, listener)| (target.pid, listener.name()));
            }
            List::Kinds => {
                let place = moved(self.selected_kind(), self.kinds().count());
                let chosen = self.kinds().nth(place);
                self.chosen_kind = chosen.map(|(_, target, kind)| (target.pid, kind.task.clone()));
            }
        }
    }
}

fn descending(a: f64, b: f64) -> Ordering {
    b.total_cmp(&a)
}

#[cfg(test)]
mod tests {
    use super::{super::testing, *};

    fn press(state: &mut State, keys: &[KeyCode]) {
        for &key in keys {
            assert_eq!(state.press(key.into()), Outcome::Stay);
        }
    }

    fn typed(state: &mut State, text: &str) {
        for letter in text.chars() {
            press(state, &[KeyCode::Char(letter)]);
        }
    }

    /// Three loops: one late, one busy, one neither; two queues.
    fn state(seconds: f64) -> State {
        let mut snapshot = testing::snapshot(seconds, |reactor| testing::slept(reactor, 3));
        let add = |snapshot: &mut Snapshot, name: &str, tid: u32, busy: f64| {
            let mut reactor = testing::snapshot(seconds, |_| {}).targets.remove(0).reactors.remove(0);
            (reactor.name, reactor.tid, reactor.busy_seconds) = (name.into(), tid, busy);
            snapshot.targets[0].reactors.push(reactor);
        };
        add(&mut snapshot, "busy", 12, 100.0);
        add(&mut snapshot, "alpha", 13, 0.0);
        let mut other = snapshot.targets[0].listeners[0].clone();
        (other.address, other.oldest_seconds) = ("[::]:443".into(), Some(3.0));
        snapshot.targets[0].listeners.push(other);
        let mut state = State::default();
        state.look(snapshot);
        state
    }

    fn names(state: &State) -> Vec<&str> {
        state.loops().map(|(_, _, reactor)| reactor.name.as_str()).collect()
    }

    #[test]
    fn rows_are_sorted_as_asked_and_the_selection_stays() {
        let mut state = state(1.0);
        assert_eq!(names(&state), ["reactor", "alpha", "busy"]);
        assert_eq!(state.queues().next().unwrap().2.address, "[::]:443");
        press(&mut state, &[KeyCode::Down, KeyCode::Char('s')]);
        assert_eq!((names(&state), state.selected_loop()), (vec!["busy", "reactor", "alpha"], 2));
        press(&mut state, &[KeyCode::Char('s')]);
        assert_eq!((names(&state), state.selected_loop()), (vec!["alpha", "busy", "reactor"], 0));
        press(&mut state, &[KeyCode::PageDown, KeyCode::Char('s')]);
        assert_eq!((names(&state)[0], state.selected_loop()), ("reactor", 0));
    }

    #[test]
    fn the_filter_finds_names_addresses_and_processes() {
        let mut state = state(1.0);
        press(&mut state, &[KeyCode::Char('/')]);
        typed(&mut state, "ALQ");
        assert_eq!(names(&state).len(), 0);
        press(&mut state, &[KeyCode::Backspace, KeyCode::Enter]);
        assert_eq!((names(&state), state.queues().count()), (vec!["alpha"], 0));
        assert_eq!(state.all_loops().count(), 3);
        press(&mut state, &[KeyCode::Esc]);
        assert_eq!((names(&state).len(), state.queues().count()), (3, 2));
        // `q` is a letter while one types, and Ctrl-C is not.
        press(&mut state, &[KeyCode::Char('f')]);
        typed(&mut state, "443q");
        assert_eq!(state.filter, "443q");
        let interrupt = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(state.press(interrupt), Outcome::Quit);
    }

    #[test]
    fn details_open_and_close() {
        let mut state = state(1.0);
        press(&mut state, &[KeyCode::Enter, KeyCode::Down]);
        assert_eq!((state.page, state.scrolled), (Page::Details, 1));
        press(&mut state, &[KeyCode::Esc, KeyCode::Tab, KeyCode::Down, KeyCode::Enter]);
        assert_eq!((state.page, state.list, state.selected_queue()), (Page::Details, List::Queues, 1));
        press(&mut state, &[KeyCode::Char('?')]);
        assert_eq!((state.page, state.scrolled), (Page::Help, 0));
        press(&mut state, &[KeyCode::Esc]);
        assert_eq!(state.page, Page::Overview);
        assert_eq!(state.press(KeyCode::Char('q').into()), Outcome::Quit);
    }

    #[test]
    fn kinds_of_work_are_a_list_of_their_own() {
        let mut snapshot = testing::snapshot(1.0, |_| {});
        snapshot.targets[0].deferred = vec![testing::kind("archive", 5), testing::kind("mail", 50)];
        let mut state = State::default();
        state.look(snapshot);
        let tasks = |state: &State| state.kinds().map(|(.., kind)| kind.task.clone()).collect::<Vec<_>>();
        assert_eq!(tasks(&state), ["archive", "mail"]);
        press(&mut state, &[KeyCode::BackTab, KeyCode::Down, KeyCode::Char('s')]);
        assert_eq!((state.list, tasks(&state)), (List::Kinds, vec!["mail".into(), "archive".into()]));
        assert_eq!(state.selected_kind(), 0);
        press(&mut state, &[KeyCode::Tab]);
        assert_eq!(state.list, List::Loops);
        press(&mut state, &[KeyCode::Char('/')]);
        typed(&mut state, "arch");
        press(&mut state, &[KeyCode::Enter, KeyCode::Tab, KeyCode::Enter]);
        assert_eq!(
            (tasks(&state), state.list, state.page),
            (vec!["archive".into()], List::Kinds, Page::Details)
        );
        state.look(testing::snapshot(2.0, |_| {}));
        assert_eq!(state.kinds().count(), 0);
        // Where the list is empty the next one is gone to.
        press(&mut state, &[KeyCode::Esc, KeyCode::Esc, KeyCode::Tab]);
        assert_eq!(state.list, List::Loops);
    }

    #[test]
    fn a_stopped_picture_stands_still_and_nothing_is_missed() {
        let mut state = state(1.0);
        let history = |state: &State| state.history_of_loop((10, 11)).collect::<Vec<_>>();
        press(&mut state, &[KeyCode::Char('p')]);
        let before = history(&state);
        state.look(testing::snapshot(2.0, |reactor| testing::slept(reactor, 9)));
        assert_eq!(state.snapshot().unwrap().duration_seconds, 1.0);
        assert_eq!((names(&state).len(), history(&state)), (3, before));
        press(&mut state, &[KeyCode::Char('p')]);
        state.look(testing::snapshot(3.0, |reactor| testing::slept(reactor, 9)));
        assert_eq!((names(&state).len(), history(&state).len()), (1, 3));
        assert_eq!(state.loops().next().unwrap().0.window.stalls, 9);
    }

    #[test]
    fn no_key_hurts_where_nothing_is_shown() {
        let mut state = State::default();
        for key in "?ps/f \t".chars() {
            press(
                &mut state,
                &[KeyCode::Char(key), KeyCode::Esc, KeyCode::Enter, KeyCode::Down, KeyCode::Tab],
            );
        }
        assert_eq!(state.page, Page::Overview);
    }
}
