//! What the last seconds brought: figures only grow, so the recent past is the difference between two snapshots.
//! Memory is bounded: a second of an event loop takes a few dozen numbers, and only so many seconds are kept.

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

/// How far back the recent past goes, in seconds.
pub(crate) const WINDOW: f64 = 10.0;

/// A look may come a little late.
const SLACK: f64 = 0.5;

/// Points of a history: a second each, more than terminals are wide.
const HISTORY: usize = 512;

/// An event loop: process and thread.
pub(crate) type LoopKey = (u32, u32);

/// An accept queue: process and listener's name.
pub(crate) type QueueKey = (u32, String);

/// A kind of deferred work: process and what it is called.
pub(crate) type KindKey = (u32, String);

/// One second of a history, in seconds of delay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Point {
    /// What 99 % did not exceed.
    pub(crate) p99: f64,
    /// The longest.
    pub(crate) max: f64,
}

/// Time by [`Cause::PARTS`], in seconds.
pub(crate) type Parts = [f64; Cause::PARTS.len()];

/// The parts of a split.
pub(crate) fn parts(split: &Split) -> Parts {
    Cause::PARTS.map(|cause| split.of(cause))
}

/// The recent past of an event loop.
#[derive(Clone, Debug, Default)]
pub(crate) struct LoopWindow {
    /// How long it is.
    pub(crate) seconds: f64,
    /// Delays that instants in it met.
    pub(crate) lag: Histogram,
    /// Busy time as a share of all; `None` if there was neither busy nor waiting time.
    pub(crate) utilization: Option<f64>,
    /// Where busy time went.
    pub(crate) parts: Parts,
    /// Stalls that ended in it.
    pub(crate) stalls: u64,
}

/// The recent past of an accept queue.
#[derive(Clone, Debug, Default)]
pub(crate) struct QueueWindow {
    /// How long it is.
    pub(crate) seconds: f64,
    /// Waits that ended in it.
    pub(crate) wait: Histogram,
    /// Connections that joined the queue.
    pub(crate) arrivals: u64,
    /// Connections that were accepted.
    pub(crate) accepts: u64,
    /// Connections that were dropped.
    pub(crate) drops: u64,
}

/// The recent past of a kind of deferred work.
#[derive(Clone, Debug, Default)]
pub(crate) struct KindWindow {
    /// How long it is.
    pub(crate) seconds: f64,
    /// Waits that ended in it, because the work started.
    pub(crate) wait: Histogram,
    /// Work that ended in it: how long it ran.
    pub(crate) run: Histogram,
    /// Pieces put off.
    pub(crate) enqueued: u64,
    /// Pieces that started.
    pub(crate) started: u64,
    /// Pieces forgotten before they started.
    pub(crate) orphaned: u64,
}

/// The latest looks at everything, each with what it showed to be new.
#[derive(Default)]
pub(crate) struct Recent {
    /// Age of the observation at the last look.
    looked: f64,
    loops: HashMap<LoopKey, Track<LoopGrowth>>,
    queues: HashMap<QueueKey, Track<QueueGrowth>>,
    kinds: HashMap<KindKey, Track<KindGrowth>>,
    runs: HashMap<KindKey, Track<()>>,
}

