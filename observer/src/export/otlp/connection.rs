//! Connections to a collector, over gRPC or plain HTTP: trusted certificates, name resolution and timeouts. This file does not
//! depend on the content of requests.

#[cfg(target_env = "gnu")]
use std::ffi::{c_char, c_int};
use std::{error::Error, fs, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header::USER_AGENT};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use opentelemetry_http::{HttpClient, HttpError};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint as Target};

use super::{
    client::{Failed, Retry},
    settings::{Endpoint, Protocol},
};
use crate::failure::Failure;

/// Maximum size of an answer in bytes.
pub(super) const ANSWER: usize = 64 << 10;

/// How long an idle connection is kept; collectors close connections that are idle for longer.
const IDLE: Duration = Duration::from_secs(90);

const AGENT: &str = concat!("observer/", env!("CARGO_PKG_VERSION"));

/// A lazy connection to one collector: it connects with the first request, and again after a failure.
pub(super) enum Connection {
    Grpc(Channel),
    Http(Arc<Http>),
}

impl Connection {
    /// Reads certificates; does not connect. Must be called inside a Tokio runtime.
    pub(super) fn new(endpoint: &Endpoint) -> Result<Self, Failure> {
        resolve_names_statically();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        let tls = HttpsConnectorBuilder::new().with_tls_config(tls(endpoint)?).https_or_http();
        Ok(match endpoint.protocol {
            Protocol::Grpc => {
                let target = Target::from(endpoint.uri.clone())
                    .connect_timeout(endpoint.timeout)
                    .timeout(endpoint.timeout)
                    .user_agent(AGENT)
                    .map_err(|error| Failure::new(root(&error), "report this: it is a defect of observer"))?;
                Self::Grpc(target.connect_with_connector_lazy(tls.enable_http2().wrap_connector(tcp)))
            }
            Protocol::HttpProtobuf => {
                let client = Client::builder(TokioExecutor::new())
                    .pool_idle_timeout(IDLE)
                    .pool_timer(TokioTimer::new())
                    .timer(TokioTimer::new())
                    .build(tls.enable_http1().wrap_connector(tcp));
                Self::Http(Arc::new(Http { client, timeout: endpoint.timeout }))
            }
        })
    }
}

/// An HTTP client.
#[derive(Debug)]
pub(super) struct Http {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    timeout: Duration,
}

impl Http {
    /// Sends a request. If the body of the answer is larger than [`ANSWER`], the body is discarded.
    pub(super) async fn send(&self, mut request: Request<Bytes>) -> Result<Response<Bytes>, Failed> {
        request.headers_mut().entry(USER_AGENT).or_insert(HeaderValue::from_static(AGENT));
        let exchange = async {
            let (head, body) = self.client.request(request.map(Full::new)).await?.into_parts();
            let body = Limited::new(body, ANSWER).collect().await.map(|body| body.to_bytes());
            Ok(Response::from_parts(head, body.unwrap_or_default()))
        };
        let answer = timeout(self.timeout, exchange).await.map_err(|_| no_answer(self.timeout))?;
        answer.map_err(|error: hyper_util::client::legacy::Error| Failed {
            why: root(&error),
            retry: if error.is_connect() { Retry::Unreachable } else { Retry::Later },
        })
    }
}

#[async_trait::async_trait]
impl HttpClient for Http {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        self.send(request).await.map_err(|failed| failed.why.into())
    }
}

pub(super) fn no_answer(limit: Duration) -> Failed {
    Failed { why: format!("no answer within {}", humantime::format_duration(limit)), retry: Retry::Later }
}

/// The innermost cause of an error, which is the specific one: the outer ones only say that a request failed.
pub(super) fn root(error: &dyn Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Makes the C library resolve names from `/etc/hosts` and DNS only. It would otherwise load the modules that
/// `/etc/nsswitch.conf` names, which are built for the machine's C library and not for the one in a static executable.
fn resolve_names_statically() {
    #[cfg(target_env = "gnu")]
    {
        unsafe extern "C" {
            /// As in `nss.h`: sets the services of a database for this process.
            fn __nss_configure_lookup(database: *const c_char, services: *const c_char) -> c_int;
        }
        // SAFETY: both strings end with NUL, and no name has been resolved yet.
        let status = unsafe { __nss_configure_lookup(c"hosts".as_ptr(), c"files dns".as_ptr()) };
        if status != 0 {
            log::debug!("names are resolved as /etc/nsswitch.conf says");
        }
    }
}

/// The TLS configuration: trusted authorities and the client certificate.
fn tls(endpoint: &Endpoint) -> Result<ClientConfig, Failure> {
    let mut roots = RootCertStore::empty();
    if let Some(file) = &endpoint.certificate {
        roots.add_parsable_certificates(certificates(file)?);
        if roots.is_empty() {
            return Err(Failure::new(
                format!("{} contains no usable certificate", file.display()),
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
