//! The series of a scrape. Only a limited number of subjects of each kind have series of their own, so that a server with
//! thousands of threads does not overload the database; the series of all others are aggregated.

use std::collections::{HashMap, HashSet};

use crate::model::{
    catalog::families,
    family::{Aggregation, Family, Kind, Sink, Value},
    histogram::Resolution,
    snapshot::Snapshot,
    subject::{Identity, Label, Labels, Subject, SubjectKind, subjects},
};

/// Maximum number of subjects of each kind that have series of their own.
pub(crate) const MAX_SUBJECTS: usize = 200;

/// One series.
#[derive(Clone, Debug)]
pub(crate) struct Series<'s> {
    pub(crate) labels: Labels<'s>,
    pub(crate) sample: Sample,
}

/// The value of a series.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Sample {
    /// Of a counter or a gauge.
    Number(f64),
    /// Of a histogram.
    Distribution(Distribution),
}

/// A histogram at the bounds that are exported.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Distribution {
    pub(crate) count: u64,
    pub(crate) sum: f64,
    /// Upper bounds, each with the number of values that do not exceed it.
    pub(crate) buckets: Vec<(f64, u64)>,
}

impl Distribution {
    fn of(count: u64, sum: f64, buckets: impl Iterator<Item = (f64, u64)>) -> Self {
        Self { count, sum, buckets: buckets.collect() }
    }

