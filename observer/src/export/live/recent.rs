//! Computes the values of the last ten seconds. Counters and histograms only grow, so these are differences between
//! snapshots. Memory is bounded: each second of an event loop takes a few dozen numbers, and few seconds are kept.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
};

use crate::model::{
    busy::{Cause, Split},
    deferred::Deferred,
    histogram::{Growth, Histogram},
    snapshot::{Listener, Reactor, Snapshot},
};

/// Length of the window, in seconds.
pub(crate) const WINDOW: f64 = 10.0;

/// Tolerance of the window's length for snapshots that come late, in seconds.
const SLACK: f64 = 0.5;

/// Maximum number of points in a history, one for each second: more than a terminal has columns.
const HISTORY: usize = 512;

/// Identifies an event loop: process id and thread id.
pub(crate) type LoopKey = (u32, u32);

/// Identifies an accept queue: process id and name of the listener.
pub(crate) type QueueKey = (u32, String);

/// Identifies a kind of deferred tasks: process id and name of the kind.
pub(crate) type KindKey = (u32, String);

/// The delays of one second of a history, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Point {
    /// The 99th percentile.
    pub(crate) p99: f64,
    /// The maximum.
    pub(crate) max: f64,
}

/// Time by [`Cause::PARTS`], in seconds.
pub(crate) type Parts = [f64; Cause::PARTS.len()];

/// Converts a split to an array.
pub(crate) fn parts(split: &Split) -> Parts {
    Cause::PARTS.map(|cause| split.of(cause))
}

/// An event loop in the window.
#[derive(Clone, Debug, Default)]
pub(crate) struct LoopWindow {
    /// Length of the window, in seconds; shorter if the subject is younger.
    pub(crate) seconds: f64,
    /// Lag in the window.
    pub(crate) lag: Histogram,
    /// Busy time as a share of busy and waiting time; `None` if there was neither.
    pub(crate) utilization: Option<f64>,
    /// Busy time by cause.
    pub(crate) parts: Parts,
    /// Stalls that ended in the window.
    pub(crate) stalls: u64,
    /// Of these, stalls during which events are known to have waited.
    pub(crate) late_stalls: u64,
    /// The longest wake-up, in seconds.
    pub(crate) longest_wakeup: f64,
}

/// An accept queue in the window.
#[derive(Clone, Debug, Default)]
pub(crate) struct QueueWindow {
    /// Length of the window, in seconds; shorter if the subject is younger.
    pub(crate) seconds: f64,
    /// Waits to be accepted that ended in the window.
    pub(crate) wait: Histogram,
    /// Connections that joined the queue.
    pub(crate) arrivals: u64,
    /// Connections that were accepted.
    pub(crate) accepts: u64,
    /// Connections that were dropped.
    pub(crate) drops: u64,
}

/// A kind of deferred tasks in the window.
#[derive(Clone, Debug, Default)]
pub(crate) struct KindWindow {
    /// Length of the window, in seconds; shorter if the subject is younger.
    pub(crate) seconds: f64,
    /// Times from enqueue to start, of tasks that started in the window.
    pub(crate) wait: Histogram,
    /// Times from start to finish, of tasks that finished in the window.
    pub(crate) run: Histogram,
    /// Tasks that were enqueued.
    pub(crate) enqueued: u64,
    /// Tasks that started.
    pub(crate) started: u64,
    /// Tasks that were dropped before they started.
    pub(crate) orphaned: u64,
}

/// The growth of all counters and histograms from snapshot to snapshot.
#[derive(Default)]
pub(crate) struct Recent {
    /// Duration of the observation as of the last snapshot, in seconds.
    last_seconds: f64,
    loops: HashMap<LoopKey, Track<LoopGrowth>>,
    wakeups: HashMap<LoopKey, Track<()>>,
    queues: HashMap<QueueKey, Track<QueueGrowth>>,
    kinds: HashMap<KindKey, Track<KindGrowth>>,
    runs: HashMap<KindKey, Track<()>>,
}

/// The growth and the history of one event loop, queue or kind of tasks.
struct Track<G> {
    /// The histogram of delays in the last snapshot.
    delays: Histogram,
    /// The histogram of the events that cause the longest delays, in the last snapshot.
    events: Histogram,
    /// The counters in the last snapshot.
    counters: G,
    /// The growth from snapshot to snapshot, in the window.
    growths: VecDeque<Grown<G>>,
    history: VecDeque<Point>,
    /// Whether the last snapshot has it.
    is_present: bool,
}

