//! Encodes a snapshot in the Prometheus text format.

use anyhow::Result;
use prometheus::{
    Encoder as _, TextEncoder,
    proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

use super::series::{Distribution, Sample, Series, SeriesLimiter};
use crate::model::{
    family::{Family, Kind},
    snapshot::Snapshot,
};

/// Encodes a snapshot; families without series are left out.
pub(crate) fn encode(snapshot: &Snapshot, limiter: &mut SeriesLimiter) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    // Family by family: the library's representation of a family takes several times the memory of its text.
    for (of, series) in limiter.gather(snapshot).filter(|(_, series)| !series.is_empty()) {
        TextEncoder::new().encode(&[family(of, series)], &mut text)?;
    }
    Ok(text)
}

fn family(family: &Family, series: Vec<Series<'_>>) -> MetricFamily {
    let mut proto = MetricFamily::default();
    proto.set_name(family.name.into());
    proto.set_help(family.help.into());
    proto.set_field_type(match family.kind {
        Kind::Counter => MetricType::COUNTER,
        Kind::Gauge(_) => MetricType::GAUGE,
        Kind::Histogram => MetricType::HISTOGRAM,
    });
    proto.set_metric(series.into_iter().map(|series| metric(family, series)).collect());
    proto
}

fn metric(family: &Family, series: Series<'_>) -> Metric {
    let labels = series.labels.all().map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.into());
        pair.set_value(value.into_owned());
        pair
    });
    let mut metric = Metric::from_label(labels.collect());
    match series.sample {
        Sample::Number(number) if family.kind == Kind::Counter => {
            let mut counter = Counter::default();
            counter.set_value(number);
            metric.set_counter(counter);
        }
        Sample::Number(number) => {
            let mut gauge = Gauge::default();
            gauge.set_value(number);
            metric.set_gauge(gauge);
        }
        Sample::Distribution(distribution) => metric.set_histogram(histogram(&distribution)),
    }
    metric
}

fn histogram(distribution: &Distribution) -> Histogram {
    let mut proto = Histogram::default();
    proto.set_sample_count(distribution.count);
    proto.set_sample_sum(distribution.sum);
    let buckets = distribution.buckets.iter().map(|&(bound, count)| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(bound);
        bucket.set_cumulative_count(count);
        bucket
    });
    proto.set_bucket(buckets.collect());
    proto
}
