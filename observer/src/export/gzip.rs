//! Compression of what is sent: scrapes and pushes are the same names over and over.

use std::io::Write as _;

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};

/// A gzip stream of these bytes, made fast rather than small.
pub(super) fn compressed(plain: &[u8]) -> Bytes {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(plain).and_then(|()| gzip.finish()).expect("memory takes whatever is written").into()
}
