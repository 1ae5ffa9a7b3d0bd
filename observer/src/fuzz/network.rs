//! What peers send: requests to observed servers, as their first bytes were read; scrapes of observer's own endpoint;
//! answers of collectors.

use std::{sync::LazyLock, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, duplex},
    runtime::{Builder, Runtime},
    time::timeout,
};

use super::input::{choice, number};
use crate::{export::endpoint, export::otlp, model::request::Head};

/// The beginning of a request, behind how many bytes were read at once.
pub(super) fn request(data: &[u8]) {
    let (more, bytes) = choice(data);
    let head = Head::of(bytes, bytes.len() + usize::from(more));
    if let Some(path) = &head.path {
        assert!(path.len() <= 256 && !path.contains(['?', '#']), "{path:?}");
    }
    if let Some(method) = &head.method {
        assert!(method.bytes().all(|byte| byte.is_ascii_graphic()), "{method:?}");
        // What its first line tells does not depend on what follows, if it is one.
        let path = head.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("*");
        let again = format!("{method} {path} HTTP/1.1\r\n\r\n");
        assert_eq!(Head::of(again.as_bytes(), again.len()).path.as_deref(), Some(path));
    }
    if let Some(trace) = &head.traceparent {
        assert!(trace.len() == 55 && trace.is_ascii(), "{trace:?}");
        assert!(otlp::is_valid(trace), "{trace:?}");
    }
}

/// What a client sends to the endpoint on one connection, behind how it is cut into parts.
pub(super) fn scrape(data: &[u8]) {
    /// Most bytes of an answer: a client's is cut off when it has sent its part.
    const ROOM: usize = 1 << 20;
    /// Longer than the service may take over a client that has hung up.
    const LIMIT: Duration = Duration::from_secs(4);
    static RUNTIME: LazyLock<Runtime> =
        LazyLock::new(|| Builder::new_current_thread().enable_all().build().expect("a runtime"));

    let (part, bytes) = choice(data);
    RUNTIME.block_on(async {
        let (mut client, server) = duplex(ROOM);
        let served =
            endpoint::answer(server, endpoint::routes(|| Ok(endpoint::Page::of(b"figures\n".to_vec()))));
        let asked = async {
            for part in bytes.chunks(usize::from(part) + 1) {
                if client.write_all(part).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            let _ = client.shutdown().await;
            let mut answer = Vec::new();
            let _ = client.read_to_end(&mut answer).await;
            answer
        };
        let both = timeout(LIMIT, async { tokio::join!(served, asked) });
        let ((), answer) = both.await.expect("a connection ends when its client hangs up");
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1."),
            "{:?}",
            String::from_utf8_lossy(&answer)
        );
    });
}

/// What a collector answers: a code, how long to wait, and a message.
pub(super) fn answer(data: &[u8]) {
    let (code, rest) = number(data);
    otlp::parse_answer(u16::try_from(code % 1000).unwrap_or_default(), rest);
}