struct Grown<G> {
    seconds: f64,
    delays: Growth,
    longest: f64,
    counters: G,
}

#[derive(Clone, Copy, Default)]
struct LoopGrowth {
    busy: f64,
    wait: f64,
    parts: Parts,
    stalls: u64,
    late_stalls: u64,
}

#[derive(Clone, Copy, Default)]
struct QueueGrowth {
    arrivals: u64,
    accepts: u64,
    drops: u64,
}

#[derive(Clone, Copy, Default)]
struct KindGrowth {
    enqueued: u64,
    started: u64,
    orphaned: u64,
}

/// Counters that can be subtracted and added.
trait Counters: Copy + Default {
    fn since(self, earlier: Self) -> Self;
    fn plus(self, other: Self) -> Self;
}

impl Counters for LoopGrowth {
    fn since(self, earlier: Self) -> Self {
        let less = |now: f64, then: f64| (now - then).max(0.0);
        Self {
            busy: less(self.busy, earlier.busy),
            wait: less(self.wait, earlier.wait),
            parts: std::array::from_fn(|n| less(self.parts[n], earlier.parts[n])),
            stalls: self.stalls.saturating_sub(earlier.stalls),
            late_stalls: self.late_stalls.saturating_sub(earlier.late_stalls),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            busy: self.busy + other.busy,
            wait: self.wait + other.wait,
            parts: std::array::from_fn(|n| self.parts[n] + other.parts[n]),
            stalls: self.stalls + other.stalls,
            late_stalls: self.late_stalls + other.late_stalls,
        }
    }
}

impl Counters for QueueGrowth {
    fn since(self, earlier: Self) -> Self {
        Self {
            arrivals: self.arrivals.saturating_sub(earlier.arrivals),
            accepts: self.accepts.saturating_sub(earlier.accepts),
            drops: self.drops.saturating_sub(earlier.drops),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            arrivals: self.arrivals + other.arrivals,
            accepts: self.accepts + other.accepts,
            drops: self.drops + other.drops,
        }
    }
}

impl Counters for KindGrowth {
    fn since(self, earlier: Self) -> Self {
        Self {
            enqueued: self.enqueued.saturating_sub(earlier.enqueued),
            started: self.started.saturating_sub(earlier.started),
            orphaned: self.orphaned.saturating_sub(earlier.orphaned),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            enqueued: self.enqueued + other.enqueued,
            started: self.started + other.started,
            orphaned: self.orphaned + other.orphaned,
        }
    }
}

impl Counters for () {
    fn since(self, (): Self) -> Self {}

    fn plus(self, (): Self) -> Self {}
}

impl Recent {
    /// Records the growth since the last snapshot, and removes what is no longer in the snapshot.
    pub(crate) fn record(&mut self, snapshot: &Snapshot) {
        let seconds = (snapshot.duration_seconds - self.last_seconds).max(0.0);
        self.last_seconds = snapshot.duration_seconds;
        for target in &snapshot.targets {
            for reactor in target.loops().filter(|reactor| !reactor.exited) {
                let counters = LoopGrowth {
                    busy: reactor.busy_seconds,
                    wait: reactor.wait_seconds,
                    parts: parts(&reactor.split_seconds),
                    stalls: reactor.stalls.count,
                    late_stalls: reactor.stalls.late,
                };
                let track = self.loops.entry((target.pid, reactor.tid)).or_default();
                // The counts of a lag are rounded, so a count may move to a neighbouring bucket. Slices and wake-ups are
                // counted exactly, so the maximum follows from them.
                let events = [&reactor.slice, &reactor.wakeup].map(|h| h.since(&Histogram::default()));
                let events = Histogram::grown(events.iter(), reactor.slice.max().max(reactor.wakeup.max()));
                let age = reactor.current_slice_seconds.unwrap_or(0.0);
                track.record(seconds, &reactor.lag, &events, counters, age);
                let track = self.wakeups.entry((target.pid, reactor.tid)).or_default();
                track.record(seconds, &reactor.wakeup, &reactor.wakeup, (), 0.0);
            }
            for listener in target.listeners.iter().filter(|listener| !listener.closed) {
                let counters = QueueGrowth {
                    arrivals: listener.arrivals,
                    accepts: listener.accepts,
                    drops: listener.drops.into(),
                };
                let track = self.queues.entry((target.pid, listener.name())).or_default();
                // A connection that still waits has a delay already; the histogram gets it when it is accepted.
                let oldest = listener.oldest_seconds.unwrap_or(0.0);
                track.record(seconds, &listener.wait, &listener.wait, counters, oldest);
            }
            for kind in target.deferred.iter().filter(|_| !target.exited) {
                let counters =
                    KindGrowth { enqueued: kind.enqueued, started: kind.started, orphaned: kind.orphaned };
                // The age of a pending task is no delay: timers wait on purpose.
                let key = (target.pid, kind.task.clone());
                let track = self.kinds.entry(key.clone()).or_default();
                track.record(seconds, &kind.wait, &kind.wait, counters, 0.0);
                self.runs.entry(key).or_default().record(seconds, &kind.run, &kind.run, (), 0.0);
            }
        }
        remove_absent(&mut self.loops);
        remove_absent(&mut self.wakeups);
        remove_absent(&mut self.queues);
        remove_absent(&mut self.kinds);
        remove_absent(&mut self.runs);
    }

