//! Targets for bytes from the network: the beginnings of requests to observed servers, requests to observer's own
//! endpoint, and responses of collectors.

use std::{sync::LazyLock, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    runtime::{Builder, Runtime},
    time::timeout,
};

use super::input::{choice, number};
use crate::{export::endpoint, export::otlp, model::request::Head};

/// The beginning of a request: the number of bytes that followed in the same read, then the captured bytes.
pub(super) fn request(data: &[u8]) {
    let (more, bytes) = choice(data);
    let head = Head::of(bytes, bytes.len() + usize::from(more));
    if let Some(path) = &head.path {
        assert!(path.len() <= 256 && !path.contains(['?', '#']), "{path:?}");
    }
    if let Some(method) = &head.method {
        assert!(method.bytes().all(|byte| byte.is_ascii_graphic()), "{method:?}");
        // A request of the parsed method and path alone has the same path.
        let path = head.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("*");
        let again = format!("{method} {path} HTTP/1.1\r\n\r\n");
        assert_eq!(Head::of(again.as_bytes(), again.len()).path.as_deref(), Some(path));
    }
    if let Some(trace) = &head.traceparent {
        assert!(trace.len() == 55 && trace.is_ascii(), "{trace:?}");
        assert!(otlp::is_valid(trace), "{trace:?}");
    }
}

/// The bytes of one connection to the endpoint: the size of the parts in which they are sent, then the bytes.
pub(super) fn scrape(data: &[u8]) {
    /// Size of the connection's buffers, in bytes. A response must fit, since the client reads after it has sent all.
    const BUFFER_SIZE: usize = 1 << 20;
    /// Longer than the endpoint may keep the connection of a client that has hung up.
    const LIMIT: Duration = Duration::from_secs(4);
    static RUNTIME: LazyLock<Runtime> =
        LazyLock::new(|| Builder::new_current_thread().enable_all().build().expect("create a runtime"));

    let (part, bytes) = choice(data);
    RUNTIME.block_on(async {
        let (mut client, server) = duplex(BUFFER_SIZE);
        let serve =
            endpoint::answer(server, endpoint::routes(|| Ok(endpoint::Page::of(b"metrics\n".to_vec()))));
        let request = async {
            for part in bytes.chunks(usize::from(part) + 1) {
                if client.write_all(part).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            let _ = client.shutdown().await;
            let mut response = Vec::new();
            let _ = client.read_to_end(&mut response).await;
            response
        };
        let both = timeout(LIMIT, async { tokio::join!(serve, request) });
        let ((), response) = both.await.expect("the connection ends when the client hangs up");
        assert!(
            response.is_empty() || response.starts_with(b"HTTP/1."),
            "{:?}",
            String::from_utf8_lossy(&response)
        );
    });
}

/// The response of a collector: its status code, followed by bytes that are used as `Retry-After` header, body and
/// details.
pub(super) fn answer(data: &[u8]) {
    let (code, rest) = number(data);
    otlp::parse_answer(u16::try_from(code % 1000).unwrap_or_default(), rest);
}
