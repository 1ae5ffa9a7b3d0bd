//! The state of the view: rows and their order, filter, selection, page. Handles keys, and never uses the terminal.

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
    /// Highest lag or longest wait first.
    Lag,
    /// Highest load first: busy time, accepts, or tasks that started.
    Load,
    /// By process name, process id and name.
    Name,
}

impl Sort {
    /// The order in the heading of the lists.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Lag => "by lag",
            Self::Load => "by load",
            Self::Name => "by name",
        }
    }

    const fn next(self) -> Self {
        match self {
            Self::Lag => Self::Load,
            Self::Load => Self::Name,
            Self::Name => Self::Lag,
        }
    }
}

/// A list of the overview. The variants are in the order of the screen.
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
    /// All values of the selected row.
    Details,
    Help,
}

/// Whether the view goes on after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Stay,
    Quit,
}

/// An event loop, by its indices in the snapshot.
pub(super) struct LoopRow {
    target: usize,
    reactor: usize,
    pub(super) window: LoopWindow,
}

/// An accept queue, by its indices in the snapshot.
pub(super) struct QueueRow {
    target: usize,
    listener: usize,
    pub(super) window: QueueWindow,
}

/// A kind of deferred tasks, by its indices in the snapshot.
pub(super) struct KindRow {
    target: usize,
    kind: usize,
    pub(super) window: KindWindow,
}

/// All that decides what the screen shows.
pub(super) struct State {
    recent: Recent,
    /// The snapshot on the screen; `None` before the first one.
    snapshot: Option<Snapshot>,
    loops: Vec<LoopRow>,
    queues: Vec<QueueRow>,
    kinds: Vec<KindRow>,
    /// Number of snapshots recorded since the view was paused; `None` unless it is paused.
    paused: Option<usize>,
    pub(super) page: Page,
    pub(super) list: List,
    pub(super) sort: Sort,
    pub(super) filter: String,
    /// Whether keys edit the filter.
    pub(super) is_typing: bool,
    /// The rows that the user has selected. If none is selected or the row is gone, the first row counts as selected.
    chosen_loop: Option<LoopKey>,
    chosen_queue: Option<QueueKey>,
    chosen_kind: Option<KindKey>,
    /// Number of lines of a long page that are above the screen. Drawing limits it to the length of the page.
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
            sort: Sort::Lag,
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
    /// Records a snapshot, and shows it unless the view is paused.
    pub(super) fn update(&mut self, snapshot: Snapshot) {
        self.recent.record(&snapshot);
        if let Some(recorded) = &mut self.paused {
            *recorded += 1;
            return;
        }
        let targets = || snapshot.targets.iter().enumerate();
        self.loops = targets()
            .flat_map(|(target, t)| (0..t.reactors.len()).map(move |reactor| (target, t, reactor)))
            .filter(|(_, t, reactor)| !t.reactors[*reactor].exited && !t.reactors[*reactor].is_worker)
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
        self.sort_rows();
    }

    pub(super) fn snapshot(&self) -> Option<&Snapshot> {
        self.snapshot.as_ref()
    }

    /// The processes on the screen.
    pub(super) fn targets(&self) -> &[Target] {
        self.snapshot.as_ref().map_or(&[], |snapshot| &snapshot.targets)
    }

    pub(super) const fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// All event loops in the order of the list, without regard to the filter.
    pub(super) fn all_loops(&self) -> impl Iterator<Item = (&LoopRow, &Target, &Reactor)> {
        let targets = self.targets();
        self.loops.iter().map(|row| {
            let target = &targets[row.target];
            (row, target, &target.reactors[row.reactor])
        })
    }

    /// All accept queues in the order of the list, without regard to the filter.
    pub(super) fn all_queues(&self) -> impl Iterator<Item = (&QueueRow, &Target, &Listener)> {
        let targets = self.targets();
        self.queues.iter().map(|row| {
            let target = &targets[row.target];
            (row, target, &target.listeners[row.listener])
        })
    }

    /// All kinds of deferred tasks in the order of the list, without regard to the filter.
    pub(super) fn all_kinds(&self) -> impl Iterator<Item = (&KindRow, &Target, &Deferred)> {
        let targets = self.targets();
        self.kinds.iter().map(|row| {
            let target = &targets[row.target];
            (row, target, &target.deferred[row.kind])
        })
    }

