//! Sends metrics: with the generated client over gRPC, as a POST over plain HTTP.

use std::{
    error::Error,
    iter,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Request, StatusCode,
    header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER},
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse, metrics_service_client::MetricsServiceClient,
};
use prost::Message as _;
use tokio::time::timeout;
use tonic::{
    Code, ConnectError, Status, TimeoutExpired, codec::CompressionEncoding, metadata::MetadataMap,
    transport::Channel,
};
use tonic_types::{StatusExt as _, pb};

use super::{
    client::{Accepted, Client, Failed, Retry},
    connection::{ANSWER, Connection, Http, no_answer, root},
    settings::Endpoint,
    signal::Signal,
};
use crate::export::gzip;

/// Sends encoded requests. In the buffer, they take a fraction of the memory of decoded ones.
pub(super) struct MetricsClient {
    endpoint: Endpoint,
    connection: Connection,
}

impl MetricsClient {
    pub(super) fn new(endpoint: Endpoint, connection: Connection) -> Self {
        Self { endpoint, connection }
    }

    async fn call(&self, channel: Channel, request: &Bytes) -> Result<ExportMetricsServiceResponse, Failed> {
        let mut client = MetricsServiceClient::new(channel)
            .max_decoding_message_size(ANSWER)
            .accept_compressed(CompressionEncoding::Gzip);
        if self.endpoint.gzip {
            client = client.send_compressed(CompressionEncoding::Gzip);
        }
        let message = ExportMetricsServiceRequest::decode(request.clone())
            .map_err(|error| Failed { why: error.to_string(), retry: Retry::Never })?;
        let mut request = tonic::Request::new(message);
        *request.metadata_mut() = MetadataMap::from_headers(self.endpoint.headers.clone());
        request.set_timeout(self.endpoint.timeout);
        client.export(request).await.map(tonic::Response::into_inner).map_err(|status| {
            let is_timeout = status.source().is_some_and(is_caused_by::<TimeoutExpired>);
            if is_timeout { no_answer(self.endpoint.timeout) } else { of_status(&status) }
        })
    }

    async fn post(&self, http: &Http, request: &Bytes) -> Result<ExportMetricsServiceResponse, Failed> {
        let body = if self.endpoint.gzip { gzip::compressed(request) } else { request.clone() };
        let mut request = Request::new(body);
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.endpoint.uri.clone();
        *request.headers_mut() = self.endpoint.headers.clone();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        if self.endpoint.gzip {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        let (head, body) = http.send(request).await?.into_parts();
        if head.status.is_success() {
            // The request was accepted even if the body cannot be decoded.
            return Ok(ExportMetricsServiceResponse::decode(body).unwrap_or_default());
        }
        Err(of_code(head.status, &head.headers, &body))
    }
}

impl Client for MetricsClient {
    type Request = Bytes;
    const SIGNAL: Signal = Signal::Metrics;
    /// One, so that cumulative values arrive in order.
    const CONCURRENCY: usize = 1;

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    async fn send(&self, request: &Bytes, _is_last: bool) -> Result<Accepted, Failed> {
        let attempt = async {
            match &self.connection {
                Connection::Grpc(channel) => self.call(channel.clone(), request).await,
                Connection::Http(http) => self.post(http, request).await,
            }
        };
        let limit = self.endpoint.timeout;
        let response = timeout(limit, attempt).await.unwrap_or_else(|_| Err(no_answer(limit)))?;
        Ok(accepted(response))
    }
}

fn accepted(response: ExportMetricsServiceResponse) -> Accepted {
    let partial = response.partial_success.unwrap_or_default();
    Accepted { rejected: partial.rejected_data_points.try_into().unwrap_or(0), why: partial.error_message }
}

/// Classifies a gRPC status as the OTLP specification does.
fn of_status(status: &Status) -> Failed {
    if let Some(source) = status.source() {
        let is_connect = is_caused_by::<ConnectError>(source);
        let retry = if is_connect { Retry::Unreachable } else { Retry::Later };
        return Failed { why: root(source), retry };
    }
    let delay = status.get_details_retry_info().and_then(|info| info.retry_delay);
    let retry = match (status.code(), delay) {
        (
            Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unavailable
            | Code::DataLoss,
            None,
        ) => Retry::Later,
        (
            Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unavailable
            | Code::DataLoss
            | Code::ResourceExhausted,
            Some(delay),
        ) => Retry::After(delay),
        _ => Retry::Never,
    };
    Failed { why: format!("{:?}: {}", status.code(), status.message()), retry }
}

fn is_caused_by<E: Error + 'static>(error: &(dyn Error + 'static)) -> bool {
    iter::successors(Some(error), |&error| error.source()).any(|error| error.is::<E>())
}

