//! A snapshot as OTLP metrics, straight from the metric catalog: the figures of a scrape, cumulative, with the true time
//! since when they are counted.

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

use super::{exemplars::Exemplars, nanoseconds, resource::Resources, signal::Batch};
use crate::{
    export::series::{Distribution, Figure, Series, SeriesLimiter},
    model::{
        family::{Family, Kind},
        snapshot::{Snapshot, Target},
        subject::Subject,
    },
    process::Process,
};

/// Most bytes of a request, but for a process that alone has more; collectors take 4 MiB.
const REQUEST: usize = 1 << 20;

/// All figures of a snapshot as requests.
pub(super) fn encode(
    snapshot: &Snapshot,
    cap: &mut SeriesLimiter,
    resources: &mut Resources,
    exemplars: &Exemplars,
) -> Vec<Batch<Bytes>> {
    let now = nanoseconds(SystemTime::now());
    let mut batches = Vec::new();
    let (mut request, mut bytes, mut items) = (MetricsRequest::default(), 0, 0);
    for one in of_resources(snapshot, cap, resources, exemplars, now) {
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

/// How many data points there are.
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

/// Figures by whose they are, observer's own first.
fn of_resources(
    snapshot: &Snapshot,
    cap: &mut SeriesLimiter,
    resources: &mut Resources,
    exemplars: &Exemplars,
    now: u64,
) -> Vec<ResourceMetrics> {
    let mut by_pid = BTreeMap::<Option<u32>, Vec<(&Family, Vec<Series>)>>::new();
    for (family, series) in cap.gather(snapshot) {
        let mut of_family = BTreeMap::<Option<u32>, Vec<Series>>::new();
        for series in series {
            of_family.entry(pid(family, &series)).or_default().push(series);
        }
        for (pid, series) in of_family {
            by_pid.entry(pid).or_default().push((family, series));
        }
    }
    // What those did that are gone may be told yet.
    resources.keep(|pid| snapshot.targets.iter().any(|target| target.pid == pid));
    let mut all = Vec::new();
    for (pid, families) in by_pid {
        let target =
            pid.and_then(|pid| snapshot.targets.iter().rfind(|target| target.pid == pid && !target.exited));
        let (resource, start) = match target {
            Some(target) => resources.of(&process(target)),
            None => (resources.own(), resources.started()),
        };
        let whose = Whose { is_in_resource: target.is_some(), start, now, exemplars };
        let metrics = families.into_iter().map(|(family, series)| whose.metric(family, series)).collect();
        let scope = InstrumentationScope {
            name: "observer".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..InstrumentationScope::default()
        };
        let scope_metrics = vec![ScopeMetrics { scope: Some(scope), metrics, ..ScopeMetrics::default() }];
        all.push(ResourceMetrics {
            resource: Some(message(&resource)),
            scope_metrics,
            ..ResourceMetrics::default()
        });
    }
    all
}

fn message(resource: &Resource) -> resource::v1::Resource {
    let attributes = ResourceAttributesWithSchema::from(resource).attributes.0;
    resource::v1::Resource { attributes, ..resource::v1::Resource::default() }
}

/// Which process a series is of; `None` if it is observer's own or that of several told together.
fn pid(family: &Family, series: &Series) -> Option<u32> {
    let has_pid = family.labels.first() == Some(&"pid");
    has_pid.then(|| series.labels[0].parse().ok()).flatten()
}

fn process(target: &Target) -> Process {
    let Target { pid, comm, exe, place, .. } = target;
    Process { pid: *pid, comm: comm.clone(), exe: exe.clone(), place: place.clone() }
}

/// What all data points of a resource have in common.
struct Whose<'e> {
    /// Whether the resource tells which process it is.
    is_in_resource: bool,
    start: u64,
    now: u64,
    exemplars: &'e Exemplars,
}

impl Whose<'_> {
    fn metric(&self, family: &Family, series: Vec<Series>) -> Metric {
        let data = match family.kind {
            Kind::Gauge(_) => {
                // What goes up and down has not been counted since any time.
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

    fn numbers(&self, family: &Family, series: Vec<Series>, start: u64) -> Vec<NumberDataPoint> {
        let points = series.into_iter().filter_map(|series| {
            let Figure::Number(number) = series.figure else { return None };
            Some(NumberDataPoint {
                attributes: self.attributes(family, series.labels),
                start_time_unix_nano: start,
                time_unix_nano: self.now,
                value: Some(value(family, number)),
                ..NumberDataPoint::default()
            })
        });
        points.collect()
    }

    fn histograms(&self, family: &Family, series: Vec<Series>) -> Vec<HistogramDataPoint> {
        let points = series.into_iter().filter_map(|series| {
            let Figure::Distribution(distribution) = series.figure else { return None };
            Some(HistogramDataPoint {
                exemplars: self.exemplars.of(family.name, &series.labels),
                attributes: self.attributes(family, series.labels),
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

    /// Labels, but for those that the resource tells. A name that may change is told with what always is 1 alone.
    fn attributes(&self, family: &Family, labels: Vec<String>) -> Vec<KeyValue> {
        let labels = family.labels.iter().zip(labels).filter(|(name, _)| match **name {
            "pid" | "container" | "pod" | "exe" | "namespace" | "container_name" | "pod_uid" | "unit" => {
                !self.is_in_resource
            }
            "comm" => !self.is_in_resource || family.subject() == Subject::Program,
            _ => true,
        });
        labels
            .map(|(name, value)| match (*name, value.parse()) {
                ("tid", Ok(tid)) => attribute("thread.id", Value::IntValue(tid)),
                ("tid", Err(_)) => attribute("thread.id", Value::StringValue(value)),
                ("reactor", _) => attribute("thread.name", Value::StringValue(value)),
                _ => attribute(name, Value::StringValue(value)),
            })
            .collect()
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    KeyValue { key: key.into(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

/// What is counted is a whole number.
#[expect(clippy::cast_possible_truncation, reason = "counts come as floats, whole ones")]
fn value(family: &Family, number: f64) -> Number {
    if family.unit.starts_with('{') { Number::AsInt(number as i64) } else { Number::AsDouble(number) }
}

/// How many are between each bound and the one before, and how many beyond the last.
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
    fn buckets_count_by_themselves() {
        let distribution = Distribution { count: 9, sum: 1.0, buckets: vec![(1.0, 2), (2.0, 2), (4.0, 7)] };
        assert_eq!(counts(&distribution), [2, 0, 5, 2]);
        assert_eq!(counts(&Distribution::default()), [0]);
    }

    #[test]
    fn each_process_has_a_resource_and_observer_another() {
        let snapshot = snapshot(vec![target(7), target(8)]);
        let all = of_resources(
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
    fn large_snapshots_are_sent_in_parts() {
        // Those beyond the cap have no resource of their own.
        let mut snapshot = snapshot(
            (1..=crate::export::series::SHOWN).map(|pid| target(u32::try_from(pid).unwrap())).collect(),
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
