//! Compresses scrapes and pushes, in which the same names occur many times.

use std::io::Write as _;

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};

/// Compresses bytes with gzip at its fastest level.
pub(super) fn compressed(plain: &[u8]) -> Bytes {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(plain).and_then(|()| gzip.finish()).expect("writing to memory does not fail").into()
}