    /// An event loop in the window.
    pub(crate) fn of_loop(&self, pid: u32, reactor: &Reactor) -> LoopWindow {
        let key = (pid, reactor.tid);
        let (Some(track), Some(wakeups)) = (self.loops.get(&key), self.wakeups.get(&key)) else {
            return LoopWindow::default();
        };
        let ((seconds, lag, sum), (_, wakeups, ())) = (track.window(), wakeups.window());
        let total = sum.busy + sum.wait;
        let utilization = (total > 0.0).then(|| sum.busy / total);
        let LoopGrowth { parts, stalls, late_stalls, .. } = sum;
        LoopWindow { seconds, lag, utilization, parts, stalls, late_stalls, longest_wakeup: wakeups.max() }
    }

    /// An accept queue in the window.
    pub(crate) fn of_queue(&self, pid: u32, listener: &Listener) -> QueueWindow {
        self.queues.get(&(pid, listener.name())).map_or_else(QueueWindow::default, |track| {
            let (seconds, wait, sum) = track.window();
            QueueWindow { seconds, wait, arrivals: sum.arrivals, accepts: sum.accepts, drops: sum.drops }
        })
    }

    /// A kind of deferred tasks in the window.
    pub(crate) fn of_kind(&self, pid: u32, kind: &Deferred) -> KindWindow {
        let key = (pid, kind.task.clone());
        let (Some(waits), Some(runs)) = (self.kinds.get(&key), self.runs.get(&key)) else {
            return KindWindow::default();
        };
        let ((seconds, wait, sum), (_, run, ())) = (waits.window(), runs.window());
        let KindGrowth { enqueued, started, orphaned } = sum;
        KindWindow { seconds, wait, run, enqueued, started, orphaned }
    }

    /// The lag of an event loop in each second, oldest first.
    pub(crate) fn history_of_loop(&self, key: LoopKey) -> impl DoubleEndedIterator<Item = Point> {
        self.loops.get(&key).into_iter().flat_map(|track| track.history.iter().copied())
    }

    /// The waits in an accept queue in each second, oldest first.
    pub(crate) fn history_of_queue(&self, key: &QueueKey) -> impl DoubleEndedIterator<Item = Point> {
        self.queues.get(key).into_iter().flat_map(|track| track.history.iter().copied())
    }

    /// The waits of a kind of deferred tasks in each second, oldest first.
    pub(crate) fn history_of_kind(&self, key: &KindKey) -> impl DoubleEndedIterator<Item = Point> {
        self.kinds.get(key).into_iter().flat_map(|track| track.history.iter().copied())
    }
}

fn remove_absent<K: Eq + Hash, G>(tracks: &mut HashMap<K, Track<G>>) {
    tracks.retain(|_, track| std::mem::take(&mut track.is_present));
}

impl<G: Counters> Default for Track<G> {
    fn default() -> Self {
        Self {
            delays: Histogram::default(),
            events: Histogram::default(),
            counters: G::default(),
            growths: VecDeque::new(),
            history: VecDeque::new(),
            is_present: false,
        }
    }
}