    /// Adds the increase of another distribution between two readings.
    fn add_increase(&mut self, now: &Self, last: Option<&Self>) {
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

impl Sample {
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

    /// The value of the same type before anything was counted.
    fn zero(&self) -> Self {
        match self {
            Self::Number(_) => Self::Number(0.0),
            Self::Distribution(_) => Self::Distribution(Distribution::default()),
        }
    }

    /// Adds the increase of another sample of the same metric between two readings.
    fn add_increase(&mut self, now: &Self, last: Option<&Self>) {
        match (self, now, last) {
            (Self::Number(sum), Self::Number(now), Some(Self::Number(last))) => *sum += (now - last).max(0.0),
            (Self::Number(sum), Self::Number(now), _) => *sum += now,
            (Self::Distribution(sum), Self::Distribution(now), Some(Self::Distribution(last))) => {
                sum.add_increase(now, Some(last));
            }
            (Self::Distribution(sum), Self::Distribution(now), _) => sum.add_increase(now, None),
            (Self::Number(_), Self::Distribution(_), _) | (Self::Distribution(_), Self::Number(_), _) => {}
        }
    }
}

/// Labels that distinguish the series of a subject, by name.
type OwnLabels = Vec<(&'static str, String)>;

/// An aggregated series: the position of its family in the catalog, and its own labels.
type Aggregated = (usize, OwnLabels);

/// Decides which subjects have series of their own, and aggregates the series of the others.
///
/// A subject with series of its own keeps them until it is gone, and an aggregated subject stays aggregated: nothing is
/// counted twice. What the aggregated subjects have counted remains when one of them is gone: counters only grow.
#[derive(Debug)]
pub(crate) struct SeriesLimiter {
    /// Resolution of histograms.
    resolution: Resolution,
    individual: HashSet<Identity>,
    /// The aggregated subjects, each with its samples as they were last added.
    others: HashMap<Identity, HashMap<Aggregated, Sample>>,
    /// Sums over all aggregated subjects, including those that are gone.
    sums: HashMap<Aggregated, Sample>,
}

impl SeriesLimiter {
    /// A limiter without subjects. Histograms have this resolution.
    pub(crate) fn at(resolution: Resolution) -> Self {
        Self { resolution, individual: HashSet::new(), others: HashMap::new(), sums: HashMap::new() }
    }

    /// All series of a snapshot, by family in the order of the catalog. They are made one family at a time, because those of
    /// a thousand targets together take many megabytes.
    pub(crate) fn gather<'s>(
        &mut self,
        snapshot: &'s Snapshot,
    ) -> impl Iterator<Item = (&'static Family, Vec<Series<'s>>)> {
        self.assign(snapshot);
        families().enumerate().map(|(position, family)| (family, self.of_family(position, family, snapshot)))
    }

    /// Decides which subjects have series of their own.
    fn assign(&mut self, snapshot: &Snapshot) {
        let of_kind = |subject: Subject<'_>| Some((subject.kind(), subject.identity()?));
        let present: Vec<_> = subjects(snapshot).filter_map(of_kind).collect();
        let kinds: HashMap<&Identity, SubjectKind> =
            present.iter().map(|(kind, identity)| (identity, *kind)).collect();
        self.individual.retain(|identity| kinds.contains_key(identity));
        self.others.retain(|identity, _| kinds.contains_key(identity));
        let mut counts = HashMap::<SubjectKind, usize>::new();
        for identity in &self.individual {
            *counts.entry(kinds[identity]).or_default() += 1;
        }
        for (kind, identity) in present {
            if self.individual.contains(&identity) || self.others.contains_key(&identity) {
                continue;
            }
            let count = counts.entry(kind).or_default();
            if *count < MAX_SUBJECTS {
                *count += 1;
                self.individual.insert(identity);
            } else {
                self.others.insert(identity, HashMap::new());
            }
        }
    }

    /// The series of one family, the aggregated ones last.
    fn of_family<'s>(&mut self, position: usize, family: &Family, snapshot: &'s Snapshot) -> Vec<Series<'s>> {
        let mut series = Vec::new();
        let mut gauges = HashMap::<OwnLabels, f64>::new();
        let mut add = |labels: Labels<'s>, value: Value<'s>| {
            let sample = Sample::of(&value, self.resolution);
            let identity = labels.subject.identity();
            let Some(last) = identity.and_then(|identity| self.others.get_mut(&identity)) else {
                series.push(Series { labels, sample });
                return;
            };
            let own: OwnLabels =
                labels.own.into_iter().map(|(name, value)| (name, value.into_owned())).collect();
            match (family.kind, sample) {
                (Kind::Gauge(aggregation), Sample::Number(number)) => {
                    let gauge = gauges.entry(own).or_default();
                    *gauge = match aggregation {
                        Aggregation::Sum => *gauge + number,
                        Aggregation::Max => gauge.max(number),
                    };
                }
                (_, sample) => {
                    let aggregated = (position, own);
                    let sum = self.sums.entry(aggregated.clone()).or_insert_with(|| sample.zero());
                    sum.add_increase(&sample, last.get(&aggregated));
                    last.insert(aggregated, sample);
                }
            }
        };
        (family.collect)(snapshot, Sink(&mut add));
        let sums = self.sums.iter().filter(|((family, _), _)| *family == position);
        let sums = sums.map(|((_, own), sample)| (own.clone(), sample.clone()));
        let gauges = gauges.into_iter().map(|(own, number)| (own, Sample::Number(number)));
        let mut others: Vec<_> = sums.chain(gauges).collect();
        others.sort_by(|a, b| a.0.cmp(&b.0));
        series.extend(others.into_iter().map(|(own, sample)| {
            let own = own.into_iter().map(|(name, value)| -> Label<'s> { (name, value.into()) }).collect();
            Series { labels: Labels { subject: Subject::Other(family.subject), own }, sample }
        }));
        series
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        export::live,
        model::{
            busy::Split,
            deferred::HookCounters,
            snapshot::{Duty, Gc, Missing, Own, Reactor, SCHEMA, Snapshot, Target},
            subject::OTHER,
            workload::Workload,
        },
    };

    fn reactor(tid: u32, waits: u64, utilization: f64) -> Reactor {
        Reactor {
            id: tid.to_string(),
            tid,
            only_tid: Some(tid),
            threads: 1,
            name: "loop".into(),
            slices: waits,
            waits,
            events: waits,
            events_delayed: waits,
            wait_seconds: 1.0,
            busy_seconds: 1.0,
            utilization: Some(utilization),
            current_slice_seconds: None,
            current_slice_events_wait: None,
            current_stack: None,
            lag: lag(waits),
            slice: lag(waits),
            wakeup: lag(waits),
            event_delay: lag(waits),
            split_seconds: Split::default(),
            stalls: crate::model::stall::Stalls::over(0.05),
            exited: false,
            duty: Duty::default(),
            is_worker: false,
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
            parent: 1,
            workload: Workload::default(),
            exited: false,
            listeners: Vec::new(),
            reactors,
            unwatched_waits: None,
            deferred: Vec::new(),
            unmatched: 0,
            hooks: Vec::new(),
            gc: None,
        };
        let own = Own { version: "0", kernel: "0".into(), ..Own::default() };
        Snapshot {
            schema: SCHEMA,
            started: String::new(),
            duration_seconds: 1.0,
            targets: vec![target],
            workers: Vec::new(),
            own,
        }
    }

    /// The label values and the sample of each series of a family, the aggregated ones last.
    fn series(limiter: &mut SeriesLimiter, name: &str, reactors: Vec<Reactor>) -> Vec<(Vec<String>, Sample)> {
        let snapshot = snapshot(reactors);
        let (_, series) = limiter.gather(&snapshot).find(|(family, _)| family.name == name).unwrap();
        let values = |labels: Labels<'_>| labels.all().map(|(_, value)| value.into_owned()).collect();
        series.into_iter().map(|series| (values(series.labels), series.sample)).collect()
    }

    fn tids(count: usize) -> impl Iterator<Item = u32> {
        1..=u32::try_from(count).unwrap()
    }

    #[test]
    fn up_to_the_limit_each_subject_has_its_own_series() {
        let reactors: Vec<_> = tids(MAX_SUBJECTS).map(|tid| reactor(tid, 7, 0.5)).collect();
        let all =
            series(&mut SeriesLimiter::at(Resolution::LOWEST), "observer_reactor_waits_total", reactors);
        assert_eq!(all.len(), MAX_SUBJECTS);
        assert!(all.iter().all(|(labels, sample)| *sample == Sample::Number(7.0) && labels[0] == "1"));
    }

    #[test]
    fn sums_over_the_other_subjects_only_grow() {
        let mut limiter = SeriesLimiter::at(Resolution::LOWEST);
        let waits = |limiter: &mut SeriesLimiter, reactors| {
            let mut all = series(limiter, "observer_reactor_waits_total", reactors);
            let (labels, sample) = all.pop().unwrap();
            assert_eq!(labels, [OTHER; 6]);
            (all.len(), sample)
        };
        let reactors: Vec<_> = tids(MAX_SUBJECTS + 3).map(|tid| reactor(tid, 7, 0.5)).collect();
        assert_eq!(waits(&mut limiter, reactors.clone()), (MAX_SUBJECTS, Sample::Number(21.0)));
        assert_eq!(waits(&mut limiter, reactors.clone()), (MAX_SUBJECTS, Sample::Number(21.0)));
        // One of the others counts on, another one is gone: what it has counted remains.
        let mut later = reactors;
        later.pop();
        later[MAX_SUBJECTS].waits = 17;
        assert_eq!(waits(&mut limiter, later.clone()), (MAX_SUBJECTS, Sample::Number(31.0)));
        // One that was told is gone: its place goes to a new one, not to one of the others.
        later.remove(0);
        later.push(reactor(9999, 1, 0.5));
        assert_eq!(waits(&mut limiter, later), (MAX_SUBJECTS, Sample::Number(31.0)));
    }

    #[test]
    fn histograms_and_gauges_of_the_others_are_aggregated() {
        let reactors: Vec<_> =
            tids(MAX_SUBJECTS + 2).map(|tid| reactor(tid, u64::from(tid), f64::from(tid) / 1000.0)).collect();
        let most = u64::try_from(MAX_SUBJECTS).unwrap();
        let merged = series(
            &mut SeriesLimiter::at(Resolution::LOWEST),
            "observer_reactor_lag_seconds",
            reactors.clone(),
        );
        let Some((_, Sample::Distribution(merged))) = merged.last() else { panic!("{merged:?}") };
        assert_eq!(merged.count, 2 * most + 3);
        assert_eq!(merged.buckets.last().unwrap().1, 2 * most + 3);
        let busiest = series(
            &mut SeriesLimiter::at(Resolution::LOWEST),
            "observer_reactor_utilization_ratio",
            reactors,
        );
        assert_eq!(busiest.last().unwrap().1, Sample::Number(0.202));
    }

    #[test]
    fn an_identity_does_not_depend_on_names() {
        let mut limiter = SeriesLimiter::at(Resolution::LOWEST);
        let mut reactors: Vec<_> = tids(MAX_SUBJECTS + 1).map(|tid| reactor(tid, 7, 0.5)).collect();
        series(&mut limiter, "observer_reactor_waits_total", reactors.clone());
        reactors[MAX_SUBJECTS].name = "renamed".into();
        let all = series(&mut limiter, "observer_reactor_waits_total", reactors);
        assert_eq!(all.last().unwrap().1, Sample::Number(7.0));
    }

    #[test]
    fn all_subjects_with_series_are_limited() {
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

        let limited: HashSet<_> = subjects(&snapshot).filter_map(Subject::identity).collect();
        let mut present = HashSet::new();
        for family in families() {
            let mut add = |labels: Labels<'_>, _: Value<'_>| {
                assert_eq!(labels.subject.kind(), family.subject, "{}", family.name);
                let own: Vec<_> = labels.own.iter().map(|(name, _)| *name).collect();
                assert_eq!(own, family.own_labels, "{}", family.name);
                let names: Vec<_> = labels.subject.labels().into_iter().map(|(name, _)| name).collect();
                assert_eq!(names, family.subject.labels(), "{}", family.name);
                present.extend(labels.subject.identity());
            };
            (family.collect)(&snapshot, Sink(&mut add));
        }
        assert_eq!(present, limited);
        assert_eq!(present.len(), 7, "one of each kind: {present:?}");
    }
}