    /// The event loops whose name or process matches the filter.
    pub(super) fn loops(&self) -> impl Iterator<Item = (&LoopRow, &Target, &Reactor)> {
        self.all_loops().filter(|(_, target, reactor)| {
            self.matches_filter(target, &[&reactor.name, &reactor.tid.to_string()])
        })
    }

    /// The accept queues whose address or process matches the filter.
    pub(super) fn queues(&self) -> impl Iterator<Item = (&QueueRow, &Target, &Listener)> {
        self.all_queues().filter(|(_, target, listener)| self.matches_filter(target, &[&listener.name()]))
    }

    /// The kinds of deferred tasks whose name or process matches the filter.
    pub(super) fn kinds(&self) -> impl Iterator<Item = (&KindRow, &Target, &Deferred)> {
        self.all_kinds().filter(|(_, target, kind)| self.matches_filter(target, &[&kind.task]))
    }

    fn matches_filter(&self, target: &Target, names: &[&str]) -> bool {
        let filter = self.filter.to_lowercase();
        let pid = target.pid.to_string();
        let mut all = [target.comm.as_str(), &pid].into_iter().chain(names.iter().copied());
        all.any(|name| name.to_lowercase().contains(&filter))
    }

    /// Index of the selected row in `loops`.
    pub(super) fn selected_loop(&self) -> usize {
        let index = self.loops().position(|(_, target, reactor)| {
            self.chosen_loop.is_some_and(|chosen| chosen == (target.pid, reactor.tid))
        });
        index.unwrap_or(0)
    }

    /// Index of the selected row in `queues`.
    pub(super) fn selected_queue(&self) -> usize {
        let index = self.queues().position(|(_, target, listener)| {
            self.chosen_queue
                .as_ref()
                .is_some_and(|(pid, name)| *pid == target.pid && *name == listener.name())
        });
        index.unwrap_or(0)
    }

    /// Index of the selected row in `kinds`.
    pub(super) fn selected_kind(&self) -> usize {
        let index = self.kinds().position(|(_, target, kind)| {
            self.chosen_kind.as_ref().is_some_and(|(pid, task)| *pid == target.pid && *task == kind.task)
        });
        index.unwrap_or(0)
    }

    /// The lag of an event loop in each second, newest first.
    pub(super) fn history_of_loop(&self, key: LoopKey) -> impl Iterator<Item = Point> {
        self.recent.history_of_loop(key).rev().skip(self.paused.unwrap_or(0))
    }

    /// The waits in a queue in each second, newest first.
    pub(super) fn history_of_queue(&self, key: &QueueKey) -> impl Iterator<Item = Point> {
        self.recent.history_of_queue(key).rev().skip(self.paused.unwrap_or(0))
    }

    /// The waits of a kind of deferred tasks in each second, newest first.
    pub(super) fn history_of_kind(&self, key: &KindKey) -> impl Iterator<Item = Point> {
        self.recent.history_of_kind(key).rev().skip(self.paused.unwrap_or(0))
    }