impl<G: Counters> Track<G> {
    /// Adds the growth of `seconds`. `at_least` is the age of a slice or wait that has not ended, in seconds.
    fn record(&mut self, seconds: f64, delays: &Histogram, events: &Histogram, counters: G, at_least: f64) {
        let events_growth = events.since(&self.events);
        let longest = Histogram::grown([&events_growth].into_iter(), events.max()).max().max(at_least);
        let growth = Grown {
            seconds,
            delays: delays.since(&self.delays),
            longest,
            counters: counters.since(self.counters),
        };
        let second = Histogram::grown([&growth.delays].into_iter(), longest);
        self.history.push_back(Point { p99: second.quantile(0.99).unwrap_or(at_least), max: longest });
        let surplus = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..surplus);
        self.growths.push_back(growth);
        while self.growths.len() > 1 && self.seconds() > WINDOW + SLACK {
            self.growths.pop_front();
        }
        self.delays.clone_from(delays);
        self.events.clone_from(events);
        self.counters = counters;
        self.is_present = true;
    }

    fn seconds(&self) -> f64 {
        self.growths.iter().map(|growth| growth.seconds).sum()
    }

    /// Length, delays and counters of the window.
    fn window(&self) -> (f64, Histogram, G) {
        let longest = self.growths.iter().map(|growth| growth.longest).fold(0.0, f64::max);
        let delays = Histogram::grown(self.growths.iter().map(|growth| &growth.delays), longest);
        let sum = self.growths.iter().fold(G::default(), |sum, growth| sum.plus(growth.counters));
        (self.seconds(), delays, sum)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing, *};

    #[test]
    fn a_delay_leaves_the_window() {
        let mut recent = Recent::default();
        let late = testing::snapshot(1.0, |reactor| testing::slept(reactor, 1));
        recent.record(&late);
        let reactor = &late.targets[0].reactors[0];
        assert!(recent.of_loop(10, reactor).lag.max() > 0.1);
        for second in 2..=13 {
            recent.record(&testing::snapshot(f64::from(second), |reactor| testing::slept(reactor, 1)));
        }
        let now = recent.of_loop(10, reactor);
        assert!((now.seconds - WINDOW).abs() <= SLACK, "{}", now.seconds);
        assert_eq!((now.lag.count(), now.stalls), (0, 0));
        let history: Vec<Point> = recent.history_of_loop((10, 11)).collect();
        assert_eq!(history.len(), 13);
        assert!(history[0].max > 0.1 && history[12].max == 0.0);
    }

    #[test]
    fn memory_is_bounded_and_what_has_exited_is_removed() {
        let mut recent = Recent::default();
        for second in 1..=1000 {
            recent.record(&testing::snapshot(f64::from(second), |reactor| testing::slept(reactor, second)));
        }
        let track = &recent.loops[&(10, 11)];
        assert_eq!(track.history.len(), HISTORY);
        assert!(track.growths.len() <= 11, "{}", track.growths.len());
        recent.record(&testing::snapshot(1001.0, |reactor| reactor.exited = true));
        assert!(recent.loops.is_empty());
        assert!(!recent.queues.is_empty());
    }

    #[test]
    fn deferred_tasks_have_a_window() {
        let mut recent = Recent::default();
        for second in 1..=20u32 {
            let mut snapshot = testing::snapshot(f64::from(second), |_| {});
            snapshot.targets[0].deferred = vec![testing::kind("mail", u64::from(second) * 5)];
            snapshot.targets[0].deferred[0].oldest_seconds = Some(3600.0);
            recent.record(&snapshot);
        }
        let now = recent.of_kind(10, &testing::kind("mail", 100));
        assert_eq!((now.enqueued, now.started, now.orphaned), (60, 50, 10));
        assert_eq!((now.wait.count(), now.run.count()), (50, 50));
        // A task that was enqueued an hour ago, such as a timer, is no delay.
        let key = (10, "mail".to_owned());
        assert!(recent.history_of_kind(&key).all(|point| point.max < 0.1));
        recent.record(&testing::snapshot(21.0, |_| {}));
        assert!(recent.kinds.is_empty() && recent.runs.is_empty());
    }

    #[test]
    fn a_queue_without_accepts_has_a_history() {
        let mut recent = Recent::default();
        let mut stuck = testing::snapshot(1.0, |_| {});
        stuck.targets[0].listeners[0].oldest_seconds = Some(7.0);
        recent.record(&stuck);
        let key = (10, stuck.targets[0].listeners[0].name());
        assert!((recent.history_of_queue(&key).last().unwrap().max - 7.0).abs() < 1e-9);
    }
}
