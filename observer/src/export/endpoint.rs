//! Serves metrics, liveness and readiness over HTTP. Clients may be slow, broken, many or hostile, so the number of
//! connections, their duration and memory, and the rate of snapshots are limited.

use std::{
    collections::VecDeque,
    pin::pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{
        HeaderMap, StatusCode,
        header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, VARY},
    },
    response::{Html, IntoResponse, Response},
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    task::{JoinHandle, spawn_blocking},
    time::{sleep, timeout},
};

use super::{gzip, prometheus, series::SeriesLimiter};
use crate::{
    heap,
    model::snapshot::{Service, Snapshot},
};

/// Maximum number of connections. A further one closes the oldest, which has had the most time.
pub(crate) const MAX_CONNECTIONS: usize = 128;

/// Time limit for a client to send the head of a request, and for an idle connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Time limit of a connection, and the additional time for a response that has begun.
pub(crate) const MAX_LIFETIME: Duration = Duration::from_secs(10);
pub(crate) const RESPONSE_GRACE: Duration = Duration::from_secs(5);

/// Maximum number of bytes and of header lines in the head of a request.
const HEAD_BYTES: usize = 8192;
const HEAD_LINES: usize = 64;

/// How long a page is reused: at least this long, and at least this many times as long as it took to make it. So scrapes
/// take at most a tenth of a CPU.
const MIN_REUSE: Duration = Duration::from_millis(100);
const REUSE_PER_COST: u32 = 10;

/// Size of a page, in bytes, from which on freed memory is returned to the kernel.
const LARGE_PAGE: usize = 256 << 10;

/// How long to wait after `accept` has failed.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves requests until it is dropped; `read` takes a snapshot.
pub(crate) async fn serve(
    listener: TcpListener,
    read: impl Fn() -> Result<Snapshot> + Send + Sync + 'static,
    limiter: Arc<Mutex<SeriesLimiter>>,
) {
    let routes = routes(move || {
        let snapshot = read()?;
        let mut limiter = limiter.lock().unwrap_or_else(PoisonError::into_inner);
        let Service { is_off, is_attaching, .. } = snapshot.own.service;
        let text = prometheus::encode(&snapshot, &mut limiter)?;
        drop(snapshot);
        if text.len() > LARGE_PAGE {
            heap::trim();
        }
        Ok(Page { is_off, is_attaching, ..Page::of(text) })
    });
    let mut open = VecDeque::<JoinHandle<()>>::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                open.retain(|connection| !connection.is_finished());
                if open.len() >= MAX_CONNECTIONS
                    && let Some(oldest) = open.pop_front()
                {
                    oldest.abort();
                }
                open.push_back(tokio::spawn(answer(stream, routes.clone())));
            }
            Err(error) => {
                log::debug!("cannot accept a connection: {error}");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

/// The router of all paths; `read` makes a new page.
pub(crate) fn routes(read: impl Fn() -> Result<Page> + Send + Sync + 'static) -> Router {
    let cache = PageCache { read: Box::new(read), last: Mutex::default() };
    Router::new()
        .route("/", get(landing))
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(Arc::new(cache))
}

/// Serves the requests on one connection.
pub(crate) async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, routes: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(HEAD_LINES)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut connection = pin!(connection);
    if timeout(MAX_LIFETIME, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _closed_either_way = timeout(RESPONSE_GRACE, connection).await;
    }
}

async fn landing() -> Html<&'static str> {
    Html(concat!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><title>observer</title></head><body>\n<h1>observer ",
        env!("CARGO_PKG_VERSION"),
        "</h1>\n<p>How late event-loop servers are, and which code makes them late.</p>\n<ul>\n",
        "<li><a href=\"/metrics\">/metrics</a>: metrics for Prometheus</li>\n",
        "<li><a href=\"/healthz\">/healthz</a>: liveness: observer is running</li>\n",
        "<li><a href=\"/readyz\">/readyz</a>: readiness: observer has attached, or the --kill-switch file turns it off</li>\n</ul>\n</body></html>\n"
    ))
}

