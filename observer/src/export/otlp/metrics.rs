//! Encodes a snapshot as OTLP metrics: the samples of a scrape, cumulative, each with the time since when it is counted.

use std::{collections::BTreeMap, time::SystemTime};

use bytes::Bytes;
use opentelemetry_proto::{
    tonic::{
        collector::metrics::v1::ExportMetricsServiceRequest as MetricsRequest,
        common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value::Value},
        metrics::v1::{
            AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
            ResourceMetrics, ScopeMetrics, Sum, metric::Data, number_data_point::Value as Number,
        },
        resource,
    },
    transform::common::tonic::ResourceAttributesWithSchema,
};
use opentelemetry_sdk::Resource;
use prost::Message as _;

use super::{client::Batch, exemplars::Exemplars, resource::Resources, time::nanoseconds};
use crate::{
    export::series::{Distribution, Sample, Series, SeriesLimiter},
    model::{
        family::{Family, Kind},
        snapshot::{Snapshot, Target},
        subject::{Label, Labels, SubjectKind},
    },
    process::Process,
};

/// Maximum size of a request in bytes, unless the metrics of a single process are larger; collectors accept 4 MiB.
const REQUEST: usize = 1 << 20;

/// Encodes all metrics of a snapshot as requests.
pub(super) fn encode(
    snapshot: &Snapshot,
    limiter: &mut SeriesLimiter,
    resources: &mut Resources,
    exemplars: &Exemplars,
) -> Vec<Batch<Bytes>> {
    let now = nanoseconds(SystemTime::now());
    let mut batches = Vec::new();
    let (mut request, mut bytes, mut items) = (MetricsRequest::default(), 0, 0);
    for one in by_resource(snapshot, limiter, resources, exemplars, now) {
        let size = one.encoded_len();
        if bytes > 0 && bytes + size > REQUEST {
            batches.push(batch(&std::mem::take(&mut request), items));
            (bytes, items) = (0, 0);
        }
        (bytes, items) = (bytes + size, items + points(&one));
        request.resource_metrics.push(one);
    }
    batches.push(batch(&request, items));
    batches
}

fn batch(request: &MetricsRequest, items: u64) -> Batch<Bytes> {
    let request = Bytes::from(request.encode_to_vec());
    Batch { bytes: request.len(), request, items }
}

/// Number of data points.
fn points(resource: &ResourceMetrics) -> u64 {
    let metrics = resource.scope_metrics.iter().flat_map(|scope| &scope.metrics);
    let count = metrics.map(|metric| match &metric.data {
        Some(Data::Sum(sum)) => sum.data_points.len(),
        Some(Data::Gauge(gauge)) => gauge.data_points.len(),
        Some(Data::Histogram(histogram)) => histogram.data_points.len(),
        _ => 0,
    });
    count.sum::<usize>().try_into().unwrap_or(u64::MAX)
}

/// The metrics of one process, or of observer itself.
#[derive(Default)]
struct OfResource<'s> {
    /// `None` for metrics of observer and for aggregated series.
    target: Option<&'s Target>,
    families: Vec<(&'static Family, Vec<Series<'s>>)>,
}

/// All metrics of a snapshot by resource, those of observer first.
fn by_resource(
    snapshot: &Snapshot,
    limiter: &mut SeriesLimiter,
    resources: &mut Resources,
    exemplars: &Exemplars,
    now: u64,
) -> Vec<ResourceMetrics> {
    let mut by_pid = BTreeMap::<Option<u32>, OfResource<'_>>::new();
    for (family, series) in limiter.gather(snapshot) {
        let mut of_family = BTreeMap::<Option<u32>, Vec<Series<'_>>>::new();
        for series in series {
            let target = series.labels.subject.target();
            let pid = target.map(|target| target.pid);
            by_pid.entry(pid).or_default().target = target;
            of_family.entry(pid).or_default().push(series);
        }
        for (pid, series) in of_family {
            by_pid.entry(pid).or_default().families.push((family, series));
        }
    }
    // Spans of a process that has exited may still follow while it is in the snapshot.
    resources.keep(|pid| snapshot.targets.iter().any(|target| target.pid == pid));
    by_pid.into_values().map(|metrics| metrics.encode(resources, exemplars, now)).collect()
}

