//! The HTTP endpoint. Whoever can reach it may be slow, broken, many or hostile: connections, their time and memory,
//! and how often figures are read for them, all have limits.

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
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{gzip, prometheus, series::SeriesLimiter};
use crate::{heap, model::snapshot::Snapshot};

/// Most connections at once; one more ends the oldest, which has had the most time.
pub(crate) const CONNECTIONS: usize = 128;

/// How long a client may take to send the head of a request, and a connection may be idle.
const HEAD: Duration = Duration::from_secs(5);

/// How long a connection may last, and how much longer an answer may take that has begun.
pub(crate) const LIFE: Duration = Duration::from_secs(10);
pub(crate) const GRACE: Duration = Duration::from_secs(5);

/// Most bytes and most lines in the head of a request.
const HEAD_BYTES: usize = 8192;
const HEAD_LINES: usize = 64;

/// How old figures may be, and how many times as long as it took to read them: scrapes take at most a tenth of a CPU.
const AGE: Duration = Duration::from_millis(100);
const AGE_OF_COSTS: u32 = 10;

/// What took much memory to make, in bytes.
const LONG: usize = 256 << 10;

/// How long to wait when no more connections can be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers until it is dropped; `read` takes a snapshot.
pub(crate) async fn serve(
    listener: TcpListener,
    read: impl Fn() -> Result<Snapshot> + Send + Sync + 'static,
    cap: Arc<Mutex<SeriesLimiter>>,
) {
    let routes = routes(move || {
        let snapshot = read()?;
        let mut cap = cap.lock().unwrap_or_else(PoisonError::into_inner);
        let is_off = snapshot.own.service.is_off;
        let text = prometheus::encode(&snapshot, &mut cap)?;
        drop(snapshot);
        if text.len() > LONG {
            heap::trim();
        }
        Ok(Page { is_off, ..Page::of(text) })
    });
    let mut open = VecDeque::<JoinHandle<()>>::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                open.retain(|connection| !connection.is_finished());
                if open.len() >= CONNECTIONS
                    && let Some(oldest) = open.pop_front()
                {
                    oldest.abort();
                }
                open.push_back(tokio::spawn(answer(stream, routes.clone())));
            }
            Err(error) => {
                log::debug!("cannot accept a connection: {error}");
                sleep(PAUSE).await;
            }
        }
    }
}

/// What there is to ask for; `read` makes figures anew.
pub(crate) fn routes(read: impl Fn() -> Result<Page> + Send + Sync + 'static) -> Router {
    let scrapes = Scrapes { read: Box::new(read), last: Mutex::default() };
    Router::new()
        .route("/", get(landing))
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(Arc::new(scrapes))
}

/// Answers the requests on one connection.
pub(crate) async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, routes: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_headers(HEAD_LINES)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut connection = pin!(connection);
    if timeout(LIFE, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ended_anyway = timeout(GRACE, connection).await;
    }
}

async fn landing() -> Html<&'static str> {
    Html(concat!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><title>observer</title></head><body>\n<h1>observer ",
        env!("CARGO_PKG_VERSION"),
        "</h1>\n<p>How late event-loop servers are, and why.</p>\n<ul>\n",
        "<li><a href=\"/metrics\">/metrics</a>: figures for Prometheus</li>\n",
        "<li><a href=\"/healthz\">/healthz</a>: observer is alive</li>\n",
        "<li><a href=\"/readyz\">/readyz</a>: figures can be read, or observer is turned off</li>\n</ul>\n</body></html>\n"
    ))
}

async fn ready(State(scrapes): State<Arc<Scrapes>>) -> Response {
    match scrapes.page() {
        // As it was told to be: nobody should wait for it, nor hold back others that are to replace it.
        Ok(page) if page.is_off => "turned off, by the file of --kill-switch\n".into_response(),
        Ok(_) => "ready\n".into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, error).into_response(),
    }
}

async fn metrics(State(scrapes): State<Arc<Scrapes>>, headers: HeaderMap) -> Response {
    match scrapes.page() {
        Ok(page) => {
            let common = [(CONTENT_TYPE, ::prometheus::TEXT_FORMAT), (VARY, "accept-encoding")];
            if takes_gzip(&headers) {
                (common, [(CONTENT_ENCODING, "gzip")], page.compressed()).into_response()
            } else {
                (common, page.plain).into_response()
            }
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
    }
}

/// Whether a client wants its answer compressed.
fn takes_gzip(headers: &HeaderMap) -> bool {
    let values = headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|coding| {
        let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
        let weight = weight.trim().strip_prefix("q=").map_or(Ok(1.0), str::parse::<f32>);
        name.trim().eq_ignore_ascii_case("gzip") && weight.is_ok_and(|weight| weight > 0.0)
    })
}

/// Makes what scrapes answer.
struct Scrapes {
    read: Box<dyn Fn() -> Result<Page> + Send + Sync>,
    /// What the last scrape answered, and until when others get the same.
    last: Mutex<Option<(Instant, Result<Page, String>)>>,
}

/// All figures, ready to be sent to any number of clients.
#[derive(Clone)]
pub(crate) struct Page {
    plain: Bytes,
    /// The same compressed, once somebody has asked for that.
    gzip: Arc<OnceLock<Bytes>>,
    /// Whether they are those of an observer that is turned off.
    is_off: bool,
}

impl Page {
    /// Of an observer that is on.
    pub(crate) fn of(plain: Vec<u8>) -> Self {
        Self { plain: plain.into(), gzip: Arc::default(), is_off: false }
    }

    fn compressed(&self) -> Bytes {
        self.gzip.get_or_init(|| gzip::compressed(&self.plain)).clone()
    }
}

impl Scrapes {
    /// Figures that are not too old.
    fn page(&self) -> Result<Page, String> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = Instant::now();
        if let Some((until, page)) = &*last
            && begin < *until
        {
            return page.clone();
        }
        let page = (self.read)().map_err(|error| format!("{error:#}\n"));
        let fresh = AGE.max(begin.elapsed() * AGE_OF_COSTS);
        *last = Some((begin + fresh, page.clone()));
        page
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn gzip_is_for_those_who_ask() {
        let takes = |value: &'static str| {
            takes_gzip(&HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static(value))]))
        };
        assert!(takes("gzip") && takes("deflate, GZIP;q=0.5") && takes("br;q=1.0, gzip;q=1.0"));
        assert!(!takes("") && !takes("identity") && !takes("gzip;q=0") && !takes("xgzip"));
        assert!(!takes_gzip(&HeaderMap::new()));
    }
}
