//! Brings one encoded request to a collector, over gRPC or plain HTTP, and tells whether to try again. It knows neither
//! what is in the request nor how often it was tried.

#[cfg(target_env = "gnu")]
use std::ffi::{c_char, c_int};
use std::{
    error::Error,
    fs,
    marker::PhantomData,
    path::Path,
    time::{Duration, SystemTime},
};

use bytes::{Buf as _, BufMut as _, Bytes};
use http::{
    HeaderMap, HeaderValue, Method, Request, StatusCode,
    header::{CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER, USER_AGENT},
    uri::PathAndQuery,
};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use prost::Message;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::time::timeout;
use tonic::{
    Code, Status,
    body::Body,
    client::Grpc,
    codec::{Codec, CompressionEncoding, DecodeBuf, Decoder, EncodeBuf, Encoder},
    metadata::MetadataMap,
};

use super::{
    settings::{Endpoint, Protocol},
    signal::Signal,
};
use crate::{export::gzip, failure::Failure};

/// Most bytes that are read of an answer.
const ANSWER: usize = 64 << 10;

/// How long a connection may be idle; collectors end those that are idle for longer.
const IDLE: Duration = Duration::from_secs(90);

const AGENT: &str = concat!("observer/", env!("CARGO_PKG_VERSION"));

/// The way to one collector.
#[derive(Clone)]
pub(super) struct Transport {
    client: Client<HttpsConnector<HttpConnector>, Body>,
    endpoint: Endpoint,
}

/// What a collector did not take of a request that it took.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rejected {
    pub(super) items: u64,
    pub(super) why: String,
}

/// Why a request was not taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Problem {
    /// It may be taken later, not before the time that the collector asked for.
    Later { why: String, after: Option<Duration> },
    /// Nobody is there.
    Unreachable { why: String },
    /// It will never be.
    Never { why: String },
}

impl Transport {
    pub(super) fn new(endpoint: Endpoint) -> Result<Self, Failure> {
        let_names_be_found();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        let tls = HttpsConnectorBuilder::new().with_tls_config(tls(&endpoint)?).https_or_http();
        let is_grpc = endpoint.protocol == Protocol::Grpc;
        let connector = if is_grpc {
            tls.enable_http2().wrap_connector(tcp)
        } else {
            tls.enable_http1().wrap_connector(tcp)
        };
        let client = Client::builder(TokioExecutor::new())
            .http2_only(is_grpc)
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            .build(connector);
        Ok(Self { client, endpoint })
    }

    /// Where it leads.
    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Delivers an encoded request, or says why not.
    pub(super) async fn send<S: Signal>(&self, request: Bytes) -> Result<Rejected, Problem> {
        let attempt = async {
            match self.endpoint.protocol {
                Protocol::Grpc => self.call::<S>(request).await,
                Protocol::HttpProtobuf => self.post::<S>(request).await,
            }
        };
        let answer = timeout(self.endpoint.timeout, attempt).await.unwrap_or_else(|_| {
            let limit = humantime::format_duration(self.endpoint.timeout);
            Err(Problem::Later { why: format!("no answer within {limit}"), after: None })
        })?;
        let (items, why) = S::rejected(answer);
        Ok(Rejected { items: items.try_into().unwrap_or(0), why })
    }

    async fn call<S: Signal>(&self, request: Bytes) -> Result<S::Response, Problem> {
        let mut grpc = Grpc::with_origin(self.client.clone(), self.endpoint.uri.clone())
            .max_decoding_message_size(ANSWER)
            .accept_compressed(CompressionEncoding::Gzip);
        if self.endpoint.gzip {
            grpc = grpc.send_compressed(CompressionEncoding::Gzip);
        }
        grpc.ready().await.map_err(|error| Problem::Unreachable { why: root(&error) })?;
        let mut headers = self.endpoint.headers.clone();
        headers.entry(USER_AGENT).or_insert(HeaderValue::from_static(AGENT));
        let mut request = tonic::Request::new(request);
        *request.metadata_mut() = MetadataMap::from_headers(headers);
        request.set_timeout(self.endpoint.timeout);
        let codec = Encoded::<S::Response>(PhantomData);
        let answer = grpc.unary(request, PathAndQuery::from_static(S::GRPC), codec).await;
        answer.map(tonic::Response::into_inner).map_err(|status| of_status(&status))
    }

