//! The load of the demo: steady requests for the event loop, bursts of connections for the slow accepter.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::Result;

use super::server::{DEFERRING_PATH, Ports};

/// Connections of one burst.
pub(crate) const BURST: usize = 10;

const REQUEST_PAUSE: Duration = Duration::from_millis(10);
const BURST_PAUSE: Duration = Duration::from_millis(600);
/// Number of requests of which one makes the server defer a task.
const DEFERRING_EVERY: usize = 5;

/// Starts the load, which ends with the process, or when the server is gone.
pub(crate) fn start(ports: Ports) -> Result<()> {
    thread::Builder::new().name("load".into()).spawn(move || {
        for n in 0_usize.. {
            let path = if n.is_multiple_of(DEFERRING_EVERY) { DEFERRING_PATH } else { "/" };
            if request(ports.reactor, path).is_err() {
                return;
            }
            thread::sleep(REQUEST_PAUSE);
        }
    })?;
    thread::Builder::new().name("bursts".into()).spawn(move || {
        while burst(ports.accepter).is_ok() {
            thread::sleep(BURST_PAUSE);
        }
    })?;
    Ok(())
}

/// Sends one request on a new connection.
fn request(port: u16, path: &str) -> Result<()> {
    let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    write!(connection, "GET {path} HTTP/1.1\r\nHost: demo\r\n\r\n")?;
    let mut answer = [0; 256];
    let _length = connection.read(&mut answer)?;
    Ok(())
}

fn burst(port: u16) -> Result<()> {
    let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, port));
    let connections = (0..BURST).map(|_| connect()).collect::<Result<Vec<_>, _>>()?;
    for mut connection in connections {
        // Ends when the server has accepted and closed it.
        let _length = connection.read(&mut [0; 1])?;
    }
    Ok(())
}