/// What is kept of one loop, queue or kind of work.
struct Track<G> {
    /// Its histogram of delays at the last look.
    delays: Histogram,
    /// What the longest delays come from, at the last look.
    events: Histogram,
    /// Its counters at the last look.
    counters: G,
    /// What grew from look to look.
    growths: VecDeque<Grown<G>>,
    history: VecDeque<Point>,
    /// Whether the last look has seen it.
    is_seen: bool,
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

/// Counters that can be compared and summed up.
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
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            busy: self.busy + other.busy,
            wait: self.wait + other.wait,
            parts: std::array::from_fn(|n| self.parts[n] + other.parts[n]),
            stalls: self.stalls + other.stalls,
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
    /// Takes in what is new in a snapshot, and forgets what is no longer in it.
    pub(crate) fn look(&mut self, snapshot: &Snapshot) {
        let seconds = (snapshot.duration_seconds - self.looked).max(0.0);
        self.looked = snapshot.duration_seconds;
        for target in &snapshot.targets {
            for reactor in target.reactors.iter().filter(|reactor| !reactor.exited) {
                let counters = LoopGrowth {
                    busy: reactor.busy_seconds,
                    wait: reactor.wait_seconds,
                    parts: parts(&reactor.split_seconds),
                    stalls: reactor.stalls.count,
                };
                let track = self.loops.entry((target.pid, reactor.tid)).or_default();
                // A lag's counts are rounded, so that one may move between neighbours; events are counted exactly.
                let events = [&reactor.slice, &reactor.wakeup].map(|h| h.since(&Histogram::default()));
                let events = Histogram::grown(events.iter(), reactor.slice.max().max(reactor.wakeup.max()));
                let age = reactor.current_slice_seconds.unwrap_or(0.0);
                track.look(seconds, &reactor.lag, &events, counters, age);
            }
            for listener in target.listeners.iter().filter(|listener| !listener.closed) {
                let counters = QueueGrowth {
                    arrivals: listener.arrivals,
                    accepts: listener.accepts,
                    drops: listener.drops.into(),
                };
                let track = self.queues.entry((target.pid, listener.name())).or_default();
                // Those that still wait have waited so long, whenever they will be accepted.
                let oldest = listener.oldest_seconds.unwrap_or(0.0);
                track.look(seconds, &listener.wait, &listener.wait, counters, oldest);
            }
            for kind in target.deferred.iter().filter(|_| !target.exited) {
                let counters =
                    KindGrowth { enqueued: kind.enqueued, started: kind.started, orphaned: kind.orphaned };
                // What still waits may be meant to: a timer does.
                let key = (target.pid, kind.task.clone());
                let track = self.kinds.entry(key.clone()).or_default();
                track.look(seconds, &kind.wait, &kind.wait, counters, 0.0);
                self.runs.entry(key).or_default().look(seconds, &kind.run, &kind.run, (), 0.0);
            }
        }
        forget_unseen(&mut self.loops);
        forget_unseen(&mut self.queues);
        forget_unseen(&mut self.kinds);
        forget_unseen(&mut self.runs);
    }

    /// The recent past of an event loop.
    pub(crate) fn of_loop(&self, pid: u32, reactor: &Reactor) -> LoopWindow {
        self.loops.get(&(pid, reactor.tid)).map_or_else(LoopWindow::default, |track| {
            let (seconds, lag, sum) = track.window();
            let total = sum.busy + sum.wait;
            let utilization = (total > 0.0).then(|| sum.busy / total);
            LoopWindow { seconds, lag, utilization, parts: sum.parts, stalls: sum.stalls }
        })
    }

    /// The recent past of an accept queue.
    pub(crate) fn of_queue(&self, pid: u32, listener: &Listener) -> QueueWindow {
        self.queues.get(&(pid, listener.name())).map_or_else(QueueWindow::default, |track| {
            let (seconds, wait, sum) = track.window();
            QueueWindow { seconds, wait, arrivals: sum.arrivals, accepts: sum.accepts, drops: sum.drops }
        })
    }

    /// The recent past of a kind of deferred work.
    pub(crate) fn of_kind(&self, pid: u32, kind: &Deferred) -> KindWindow {
        let key = (pid, kind.task.clone());
        let (Some(waits), Some(runs)) = (self.kinds.get(&key), self.runs.get(&key)) else {
            return KindWindow::default();
        };
        let ((seconds, wait, sum), (_, run, ())) = (waits.window(), runs.window());
        let KindGrowth { enqueued, started, orphaned } = sum;
        KindWindow { seconds, wait, run, enqueued, started, orphaned }
    }

    /// The lag of an event loop second by second, oldest first.
    pub(crate) fn history_of_loop(&self, key: LoopKey) -> impl DoubleEndedIterator<Item = Point> {
        self.loops.get(&key).into_iter().flat_map(|track| track.history.iter().copied())
    }

    /// The waits in an accept queue second by second, oldest first.
    pub(crate) fn history_of_queue(&self, key: &QueueKey) -> impl DoubleEndedIterator<Item = Point> {
        self.queues.get(key).into_iter().flat_map(|track| track.history.iter().copied())
    }

