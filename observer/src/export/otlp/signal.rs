//! What differs between metrics and traces on the way to a collector: names, and how it says what it did not take.

use bytes::Bytes;
use opentelemetry_proto::tonic::collector::{
    metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse},
    trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
};

/// What metrics are sent as.
pub(super) type MetricsRequest = ExportMetricsServiceRequest;

/// What traces are sent as.
pub(super) type TraceRequest = ExportTraceServiceRequest;

/// An encoded request.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub(super) bytes: Bytes,
    /// Data points or spans in it.
    pub(super) items: u64,
}

/// A request to a collector, by what it answers and where it goes.
pub(super) trait Signal: prost::Message + Default + 'static {
    /// What a collector answers.
    type Response: prost::Message + Default + 'static;
    /// What people and variables call it.
    const NAME: &'static str;
    /// Its path below the address of a collector.
    const HTTP: &'static str;
    /// Its method.
    const GRPC: &'static str;
    /// How many data points or spans a collector did not take of a request that it took, and what it says to that.
    fn rejected(response: Self::Response) -> (i64, String);
}

impl Signal for MetricsRequest {
    type Response = ExportMetricsServiceResponse;
    const NAME: &'static str = "metrics";
    const HTTP: &'static str = "v1/metrics";
    const GRPC: &'static str = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export";
    fn rejected(response: Self::Response) -> (i64, String) {
        let partial = response.partial_success.unwrap_or_default();
        (partial.rejected_data_points, partial.error_message)
    }
}

impl Signal for TraceRequest {
    type Response = ExportTraceServiceResponse;
    const NAME: &'static str = "traces";
    const HTTP: &'static str = "v1/traces";
    const GRPC: &'static str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
    fn rejected(response: Self::Response) -> (i64, String) {
        let partial = response.partial_success.unwrap_or_default();
        (partial.rejected_spans, partial.error_message)
    }
}
