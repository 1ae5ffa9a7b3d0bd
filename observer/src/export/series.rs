//! The series of a scrape, and their cap: of each kind of thing only so many are told one by one, so that a server with
//! thousands of threads does not flood whoever scrapes it. The surplus is told together.

use std::collections::{HashMap, HashSet};

use crate::model::{
    catalog::families,
    family::{Aggregation, Family, Kind, Value},
    histogram::Resolution,
    snapshot::Snapshot,
    subject::{Subject, subjects},
};

/// Listeners, event loops, processes and missing sources told one by one, of each so many.
pub(crate) const SHOWN: usize = 200;

/// What names the others in labels.
pub(crate) const OTHER: &str = "other";

/// One series.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    /// In the order of the family's labels.
    pub(crate) labels: Vec<String>,
    /// Its figure.
    pub(crate) figure: Figure,
}

/// What a series tells.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Figure {
    /// A counter's or a gauge's.
    Number(f64),
    /// A histogram's.
    Distribution(Distribution),
}

/// A histogram at the bounds that are scraped.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Distribution {
    /// Of all.
    pub(crate) count: u64,
    /// Of all.
    pub(crate) sum: f64,
    /// Upper bounds, and how many do not exceed each.
    pub(crate) buckets: Vec<(f64, u64)>,
}

impl Distribution {
    fn of(count: u64, sum: f64, buckets: impl Iterator<Item = (f64, u64)>) -> Self {
        Self { count, sum, buckets: buckets.collect() }
    }

    /// Adds what another one has grown by.
    fn add_growth(&mut self, now: &Self, last: Option<&Self>) {
        self.count += now.count.saturating_sub(last.map_or(0, |last| last.count));
        self.sum += (now.sum - last.map_or(0.0, |last| last.sum)).max(0.0);
        if self.buckets.is_empty() {
            self.buckets = now.buckets.iter().map(|&(bound, _)| (bound, 0)).collect();
        }
        for (n, (sum, (_, count))) in self.buckets.iter_mut().zip(&now.buckets).enumerate() {
            sum.1 += count.saturating_sub(last.map_or(0, |last| last.buckets[n].1));
        }
    }
}

impl Figure {
    fn of(value: &Value<'_>, resolution: Resolution) -> Self {
        match value {
            Value::Number(number) => Self::Number(*number),
            Value::Histogram(h) => {
                Self::Distribution(Distribution::of(h.count(), h.sum(), h.cumulative_at(resolution)))
            }
            Value::Depths(depths) => {
                let buckets = depths.cumulative().map(|(bound, count)| (bound.into(), count));
                Self::Distribution(Distribution::of(depths.counts.iter().sum(), depths.sum(), buckets))
            }
        }
    }

    /// Adds what another one of the same family has grown by.
    fn add_growth(&mut self, now: &Self, last: Option<&Self>) {
        match (self, now, last) {
            (Self::Number(sum), Self::Number(now), Some(Self::Number(last))) => *sum += (now - last).max(0.0),
            (Self::Number(sum), Self::Number(now), _) => *sum += now,
            (Self::Distribution(sum), Self::Distribution(now), Some(Self::Distribution(last))) => {
                sum.add_growth(now, Some(last));
            }
            (Self::Distribution(sum), Self::Distribution(now), _) => sum.add_growth(now, None),
            (Self::Number(_), Self::Distribution(_), _) | (Self::Distribution(_), Self::Number(_), _) => {}
        }
    }
}

/// A listener, event loop, process or source, by the labels that last as long as it does.
type Key = (Subject, Vec<String>);

/// A series of the others: its family's place in the catalog, and the labels that do not say whose it is.
type Shared = (usize, Vec<String>);

/// Who is told one by one, and what the others have counted together.
///
/// Whoever was told one by one remains so until it is gone, and whoever was told with the others remains with them:
/// no figure is told twice. What the others counted remains when one of them is gone: counters only grow.
#[derive(Debug)]
pub(crate) struct SeriesLimiter {
    /// Of histograms.
    resolution: Resolution,
    shown: HashSet<Key>,
    /// The others, each with its figures as they were last added.
    others: HashMap<Key, HashMap<Shared, Figure>>,
    /// What all the others counted, those that are gone included.
    counted: HashMap<Shared, Figure>,
}

impl SeriesLimiter {
    /// Nobody yet, and how finely histograms are told.
    pub(crate) fn at(resolution: Resolution) -> Self {
        Self { resolution, shown: HashSet::new(), others: HashMap::new(), counted: HashMap::new() }
    }

    /// All series of a snapshot, by family in the order of the catalog. One family after the other: all of a thousand targets
    /// at a time would be many megabytes.
    pub(crate) fn gather(
        &mut self,
        snapshot: &Snapshot,
    ) -> impl Iterator<Item = (&'static Family, Vec<Series>)> {
        self.assign(subjects(snapshot).map(|(subject, labels)| key(subject, &labels)).collect());
        families().enumerate().map(|(place, family)| (family, self.of_family(place, family, snapshot)))
    }