    /// The waits of a kind of work second by second, oldest first.
    pub(crate) fn history_of_kind(&self, key: &KindKey) -> impl DoubleEndedIterator<Item = Point> {
        self.kinds.get(key).into_iter().flat_map(|track| track.history.iter().copied())
    }
}

fn forget_unseen<K: Eq + Hash, G>(tracks: &mut HashMap<K, Track<G>>) {
    tracks.retain(|_, track| std::mem::take(&mut track.is_seen));
}

impl<G: Counters> Default for Track<G> {
    fn default() -> Self {
        Self {
            delays: Histogram::default(),
            events: Histogram::default(),
            counters: G::default(),
            growths: VecDeque::new(),
            history: VecDeque::new(),
            is_seen: false,
        }
    }
}

impl<G: Counters> Track<G> {
    fn look(&mut self, seconds: f64, delays: &Histogram, events: &Histogram, counters: G, at_least: f64) {
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
        self.is_seen = true;
    }

    fn seconds(&self) -> f64 {
        self.growths.iter().map(|growth| growth.seconds).sum()
    }

    /// Length, delays and counters of the recent past.
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
    fn what_is_over_is_not_recent() {
        let mut recent = Recent::default();
        let late = testing::snapshot(1.0, |reactor| testing::slept(reactor, 1));
        recent.look(&late);
        let reactor = &late.targets[0].reactors[0];
        assert!(recent.of_loop(10, reactor).lag.max() > 0.1);
        for second in 2..=13 {
            recent.look(&testing::snapshot(f64::from(second), |reactor| testing::slept(reactor, 1)));
        }
        let now = recent.of_loop(10, reactor);
        assert!((now.seconds - WINDOW).abs() <= SLACK, "{}", now.seconds);
        assert_eq!((now.lag.count(), now.stalls), (0, 0));
        let history: Vec<Point> = recent.history_of_loop((10, 11)).collect();
        assert_eq!(history.len(), 13);
        assert!(history[0].max > 0.1 && history[12].max == 0.0);
    }

    #[test]
    fn memory_is_bounded_and_the_gone_are_forgotten() {
        let mut recent = Recent::default();
        for second in 1..=1000 {
            recent.look(&testing::snapshot(f64::from(second), |reactor| testing::slept(reactor, second)));
        }
        let track = &recent.loops[&(10, 11)];
        assert_eq!(track.history.len(), HISTORY);
        assert!(track.growths.len() <= 11, "{}", track.growths.len());
        recent.look(&testing::snapshot(1001.0, |reactor| reactor.exited = true));
        assert!(recent.loops.is_empty());
        assert!(!recent.queues.is_empty());
    }

    #[test]
    fn deferred_work_has_a_recent_past() {
        let mut recent = Recent::default();
        for second in 1..=20u32 {
            let mut snapshot = testing::snapshot(f64::from(second), |_| {});
            snapshot.targets[0].deferred = vec![testing::kind("mail", u64::from(second) * 5)];
            snapshot.targets[0].deferred[0].oldest_seconds = Some(3600.0);
            recent.look(&snapshot);
        }
        let now = recent.of_kind(10, &testing::kind("mail", 100));
        assert_eq!((now.enqueued, now.started, now.orphaned), (60, 50, 10));
        assert_eq!((now.wait.count(), now.run.count()), (50, 50));
        // Work that is put off for an hour is not late.
        let key = (10, "mail".to_owned());
        assert!(recent.history_of_kind(&key).all(|point| point.max < 0.1));
        recent.look(&testing::snapshot(21.0, |_| {}));
        assert!(recent.kinds.is_empty() && recent.runs.is_empty());
    }

    #[test]
    fn a_queue_that_nobody_accepts_from_has_a_history() {
        let mut recent = Recent::default();
        let mut stuck = testing::snapshot(1.0, |_| {});
        stuck.targets[0].listeners[0].oldest_seconds = Some(7.0);
        recent.look(&stuck);
        let key = (10, stuck.targets[0].listeners[0].name());
        assert!((recent.history_of_queue(&key).last().unwrap().max - 7.0).abs() < 1e-9);
    }
}