    /// Sorts the rows of all lists.
    fn sort_rows(&mut self) {
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
                Sort::Lag => {
                    descending(lateness(a).0, lateness(b).0).then(descending(lateness(a).1, lateness(b).1))
                }
                Sort::Load => descending(busy(a), busy(b)),
                Sort::Name => Ordering::Equal,
            };
            order.then_with(|| reactor(a).cmp(&reactor(b)))
        });
        self.queues.sort_by(|a, b| {
            let listener = |row: &QueueRow| &targets[row.target].listeners[row.listener];
            let longest =
                |row: &QueueRow| row.window.wait.max().max(listener(row).oldest_seconds.unwrap_or(0.0));
            let order = match sort {
                Sort::Lag => descending(longest(a), longest(b)),
                Sort::Load => b.window.accepts.cmp(&a.window.accepts),
                Sort::Name => Ordering::Equal,
            };
            let key = |row: &QueueRow| (names(row.target), listener(row).name());
            order.then_with(|| key(a).cmp(&key(b)))
        });
        self.kinds.sort_by(|a, b| {
            let kind = |row: &KindRow| &targets[row.target].deferred[row.kind];
            let order = match sort {
                Sort::Lag => descending(a.window.wait.max(), b.window.wait.max()),
                Sort::Load => b.window.started.cmp(&a.window.started),
                Sort::Name => Ordering::Equal,
            };
            let key = |row: &KindRow| (names(row.target), &kind(row).task);
            order.then_with(|| key(a).cmp(&key(b)))
        });
    }

    /// Handles a key.
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
                self.sort_rows();
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
            KeyCode::Up | KeyCode::Char('k') => self.move_by(-1),
            KeyCode::Down | KeyCode::Char('j') => self.move_by(1),
            KeyCode::PageUp => self.move_by(-10),
            KeyCode::PageDown => self.move_by(10),
            KeyCode::Home => self.move_by(-i32::from(u16::MAX)),
            KeyCode::End => self.move_by(i32::from(u16::MAX)),
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

    /// Selects the list that is `by` lists further, and goes on by as many while the list is empty.
    fn change_list(&mut self, by: usize) {
        self.scrolled = 0;
        for _ in List::ALL {
            let index = List::ALL.iter().position(|list| *list == self.list).unwrap_or(0);
            self.list = List::ALL[(index + by) % List::ALL.len()];
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

    /// Moves the selection by `by` rows, or scrolls a long page by `by` lines.
    fn move_by(&mut self, by: i32) {
        if self.page != Page::Overview {
            let line = i32::from(self.scrolled).saturating_add(by).clamp(0, u16::MAX.into());
            self.scrolled = u16::try_from(line).unwrap_or(u16::MAX);
            return;
        }
        let moved = |index: usize, count: usize| {
            let index = i32::try_from(index).unwrap_or(0).saturating_add(by).max(0);
            usize::try_from(index).unwrap_or(0).min(count.saturating_sub(1))
        };
        match self.list {
            List::Loops => {
                let index = moved(self.selected_loop(), self.loops().count());
                let chosen = self.loops().nth(index).map(|(_, target, reactor)| (target.pid, reactor.tid));
                self.chosen_loop = chosen;
            }
            List::Queues => {
                let index = moved(self.selected_queue(), self.queues().count());
                let chosen = self.queues().nth(index);
                self.chosen_queue = chosen.map(|(_, target, listener)| (target.pid, listener.name()));
            }
            List::Kinds => {
                let index = moved(self.selected_kind(), self.kinds().count());
                let chosen = self.kinds().nth(index);
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

    /// Three event loops: a late one, a busy one, an idle one; and two queues.
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
        state.update(snapshot);
        state
    }

    fn names(state: &State) -> Vec<&str> {
        state.loops().map(|(_, _, reactor)| reactor.name.as_str()).collect()
    }

    #[test]
    fn rows_are_sorted_and_the_selection_stays() {
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
        // While the filter is edited, `q` is a letter, and Ctrl-C still quits.
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
    fn kinds_of_tasks_are_the_third_list() {
        let mut snapshot = testing::snapshot(1.0, |_| {});
        snapshot.targets[0].deferred = vec![testing::kind("archive", 5), testing::kind("mail", 50)];
        let mut state = State::default();
        state.update(snapshot);
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
        state.update(testing::snapshot(2.0, |_| {}));
        assert_eq!(state.kinds().count(), 0);
        // An empty list is skipped.
        press(&mut state, &[KeyCode::Esc, KeyCode::Esc, KeyCode::Tab]);
        assert_eq!(state.list, List::Loops);
    }

    #[test]
    fn a_paused_view_does_not_change_and_misses_nothing() {
        let mut state = state(1.0);
        let history = |state: &State| state.history_of_loop((10, 11)).collect::<Vec<_>>();
        press(&mut state, &[KeyCode::Char('p')]);
        let before = history(&state);
        state.update(testing::snapshot(2.0, |reactor| testing::slept(reactor, 9)));
        assert_eq!(state.snapshot().unwrap().duration_seconds, 1.0);
        assert_eq!((names(&state).len(), history(&state)), (3, before));
        press(&mut state, &[KeyCode::Char('p')]);
        state.update(testing::snapshot(3.0, |reactor| testing::slept(reactor, 9)));
        assert_eq!((names(&state).len(), history(&state).len()), (1, 3));
        assert_eq!(state.loops().next().unwrap().0.window.stalls, 9);
    }

    #[test]
    fn no_key_panics_before_the_first_snapshot() {
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