    /// Decides who is told one by one.
    fn assign(&mut self, present: Vec<Key>) {
        let all: HashSet<&Key> = present.iter().collect();
        self.shown.retain(|key| all.contains(key));
        self.others.retain(|key, _| all.contains(key));
        let mut taken = HashMap::<Subject, usize>::new();
        for (subject, _) in &self.shown {
            *taken.entry(*subject).or_default() += 1;
        }
        for key in present {
            if self.shown.contains(&key) || self.others.contains_key(&key) {
                continue;
            }
            let taken = taken.entry(key.0).or_default();
            if *taken < SHOWN {
                *taken += 1;
                self.shown.insert(key);
            } else {
                self.others.insert(key, HashMap::new());
            }
        }
    }

    /// The series of one family, those of the others merged.
    fn of_family(&mut self, place: usize, family: &Family, snapshot: &Snapshot) -> Vec<Series> {
        let subject = family.subject();
        let named = subject.labels();
        let mut merged = Vec::new();
        let mut gauges = HashMap::<Vec<String>, f64>::new();
        (family.collect)(snapshot, &mut |mut labels, value| {
            let figure = Figure::of(&value, self.resolution);
            let Some(last) = self.others.get_mut(&key(subject, &labels)) else {
                merged.push(Series { labels, figure });
                return;
            };
            let rest = labels.split_off(named);
            match (family.kind, figure) {
                (Kind::Gauge(together), Figure::Number(number)) => {
                    let gauge = gauges.entry(rest).or_default();
                    *gauge = match together {
                        Aggregation::Sum => *gauge + number,
                        Aggregation::Max => gauge.max(number),
                    };
                }
                (_, figure) => {
                    let shared = (place, rest);
                    let nothing = match figure {
                        Figure::Number(_) => Figure::Number(0.0),
                        Figure::Distribution(_) => Figure::Distribution(Distribution::default()),
                    };
                    let counted = self.counted.entry(shared.clone()).or_insert(nothing);
                    counted.add_growth(&figure, last.get(&shared));
                    last.insert(shared, figure);
                }
            }
        });
        let counted = self.counted.iter().filter(|((family, _), _)| *family == place);
        let counted = counted.map(|((_, rest), figure)| (rest.clone(), figure.clone()));
        let gauges = gauges.into_iter().map(|(rest, number)| (rest, Figure::Number(number)));
        let mut others: Vec<_> = counted.chain(gauges).collect();
        others.sort_by(|a, b| a.0.cmp(&b.0));
        merged.extend(others.into_iter().map(|(rest, figure)| {
            let labels = std::iter::repeat_n(OTHER.to_owned(), named).chain(rest).collect();
            Series { labels, figure }
        }));
        merged
    }
}