    async fn post<S: Signal>(&self, request: Bytes) -> Result<S::Response, Problem> {
        let body = if self.endpoint.gzip { gzip::compressed(&request) } else { request };
        let mut request = Request::new(Body::new(Full::new(body)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.endpoint.uri.clone();
        *request.headers_mut() = self.endpoint.headers.clone();
        let headers = request.headers_mut();
        headers.entry(USER_AGENT).or_insert(HeaderValue::from_static(AGENT));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
        if self.endpoint.gzip {
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        let answer = self.client.request(request).await.map_err(|error| {
            let why = root(&error);
            if error.is_connect() {
                Problem::Unreachable { why }
            } else {
                Problem::Later { why, after: None }
            }
        })?;
        let (head, body) = answer.into_parts();
        // Whatever the answer says besides: its code is what counts.
        let body = Limited::new(body, ANSWER).collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        if head.status.is_success() {
            return Ok(S::Response::decode(body).unwrap_or_default());
        }
        Err(of_code(head.status, &head.headers, &body))
    }
}

/// Has the C library look names up by itself, in `/etc/hosts` and by DNS. It would load what else `/etc/nsswitch.conf`
/// names, which was made for the C library of the machine and not for the one in a static executable.
fn let_names_be_found() {
    #[cfg(target_env = "gnu")]
    {
        unsafe extern "C" {
            /// As in `nss.h`: whoever passes a database and its services has these used in this process.
            fn __nss_configure_lookup(database: *const c_char, services: *const c_char) -> c_int;
        }
        // SAFETY: both are strings that end; nobody looks a name up yet.
        let status = unsafe { __nss_configure_lookup(c"hosts".as_ptr(), c"files dns".as_ptr()) };
        if status != 0 {
            log::debug!("names are looked up as /etc/nsswitch.conf says");
        }
    }
}

/// Which certificates are trusted, and which is shown.
fn tls(endpoint: &Endpoint) -> Result<ClientConfig, Failure> {
    let mut roots = RootCertStore::empty();
    if let Some(file) = &endpoint.certificate {
        roots.add_parsable_certificates(certificates(file)?);
        if roots.is_empty() {
            return Err(Failure::new(
                format!("{} has no certificate that could be trusted", file.display()),
                "give a file in PEM format",
            ));
        }
    } else if endpoint.uri.scheme_str() == Some("https") {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() {
            return Err(Failure::new(
                "this system trusts no certificate authority",
                "install ca-certificates, or name a file in OTEL_EXPORTER_OTLP_CERTIFICATE",
            ));
        }
    }
    let config = ClientConfig::builder().with_root_certificates(roots);
    let Some((certificate, key)) = &endpoint.client else { return Ok(config.with_no_client_auth()) };
    let unusable = |error: &dyn std::fmt::Display| {
        Failure::new(
            format!("cannot use the key in {}: {error}", key.display()),
            "give the key of the certificate in PEM format",
        )
    };
    let secret = fs::read(key).map_err(|error| unusable(&error))?;
    let secret = PrivateKeyDer::from_pem_slice(&secret).map_err(|error| unusable(&error))?;
    config.with_client_auth_cert(certificates(certificate)?, secret).map_err(|error| unusable(&error))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let unreadable = |error: &dyn std::fmt::Display| {
        Failure::new(
            format!("cannot read certificates from {}: {error}", file.display()),
            "give a file in PEM format",
        )
    };
    let text = fs::read(file).map_err(|error| unreadable(&error))?;
    CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>().map_err(|error| unreadable(&error))
}

/// What is at the bottom of an error: what surrounds it says little.
fn root(mut error: &(dyn Error + 'static)) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// As the OTLP specification tells what may be tried again.
fn of_status(status: &Status) -> Problem {
    if let Some(source) = status.source() {
        let is_connect =
            source.downcast_ref::<hyper_util::client::legacy::Error>().is_some_and(|e| e.is_connect());
        let why = root(source);
        return if is_connect { Problem::Unreachable { why } } else { Problem::Later { why, after: None } };
    }
    let why = format!("{:?}: {}", status.code(), status.message());
    let after = retry_delay(status.details());
    match status.code() {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss => Problem::Later { why, after },
        Code::ResourceExhausted if after.is_some() => Problem::Later { why, after },
        _ => Problem::Never { why },
    }
}

fn of_code(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Problem {
    let message = RpcStatus::decode(body).map(|status| status.message).unwrap_or_default();
    let why = if message.is_empty() { status.to_string() } else { format!("{status}: {message}") };
    match status.as_u16() {
        429 | 502 | 503 | 504 => {
            let after = headers.get(RETRY_AFTER).and_then(|value| retry_after(value.to_str().ok()?));
            Problem::Later { why, after }
        }
        _ => Problem::Never { why },
    }
}

/// Makes sure that whatever a collector answers is understood somehow: as a message, a status or how long to wait.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn understand_answer(code: u16, text: &[u8]) {
    use super::signal::{MetricsRequest, TraceRequest};

    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    let value = HeaderValue::from_bytes(text).into_iter().map(|value| (RETRY_AFTER, value));
    let _ = of_code(status, &value.collect(), text);
    let status = Status::with_details(Code::Unavailable, "", Bytes::copy_from_slice(text));
    let _ = of_status(&status);
    let _ = <MetricsRequest as Signal>::Response::decode(text).map(MetricsRequest::rejected);
    let _ = <TraceRequest as Signal>::Response::decode(text).map(TraceRequest::rejected);
}

/// Seconds, or a date.
fn retry_after(value: &str) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    Some(httpdate::parse_http_date(value).ok()?.duration_since(SystemTime::now()).unwrap_or_default())
}

/// How long a status asks to wait.
fn retry_delay(details: &[u8]) -> Option<Duration> {
    let status = RpcStatus::decode(details).ok()?;
    let info = status.details.iter().find(|any| any.type_url.ends_with("/google.rpc.RetryInfo"))?;
    let delay = RetryInfo::decode(info.value.as_slice()).ok()?.retry_delay?;
    Some(Duration::new(delay.seconds.try_into().ok()?, delay.nanos.try_into().ok()?))
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `google.rpc.RetryInfo`.
#[derive(Clone, Copy, PartialEq, Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<Delay>,
}

/// `google.protobuf.Duration`.
#[derive(Clone, Copy, PartialEq, Message)]
struct Delay {
    #[prost(int64, tag = "1")]
    seconds: i64,
    #[prost(int32, tag = "2")]
    nanos: i32,
}

/// Sends what is encoded already, and decodes the answer.
struct Encoded<R>(PhantomData<R>);

impl<R: Message + Default + 'static> Codec for Encoded<R> {
    type Encode = Bytes;
    type Decode = R;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self(PhantomData)
    }

    fn decoder(&mut self) -> Self {
        Self(PhantomData)
    }
}

impl<R> Encoder for Encoded<R> {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, request: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(request);
        Ok(())
    }
}

impl<R: Message + Default> Decoder for Encoded<R> {
    type Item = R;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<R>, Status> {
        let answer = from.copy_to_bytes(from.remaining());
        R::decode(answer).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::{
        collector::trace::v1::{
            ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
        },
        trace::v1::ResourceSpans,
    };
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;
    use crate::export::otlp::testing::endpoint;

    fn details(seconds: i64) -> Bytes {
        let info = RetryInfo { retry_delay: Some(Delay { seconds, nanos: 5 }) };
        let any =
            Any { type_url: "type.googleapis.com/google.rpc.RetryInfo".into(), value: info.encode_to_vec() };
        RpcStatus { message: "busy".into(), details: vec![any] }.encode_to_vec().into()
    }

    #[test]
    fn statuses_tell_whether_to_try_again() {
        let later = |code| matches!(of_status(&Status::new(code, "x")), Problem::Later { after: None, .. });
        let again = [
            Code::Cancelled,
            Code::DeadlineExceeded,
            Code::Aborted,
            Code::OutOfRange,
            Code::Unavailable,
            Code::DataLoss,
        ];
        assert!(again.into_iter().all(later));
        let never = [Code::Unknown, Code::InvalidArgument, Code::Unauthenticated, Code::ResourceExhausted];
        assert!(!never.into_iter().any(later));
        let status = Status::with_details(Code::ResourceExhausted, "x", details(3));
        let Problem::Later { after, .. } = of_status(&status) else { panic!("{status}") };
        assert_eq!(after, Some(Duration::new(3, 5)));
    }

    #[test]
    fn codes_tell_whether_to_try_again() {
        let problem = |code, headers: &HeaderMap| of_code(StatusCode::from_u16(code).unwrap(), headers, b"");
        let none = HeaderMap::new();
        for code in [429, 502, 503, 504] {
            assert!(matches!(problem(code, &none), Problem::Later { after: None, .. }), "{code}");
        }
        for code in [301, 400, 401, 404, 413, 500, 501] {
            assert!(matches!(problem(code, &none), Problem::Never { .. }), "{code}");
        }
        let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static("7"))]);
        let Problem::Later { after, .. } = problem(503, &headers) else { panic!("503") };
        assert_eq!(after, Some(Duration::from_secs(7)));
    }

    #[test]
    fn dates_are_times_to_wait_too() {
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(60));
        assert!((58..=60).contains(&retry_after(&soon).unwrap().as_secs()));
        assert_eq!(retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        assert_eq!(retry_after("soon"), None);
    }

    /// Traces go the same way, under names of their own.
    #[test]
    fn another_signal_has_its_own_answer() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let request = ExportTraceServiceRequest { resource_spans: vec![ResourceSpans::default()] };
            let sent = Bytes::from(request.encode_to_vec());
            let length = sent.len();
            let receiver = tokio::spawn(async move {
                let (mut connection, _) = listener.accept().await.unwrap();
                let mut seen = Vec::new();
                while !seen.windows(4).any(|end| end == b"\r\n\r\n") || seen.len() < length {
                    connection.read_buf(&mut seen).await.unwrap();
                }
                let partial = ExportTracePartialSuccess { rejected_spans: 3, error_message: "late".into() };
                let answer = ExportTraceServiceResponse { partial_success: Some(partial) }.encode_to_vec();
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", answer.len());
                connection.write_all(&[head.as_bytes(), &answer].concat()).await.unwrap();
                String::from_utf8_lossy(&seen).into_owned()
            });
            let uri = format!("http://127.0.0.1:{port}/{}", ExportTraceServiceRequest::HTTP).parse().unwrap();
            let transport = Transport::new(Endpoint { uri, ..endpoint() }).unwrap();
            let rejected = transport.send::<ExportTraceServiceRequest>(sent).await;
            assert_eq!(rejected, Ok(Rejected { items: 3, why: "late".into() }));
            let seen = receiver.await.unwrap();
            assert!(seen.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{seen}");
            assert!(seen.contains("content-type: application/x-protobuf\r\n"), "{seen}");
        });
    }
}
