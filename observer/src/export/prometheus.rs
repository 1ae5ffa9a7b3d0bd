//! The scrape endpoint: a snapshot in Prometheus' text format, straight from the metric catalog.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus::{
    Encoder as _, TextEncoder,
    proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};
use tokio::net::TcpListener;

use crate::{
    model::{
        catalog::{CATALOG, Family, Kind, Value},
        snapshot::Snapshot,
    },
    observation::Observation,
};

/// An observation that the endpoint and the main loop share.
pub(crate) type Shared = Arc<Mutex<Observation>>;

/// Answers scrapes until it is dropped.
pub(crate) async fn serve(listener: TcpListener, observation: Shared) -> Result<()> {
    let routes = Router::new().route("/metrics", get(metrics)).with_state(observation);
    Ok(axum::serve(listener, routes).await?)
}

async fn metrics(State(observation): State<Shared>) -> Response {
    let snapshot = observation.lock().unwrap_or_else(PoisonError::into_inner).snapshot();
    match snapshot.and_then(|snapshot| encode(&snapshot)) {
        Ok(text) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response(),
    }
}

fn encode(snapshot: &Snapshot) -> Result<String> {
    let families: Vec<_> = CATALOG
        .iter()
        .map(|family| collect(family, snapshot))
        .filter(|f| !f.get_metric().is_empty())
        .collect();
    let mut text = Vec::new();
    TextEncoder::new().encode(&families, &mut text)?;
    Ok(String::from_utf8(text)?)
}

fn collect(family: &Family, snapshot: &Snapshot) -> MetricFamily {
    let mut metrics = Vec::new();
    (family.collect)(snapshot, &mut |labels, value| {
        let labels = family.labels.iter().zip(labels).map(|(name, value)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).into());
            pair.set_value(value);
            pair
        });
        let mut metric = Metric::from_label(labels.collect());
        match (family.kind, value) {
            (Kind::Counter, Value::Number(number)) => {
                let mut counter = Counter::default();
                counter.set_value(number);
                metric.set_counter(counter);
            }
            (_, Value::Number(number)) => {
                let mut gauge = Gauge::default();
                gauge.set_value(number);
                metric.set_gauge(gauge);
            }
            (_, Value::Histogram(histogram)) => {
                let buckets = histogram.cumulative_by_octave();
                metric.set_histogram(distribution(histogram.count(), histogram.sum(), buckets));
            }
            (_, Value::Depths(depths)) => {
                let buckets = depths.cumulative().map(|(bound, count)| (bound.into(), count));
                metric.set_histogram(distribution(depths.counts.iter().sum(), depths.sum(), buckets));
            }
        }
        metrics.push(metric);
    });
    let mut proto = MetricFamily::default();
    proto.set_name(family.name.into());
    proto.set_help(family.help.into());
    proto.set_field_type(match family.kind {
        Kind::Counter => MetricType::COUNTER,
        Kind::Gauge => MetricType::GAUGE,
        Kind::Histogram => MetricType::HISTOGRAM,
    });
    proto.set_metric(metrics);
    proto
}

fn distribution(count: u64, sum: f64, buckets: impl Iterator<Item = (f64, u64)>) -> Histogram {
    let mut proto = Histogram::default();
    proto.set_sample_count(count);
    proto.set_sample_sum(sum);
    let buckets = buckets.map(|(bound, count)| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(bound);
        bucket.set_cumulative_count(count);
        bucket
    });
    proto.set_bucket(buckets.collect());
    proto
}