/// A page, made on another thread: it may have to wait for a refresh.
async fn page(cache: Arc<PageCache>) -> Result<Page, String> {
    spawn_blocking(move || cache.page()).await.map_err(|error| error.to_string())?
}

async fn ready(State(cache): State<Arc<PageCache>>) -> Response {
    match page(cache).await {
        // Turned off on purpose, which is no failure: a rollout must neither wait for this instance nor stop because of it.
        Ok(page) if page.is_off => "turned off: the --kill-switch file exists\n".into_response(),
        Ok(page) if page.is_attaching => {
            (StatusCode::SERVICE_UNAVAILABLE, "attaching to the runtimes of processes\n").into_response()
        }
        Ok(_) => "ready\n".into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error).into_response(),
    }
}

async fn metrics(State(cache): State<Arc<PageCache>>, headers: HeaderMap) -> Response {
    match page(cache).await {
        Ok(page) => {
            let common = [(CONTENT_TYPE, ::prometheus::TEXT_FORMAT), (VARY, "accept-encoding")];
            if accepts_gzip(&headers) {
                (common, [(CONTENT_ENCODING, "gzip")], page.compressed()).into_response()
            } else {
                (common, page.plain).into_response()
            }
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
    }
}

/// Whether a client accepts a response compressed with gzip.
fn accepts_gzip(headers: &HeaderMap) -> bool {
    let values = headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|coding| {
        let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
        let weight = weight.trim().strip_prefix("q=").map_or(Ok(1.0), str::parse::<f32>);
        name.trim().eq_ignore_ascii_case("gzip") && weight.is_ok_and(|weight| weight > 0.0)
    })
}

/// Makes pages of metrics, and reuses the last one while it is recent.
struct PageCache {
    read: Box<dyn Fn() -> Result<Page> + Send + Sync>,
    /// The last page or error, and until when it is reused.
    last: Mutex<Option<(Instant, Result<Page, String>)>>,
}

/// All metrics in the Prometheus text format, shared by any number of responses.
#[derive(Clone)]
pub(crate) struct Page {
    plain: Bytes,
    /// The compressed text, made for the first client that accepts it.
    gzip: Arc<OnceLock<Bytes>>,
    /// Whether observer is turned off.
    is_off: bool,
    /// Whether observer has just started, and is still attaching to runtimes.
    is_attaching: bool,
}

impl Page {
    /// The page of an observer that is not turned off.
    pub(crate) fn of(plain: Vec<u8>) -> Self {
        Self { plain: plain.into(), gzip: Arc::default(), is_off: false, is_attaching: false }
    }

    fn compressed(&self) -> Bytes {
        self.gzip.get_or_init(|| gzip::compressed(&self.plain)).clone()
    }
}

impl PageCache {
    /// A page that is recent enough; the error is the text of the response.
    fn page(&self) -> Result<Page, String> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = Instant::now();
        if let Some((until, page)) = &*last
            && begin < *until
        {
            return page.clone();
        }
        let page = (self.read)().map_err(|error| format!("cannot read the metrics: {error:#}\n"));
        let reuse = MIN_REUSE.max(begin.elapsed() * REUSE_PER_COST);
        *last = Some((begin + reuse, page.clone()));
        page
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn gzip_is_used_if_the_client_accepts_it() {
        let accepts = |value: &'static str| {
            accepts_gzip(&HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static(value))]))
        };
        assert!(accepts("gzip") && accepts("deflate, GZIP;q=0.5") && accepts("br;q=1.0, gzip;q=1.0"));
        assert!(!accepts("") && !accepts("identity") && !accepts("gzip;q=0") && !accepts("xgzip"));
        assert!(!accepts_gzip(&HeaderMap::new()));
    }
}
