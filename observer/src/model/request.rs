//! The parts of a request that are kept: its method, its path without the query, and its trace context. Everything
//! else that was read of it is dropped here, because it may be confidential.

use std::sync::OnceLock;

use serde::{Serialize, Serializer};

/// Maximum number of headers that are parsed.
const HEADERS_MAX: usize = 64;

/// Maximum length of a path in bytes; longer paths are cut.
const PATH_MAX: usize = 256;

/// A request of a client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Request {
    /// Id, the same in everything that the request caused.
    #[serde(serialize_with = "hexadecimal")]
    #[cfg_attr(test, schemars(with = "String"))]
    pub(crate) id: u64,
    /// Wall time at which its first bytes had been read, RFC 3339.
    pub(crate) time: String,
    /// The same, monotonic nanoseconds.
    #[serde(skip)]
    pub(crate) at_ns: u64,
    /// When the first bytes of its response were written, in monotonic nanoseconds; empty if that was not seen, or not
    /// yet.
    #[serde(skip)]
    pub(crate) answered: OnceLock<u64>,
    /// `GET`; `None` if the request is not plain HTTP/1, or if several requests arrived at once.
    pub(crate) method: Option<String>,
    /// Path without the query; `None` as for the method.
    pub(crate) path: Option<String>,
    /// W3C trace context, if there is a valid one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) traceparent: Option<String>,
}

pub(super) fn hexadecimal<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{number:016x}"))
}

/// The parsed beginning of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Head {
    /// As in [`Request`].
    pub(crate) method: Option<String>,
    /// As in [`Request`].
    pub(crate) path: Option<String>,
    /// As in [`Request`].
    pub(crate) traceparent: Option<String>,
}

impl Head {
    /// Parses the first bytes of a read that returned `received` bytes.
    pub(crate) fn of(bytes: &[u8], received: usize) -> Self {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        let closed;
        let whole = match request.parse(bytes) {
            Ok(httparse::Status::Complete(length)) => Some(length),
            Ok(httparse::Status::Partial) => {
                // Cut after its last complete line, it can be parsed.
                let Some(end) = bytes.windows(2).rposition(|pair| pair == b"\r\n") else {
                    return Self::default();
                };
                closed = [&bytes[..end], b"\r\n\r\n"].concat();
                request = httparse::Request::new(&mut headers);
                if !matches!(request.parse(&closed), Ok(httparse::Status::Complete(_))) {
                    return Self::default();
                }
                None
            }
            Err(_) => return Self::default(),
        };
        let header = |name: &str| {
            let found = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
            str::from_utf8(found.value).ok().map(str::trim)
        };
        let body = header("content-length").and_then(|length| length.parse().ok());
        let is_chunked = header("transfer-encoding").is_some();
        let is_alone = |length: usize| is_chunked || received <= length.saturating_add(body.unwrap_or(0));
        if !whole.is_none_or(is_alone) {
            // Several requests arrived at once. Which of them is being worked on at any time is unknown.
            return Self::default();
        }
        Self {
            method: request.method.map(str::to_owned),
            path: request.path.map(without_query),
            traceparent: header("traceparent").and_then(trace_context).map(str::to_owned),
        }
    }
}

fn without_query(path: &str) -> String {
    let end = path.find(['?', '#']).unwrap_or(path.len());
    let end = path.floor_char_boundary(end.min(PATH_MAX));
    path[..end].to_owned()
}

/// The trace context, if it is valid by <https://www.w3.org/TR/trace-context/>, without fields that later versions may
/// append: those could contain anything.
fn trace_context(value: &str) -> Option<&str> {
    /// Length of the four fields.
    const LENGTH: usize = 2 + 1 + 32 + 1 + 16 + 1 + 2;

    let is_hex = |part: &str, length: usize| {
        part.len() == length && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_nonzero = |part: &str| part.bytes().any(|byte| byte != b'0');
    let mut parts = value.split('-');
    let [version, trace, parent, flags] = [parts.next()?, parts.next()?, parts.next()?, parts.next()?];
    let is_valid = is_hex(version, 2)
        && version != "ff"
        && is_hex(trace, 32)
        && is_nonzero(trace)
        && is_hex(parent, 16)
        && is_nonzero(parent)
        && is_hex(flags, 2)
        && (version != "00" || parts.next().is_none());
    is_valid.then(|| &value[..LENGTH])
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn head(text: &str) -> Head {
        Head::of(text.as_bytes(), text.len())
    }

    #[test]
    fn the_query_is_dropped() {
        let found = head("GET /a/b?token=secret#x HTTP/1.1\r\nHost: x\r\nCookie: secret\r\n\r\n");
        assert_eq!(found, Head { method: Some("GET".into()), path: Some("/a/b".into()), traceparent: None });
        let absolute = head("GET /?q HTTP/1.0\r\n\r\n");
        assert_eq!(absolute.path.as_deref(), Some("/"));
    }

    #[test]
    fn a_trace_context_is_kept_if_it_is_valid() {
        let with = |value: &str| head(&format!("GET / HTTP/1.1\r\nTraceparent: {value}\r\n\r\n")).traceparent;
        assert_eq!(with(TRACE).as_deref(), Some(TRACE));
        assert_eq!(with(&format!("01{}-more", &TRACE[2..])), Some(format!("01{}", &TRACE[2..])));
        for wrong in [
            String::new(),
            TRACE.to_uppercase(),
            format!("{TRACE}-more"),
            format!("ff{}", &TRACE[2..]),
            format!("00-{}-b7ad6b7169203331-01", "0".repeat(32)),
            TRACE.replace("b7ad6b7169203331", "0000000000000000"),
            TRACE.replace("-01", ""),
        ] {
            assert_eq!(with(&wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_truncated_request_is_parsed_as_far_as_it_goes() {
        let text = format!("POST /job/7 HTTP/1.1\r\nHost: x\r\ntraceparent: {TRACE}\r\nCookie: endle");
        let found = Head::of(text.as_bytes(), 5000);
        assert_eq!((found.path.as_deref(), found.traceparent.as_deref()), (Some("/job/7"), Some(TRACE)));
        assert_eq!(head("GET /a/long/path/that/goes/on/and"), Head::default());
        assert_eq!(head("\x16\x03\x01\x02"), Head::default());
        assert_eq!(head(""), Head::default());
    }

    #[test]
    fn requests_that_arrive_at_once_are_not_reported() {
        let one = "GET /1 HTTP/1.1\r\nHost: x\r\n\r\n";
        assert!(head(one).path.is_some());
        assert_eq!(head(&one.repeat(2)), Head::default());
        let with_body = "POST /1 HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello";
        assert!(head(with_body).path.is_some());
        assert_eq!(head(&format!("{with_body}{one}")), Head::default());
    }
}
