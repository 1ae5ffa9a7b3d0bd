//! An HTTP client that opens a connection for each request, so that connections can be counted.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    time::Duration,
};

/// Opens a connection with timeouts.
pub(crate) fn connect(port: u16) -> TcpStream {
    let connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    connection.set_read_timeout(Some(super::LIMIT)).unwrap();
    connection.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
    connection
}

/// Sends a request on a new connection; returns the body.
pub(crate) fn get(port: u16, path: &str) -> String {
    request(connect(port), path)
}

/// Sends a request on this connection and closes it; returns the body.
pub(crate) fn request(mut connection: TcpStream, path: &str) -> String {
    write!(connection, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    let (head, body) =
        answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer to {path}: {answer:?}"));
    assert!(head.contains(" 200 "), "{path}: {head}");
    body.to_owned()
}

/// Sends several requests on one keep-alive connection.
pub(crate) fn get_many(port: u16, path: &str, requests: usize) {
    let mut connection = BufReader::new(connect(port));
    for _ in 0..requests {
        write!(connection.get_mut(), "GET {path} HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
        let mut length = 0;
        loop {
            let mut line = String::new();
            connection.read_line(&mut line).unwrap();
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line == "\r\n" {
                break;
            }
            assert!(!line.is_empty(), "the server hung up");
        }
        connection.read_exact(&mut vec![0; length]).unwrap();
    }
}
