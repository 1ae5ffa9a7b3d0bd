//! Sends spans with the exporter of `opentelemetry-otlp`. The exporter returns only whether it succeeded; whether the
//! collector refused the spans for good, how many it rejected and how often the exporter tried, it says in events of
//! `tracing`, which [`Verdict`] collects.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use opentelemetry_otlp::{
    Compression, ExporterBuildError, RetryPolicy, SpanExporter, WithExportConfig as _, WithHttpConfig as _,
    WithTonicConfig as _,
};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter as _},
};
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    instrument::WithSubscriber as _,
    span,
};

use super::{
    client::{Accepted, Client, Failed, Retry},
    connection::Connection,
    settings::Endpoint,
    signal::Signal,
};
use crate::model::delivery::ExportStats;

/// How long the exporter may retry before it fails. Its own delays are seconds at most, but a collector may request half a minute
/// before each retry. The connection limits the duration of each attempt.
const RETRYING: Duration = Duration::from_secs(300);

/// Spans of one process.
#[derive(Debug)]
pub(super) struct SpanBatch {
    pub(super) resource: Resource,
    pub(super) spans: Vec<SpanData>,
}

/// Sends one request for each process: a span exporter has one resource.
pub(super) struct SpanClient {
    endpoint: Endpoint,
    connection: Connection,
    stats: Arc<ExportStats>,
}

impl SpanClient {
    pub(super) fn new(endpoint: Endpoint, connection: Connection, stats: Arc<ExportStats>) -> Self {
        Self { endpoint, connection, stats }
    }

    fn exporter(&self, resource: &Resource, is_last: bool) -> Result<SpanExporter, ExporterBuildError> {
        let retries = if is_last { RetryPolicy::disabled() } else { RetryPolicy::recommended() };
        let compression = self.endpoint.gzip.then_some(Compression::Gzip);
        // No headers are passed: the exporter reads them from the same environment variables as observer.
        let mut exporter = match &self.connection {
            Connection::Grpc(channel) => {
                let builder = SpanExporter::builder()
                    .with_tonic()
                    .with_channel(channel.clone())
                    .with_timeout(RETRYING)
                    .with_retry_policy(retries);
                match compression {
                    Some(compression) => builder.with_compression(compression).build()?,
                    None => builder.build()?,
                }
            }
            Connection::Http(http) => {
                let builder = SpanExporter::builder()
                    .with_http()
                    .with_shared_http_client(Arc::clone(http) as _)
                    .with_endpoint(self.endpoint.uri.to_string())
                    .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
                    .with_timeout(RETRYING)
                    .with_retry_policy(retries);
                match compression {
                    Some(compression) => builder.with_compression(compression).build()?,
                    None => builder.build()?,
                }
            }
        };
        exporter.set_resource(resource);
        Ok(exporter)
    }
}

impl Client for SpanClient {
    type Request = SpanBatch;
    const SIGNAL: Signal = Signal::Traces;
    /// Several, because each process is a request: the batches of a thousand processes would otherwise take a thousand round trips
    /// in sequence.
    const CONCURRENCY: usize = 16;

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    async fn send(&self, batch: &SpanBatch, is_last: bool) -> Result<Accepted, Failed> {
        let exporter = self
            .exporter(&batch.resource, is_last)
            .map_err(|error| Failed { why: error.to_string(), retry: Retry::Never })?;
        let events = Events::new(Arc::clone(&self.stats));
        let result = exporter.export(batch.spans.clone()).with_subscriber(events.clone()).await;
        let verdict = events.verdict();
        match result {
            Ok(()) => Ok(Accepted { rejected: verdict.rejected, why: verdict.why }),
            Err(error) => {
                let retry = if verdict.is_final { Retry::Never } else { Retry::Unreachable };
                let why = if verdict.why.is_empty() { error.to_string() } else { verdict.why };
                Err(Failed { why, retry })
            }
        }
    }
}

/// The result of one export, from the exporter's events.
#[derive(Clone, Debug, Default)]
struct Verdict {
    /// Number of spans that the collector rejected in a request that it accepted.
    rejected: u64,
    /// The collector's message, or the error of the connection.
    why: String,
    /// Whether the collector refused the request, so that a retry is useless.
    is_final: bool,
}

/// Collects the events of one export.
#[derive(Clone)]
struct Events {
    verdict: Arc<Mutex<Verdict>>,
    stats: Arc<ExportStats>,
}

impl Events {
    fn new(stats: Arc<ExportStats>) -> Self {
        Self { verdict: Arc::default(), stats }
    }

    fn verdict(&self) -> Verdict {
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Subscriber for Events {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && metadata.target() == "opentelemetry-otlp"
    }

    fn event(&self, event: &Event<'_>) {
        let mut verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        match event.metadata().name() {
            "Export.InProgress.Retrying" | "Export.InProgress.Throttled" => self.stats.failed(),
            "Export.Failed.NonRetryable" => verdict.is_final = true,
            _ => event.record(&mut *verdict),
        }
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

impl Visit for Verdict {
    fn record_i64(&mut self, field: &Field, value: i64) {
        if field.name() == "rejected_spans" {
            self.rejected = value.try_into().unwrap_or(0);
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if matches!(field.name(), "error" | "error_message" | "grpc_message") && !value.is_empty() {
            value.clone_into(&mut self.why);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}