impl OfResource<'_> {
    fn encode(self, resources: &mut Resources, exemplars: &Exemplars, now: u64) -> ResourceMetrics {
        let (resource, start) = match self.target {
            Some(target) => resources.of(&process(target)),
            None => (resources.own(), resources.started()),
        };
        let points = Points { start, now, exemplars };
        let metrics = self.families.into_iter().map(|(family, series)| points.metric(family, series));
        let scope = InstrumentationScope {
            name: "observer".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..InstrumentationScope::default()
        };
        let scope_metrics =
            vec![ScopeMetrics { scope: Some(scope), metrics: metrics.collect(), ..ScopeMetrics::default() }];
        ResourceMetrics { resource: Some(message(&resource)), scope_metrics, ..ResourceMetrics::default() }
    }
}

fn message(resource: &Resource) -> resource::v1::Resource {
    let attributes = ResourceAttributesWithSchema::from(resource).attributes.0;
    resource::v1::Resource { attributes, ..resource::v1::Resource::default() }
}

fn process(target: &Target) -> Process {
    let Target { pid, comm, exe, parent, workload, .. } = target;
    Process { pid: *pid, comm: comm.clone(), exe: exe.clone(), parent: *parent, workload: workload.clone() }
}

/// Makes the data points of one resource.
struct Points<'e> {
    /// Since when counters and histograms are counted, in nanoseconds since 1970.
    start: u64,
    now: u64,
    exemplars: &'e Exemplars,
}

impl Points<'_> {
    fn metric(&self, family: &Family, series: Vec<Series<'_>>) -> Metric {
        let data = match family.kind {
            Kind::Gauge(_) => {
                // A gauge has no start.
                let data_points = self.numbers(family, series, 0);
                Data::Gauge(Gauge { data_points })
            }
            Kind::Counter => Data::Sum(Sum {
                data_points: self.numbers(family, series, self.start),
                aggregation_temporality: AggregationTemporality::Cumulative.into(),
                is_monotonic: true,
            }),
            Kind::Histogram => Data::Histogram(Histogram {
                data_points: self.histograms(family, series),
                aggregation_temporality: AggregationTemporality::Cumulative.into(),
            }),
        };
        Metric {
            name: family.otlp.into(),
            description: family.help.into(),
            unit: family.unit.into(),
            data: Some(data),
            ..Metric::default()
        }
    }

    fn numbers(&self, family: &Family, series: Vec<Series<'_>>, start: u64) -> Vec<NumberDataPoint> {
        let points = series.into_iter().filter_map(|series| {
            let Sample::Number(number) = series.sample else { return None };
            Some(NumberDataPoint {
                attributes: attributes(series.labels),
                start_time_unix_nano: start,
                time_unix_nano: self.now,
                value: Some(value(family, number)),
                ..NumberDataPoint::default()
            })
        });
        points.collect()
    }

    fn histograms(&self, family: &Family, series: Vec<Series<'_>>) -> Vec<HistogramDataPoint> {
        let points = series.into_iter().filter_map(|series| {
            let Sample::Distribution(distribution) = series.sample else { return None };
            Some(HistogramDataPoint {
                exemplars: self.exemplars.of(family.name, series.labels.subject).into_iter().collect(),
                attributes: attributes(series.labels),
                start_time_unix_nano: self.start,
                time_unix_nano: self.now,
                count: distribution.count,
                sum: Some(distribution.sum),
                bucket_counts: counts(&distribution),
                explicit_bounds: distribution.buckets.iter().map(|(bound, _)| *bound).collect(),
                ..HistogramDataPoint::default()
            })
        });
        points.collect()
    }
}