/// Classifies an HTTP status code as the OTLP specification does.
fn of_code(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Failed {
    let message = pb::Status::decode(body).map(|status| status.message).unwrap_or_default();
    let why = if message.is_empty() { status.to_string() } else { format!("{status}: {message}") };
    let retry = match status.as_u16() {
        429 | 502 | 503 | 504 => headers
            .get(RETRY_AFTER)
            .and_then(|value| retry_after(value.to_str().ok()?))
            .map_or(Retry::Later, Retry::After),
        _ => Retry::Never,
    };
    Failed { why, retry }
}

/// The delay that a `Retry-After` header requests, in seconds or as a date.
fn retry_after(value: &str) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    Some(httpdate::parse_http_date(value).ok()?.duration_since(SystemTime::now()).unwrap_or_default())
}

/// Passes a collector's answer to every parser of answers, for the fuzz target.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn parse_answer(code: u16, text: &[u8]) {
    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    let value = HeaderValue::from_bytes(text).into_iter().map(|value| (RETRY_AFTER, value));
    let _ = of_code(status, &value.collect(), text);
    let status = Status::with_details(Code::Unavailable, "", Bytes::copy_from_slice(text));
    let _ = of_status(&status);
    let _ = ExportMetricsServiceResponse::decode(text).map(accepted);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::ErrorDetails;

    #[test]
    fn grpc_codes_decide_about_a_retry() {
        let retry = |code| of_status(&Status::new(code, "x")).retry;
        for code in [
            Code::Cancelled,
            Code::DeadlineExceeded,
            Code::Aborted,
            Code::OutOfRange,
            Code::Unavailable,
            Code::DataLoss,
        ] {
            assert_eq!(retry(code), Retry::Later, "{code:?}");
        }
        for code in [Code::Unknown, Code::InvalidArgument, Code::Unauthenticated, Code::ResourceExhausted] {
            assert_eq!(retry(code), Retry::Never, "{code:?}");
        }
        let delay = Duration::new(3, 5);
        let details = ErrorDetails::with_retry_info(Some(delay));
        let status = Status::with_error_details(Code::ResourceExhausted, "x", details);
        assert_eq!(of_status(&status).retry, Retry::After(delay));
    }

    #[test]
    fn http_codes_decide_about_a_retry() {
        let failed = |code, headers: &HeaderMap| of_code(StatusCode::from_u16(code).unwrap(), headers, b"");
        let none = HeaderMap::new();
        for code in [429, 502, 503, 504] {
            assert_eq!(failed(code, &none).retry, Retry::Later, "{code}");
        }
        for code in [301, 400, 401, 404, 413, 500, 501] {
            assert_eq!(failed(code, &none).retry, Retry::Never, "{code}");
        }
        let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static("7"))]);
        assert_eq!(failed(503, &headers).retry, Retry::After(Duration::from_secs(7)));
        let status = pb::Status { message: "too big".into(), ..pb::Status::default() };
        let failed = of_code(StatusCode::PAYLOAD_TOO_LARGE, &none, &status.encode_to_vec());
        assert!(failed.why.ends_with(": too big"), "{}", failed.why);
    }

    #[test]
    fn a_date_is_a_delay_too() {
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(60));
        assert!((58..=60).contains(&retry_after(&soon).unwrap().as_secs()));
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        assert_eq!(retry_after("soon"), None);
    }
}