fn key(subject: Subject, labels: &[String]) -> Key {
    (subject, subject.lasting_labels().iter().map(|&label| labels[label].clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        export::live,
        model::{
            busy::Split,
            deferred::HookCounters,
            place::Place,
            snapshot::{Gc, Missing, Own, Reactor, SCHEMA, Snapshot, Target},
        },
    };

    fn reactor(tid: u32, waits: u64, utilization: f64) -> Reactor {
        Reactor {
            tid,
            name: "loop".into(),
            slices: waits,
            waits,
            events: waits,
            wait_seconds: 1.0,
            busy_seconds: 1.0,
            utilization: Some(utilization),
            current_slice_seconds: None,
            current_stack: None,
            lag: lag(waits),
            slice: lag(waits),
            wakeup: lag(waits),
            split_seconds: Split::default(),
            stalls: crate::model::stall::Stalls::over(0.05),
            exited: false,
        }
    }

    fn lag(count: u64) -> crate::model::histogram::Histogram {
        let mut raw = observer_common::histogram::Histogram::EMPTY;
        raw.buckets[10].count = count;
        raw.buckets[10].sum_ns = count * 1000;
        (&raw).into()
    }

    fn snapshot(reactors: Vec<Reactor>) -> Snapshot {
        let target = Target {
            pid: 1,
            comm: "server".into(),
            exe: "/server".into(),
            place: Place::default(),
            exited: false,
            listeners: Vec::new(),
            reactors,
            deferred: Vec::new(),
            unmatched: 0,
            hooks: Vec::new(),
            gc: None,
        };
        let own = Own { version: "0", kernel: "0".into(), ..Own::default() };
        Snapshot { schema: SCHEMA, started: String::new(), duration_seconds: 1.0, targets: vec![target], own }
    }

    /// The series of a family, the other's last.
    fn series(cap: &mut SeriesLimiter, name: &str, reactors: Vec<Reactor>) -> Vec<Series> {
        let snapshot = snapshot(reactors);
        let found = cap.gather(&snapshot).find(|(family, _)| family.name == name);
        found.unwrap().1
    }

    fn tids(count: usize) -> impl Iterator<Item = u32> {
        1..=u32::try_from(count).unwrap()
    }

    #[test]
    fn up_to_the_cap_each_is_told_by_itself() {
        let reactors: Vec<_> = tids(SHOWN).map(|tid| reactor(tid, 7, 0.5)).collect();
        let all =
            series(&mut SeriesLimiter::at(Resolution::LOWEST), "observer_reactor_waits_total", reactors);
        assert_eq!(all.len(), SHOWN);
        assert!(all.iter().all(|series| series.figure == Figure::Number(7.0) && series.labels[0] == "1"));
    }

    #[test]
    fn the_surplus_is_added_up_and_only_grows() {
        let mut cap = SeriesLimiter::at(Resolution::LOWEST);
        let waits = |cap: &mut SeriesLimiter, reactors| {
            let mut all = series(cap, "observer_reactor_waits_total", reactors);
            let other = all.pop().unwrap();
            assert_eq!(other.labels, [OTHER; 6]);
            (all.len(), other.figure)
        };
        let reactors: Vec<_> = tids(SHOWN + 3).map(|tid| reactor(tid, 7, 0.5)).collect();
        assert_eq!(waits(&mut cap, reactors.clone()), (SHOWN, Figure::Number(21.0)));
        assert_eq!(waits(&mut cap, reactors.clone()), (SHOWN, Figure::Number(21.0)));
        // One of the others counts on, another one is gone: what it has counted remains.
        let mut later = reactors;
        later.pop();
        later[SHOWN].waits = 17;
        assert_eq!(waits(&mut cap, later.clone()), (SHOWN, Figure::Number(31.0)));
        // One that was told is gone: its place goes to a new one, not to one of the others.
        later.remove(0);
        later.push(reactor(9999, 1, 0.5));
        assert_eq!(waits(&mut cap, later), (SHOWN, Figure::Number(31.0)));
    }

    #[test]
    fn histograms_and_gauges_of_the_surplus_are_merged() {
        let reactors: Vec<_> =
            tids(SHOWN + 2).map(|tid| reactor(tid, u64::from(tid), f64::from(tid) / 1000.0)).collect();
        let most = u64::try_from(SHOWN).unwrap();
        let merged = series(
            &mut SeriesLimiter::at(Resolution::LOWEST),
            "observer_reactor_lag_seconds",
            reactors.clone(),
        );
        let Some(Series { figure: Figure::Distribution(merged), .. }) = merged.last() else {
            panic!("{merged:?}")
        };
        assert_eq!(merged.count, 2 * most + 3);
        assert_eq!(merged.buckets.last().unwrap().1, 2 * most + 3);
        let busiest = series(
            &mut SeriesLimiter::at(Resolution::LOWEST),
            "observer_reactor_utilization_ratio",
            reactors,
        );
        assert_eq!(busiest.last().unwrap().figure, Figure::Number(0.202));
    }

    #[test]
    fn whose_a_series_is_does_not_depend_on_names() {
        let mut cap = SeriesLimiter::at(Resolution::LOWEST);
        let mut reactors: Vec<_> = tids(SHOWN + 1).map(|tid| reactor(tid, 7, 0.5)).collect();
        series(&mut cap, "observer_reactor_waits_total", reactors.clone());
        reactors[SHOWN].name = "renamed".into();
        let all = series(&mut cap, "observer_reactor_waits_total", reactors);
        assert_eq!(all.last().unwrap().figure, Figure::Number(7.0));
    }

    #[test]
    fn everything_that_has_series_may_be_told_with_the_others() {
        let mut snapshot = live::testing::snapshot(1.0, |_| ());
        let target = &mut snapshot.targets[0];
        target.deferred.push(live::testing::kind("store", 5));
        target.hooks.push(HookCounters {
            profile: "mine".into(),
            verb: "restore",
            place: "libtask:task_execute".into(),
            hits: 5,
            matches: 5,
        });
        target.gc = Some(Gc { count: 1, seconds: None, pause: None });
        snapshot.own.missing.push(Missing { source: "wakeups".into(), reason: "no tracepoint".into() });

        let told = subjects(&snapshot).map(|(subject, labels)| key(subject, &labels)).collect();
        let mut present = HashSet::new();
        for family in families().filter(|family| family.subject() != Subject::Own) {
            let subject = family.subject();
            (family.collect)(&snapshot, &mut |labels, _| {
                present.insert(key(subject, &labels));
            });
        }
        assert_eq!(present, told);
        assert_eq!(present.len(), 7, "one of each subject: {present:?}");
    }
}