/// The labels of a series, without those that its resource has. The name of a process may change, so it is not in the
/// resource; it is only added to the metric whose value is always 1.
fn attributes(labels: Labels<'_>) -> Vec<KeyValue> {
    let is_in_resource = labels.subject.target().is_some();
    let kind = labels.subject.kind();
    let is_added = |name: &str| {
        let is_name = name == "comm" && kind == SubjectKind::Program;
        !is_in_resource || is_name || !SubjectKind::Program.labels().contains(&name)
    };
    labels.all().filter(|(name, _)| is_added(name)).map(attribute).collect()
}

fn attribute((name, value): Label<'_>) -> KeyValue {
    let key = match name {
        "loop" => "observer.loop",
        "reactor" => "thread.name",
        _ => name,
    };
    let value = Some(AnyValue { value: Some(Value::StringValue(value.into_owned())) });
    KeyValue { key: key.into(), value, ..KeyValue::default() }
}

/// The value of a number. Counts of things are integers.
#[expect(clippy::cast_possible_truncation, reason = "counts are integers that were converted to floats")]
fn value(family: &Family, number: f64) -> Number {
    if family.unit.starts_with('{') { Number::AsInt(number as i64) } else { Number::AsDouble(number) }
}

/// Number of values between each bound and the one before, and above the last.
fn counts(distribution: &Distribution) -> Vec<u64> {
    let mut below = 0;
    let cumulative = distribution.buckets.iter().map(|(_, count)| *count).chain([distribution.count]);
    cumulative.map(|count| count - std::mem::replace(&mut below, count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        export::otlp::testing::{settings, snapshot, target},
        model::histogram::Resolution,
    };

    fn resources() -> Resources {
        Resources::new(&settings(), SystemTime::UNIX_EPOCH)
    }

    #[test]
    fn buckets_are_not_cumulative() {
        let distribution = Distribution { count: 9, sum: 1.0, buckets: vec![(1.0, 2), (2.0, 2), (4.0, 7)] };
        assert_eq!(counts(&distribution), [2, 0, 5, 2]);
        assert_eq!(counts(&Distribution::default()), [0]);
    }

    #[test]
    fn each_process_and_observer_have_a_resource() {
        let snapshot = snapshot(vec![target(7), target(8)]);
        let all = by_resource(
            &snapshot,
            &mut SeriesLimiter::at(Resolution::LOWEST),
            &mut resources(),
            &Exemplars::default(),
            1,
        );
        assert_eq!(all.len(), 3);
        let names = |n: usize| -> Vec<_> {
            all[n].scope_metrics[0].metrics.iter().map(|metric| metric.name.as_str()).collect()
        };
        assert_eq!(
            names(0),
            [
                "observer.build.info",
                "observer.self.targets",
                "observer.self.map_memory",
                "observer.self.off",
                "observer.self.attach_waiting",
                "observer.self.config_reloads",
            ]
        );
        assert_eq!(names(1), ["observer.target.info"]);
        assert_eq!(names(2), ["observer.target.info"]);
        assert_eq!(points(&all[0]), 7);
    }

    #[test]
    fn large_snapshots_become_several_requests() {
        // Aggregated series have no resource of a process.
        let mut snapshot = snapshot(
            (1..=crate::export::series::MAX_SUBJECTS)
                .map(|pid| target(u32::try_from(pid).unwrap()))
                .collect(),
        );
        for target in &mut snapshot.targets {
            target.exe = "/x".repeat(8 << 10);
        }
        let batches = encode(
            &snapshot,
            &mut SeriesLimiter::at(Resolution::LOWEST),
            &mut resources(),
            &Exemplars::default(),
        );
        assert!(batches.len() > 1);
        assert!(batches.iter().all(|batch| batch.bytes <= REQUEST + 1024));
        let items: u64 = batches.iter().map(|batch| batch.items).sum();
        let decoded = batches
            .iter()
            .flat_map(|batch| MetricsRequest::decode(batch.request.clone()).unwrap().resource_metrics);
        assert_eq!(decoded.map(|one| points(&one)).sum::<u64>(), items);
        assert_eq!(items, 7 + 200);
    }
}
