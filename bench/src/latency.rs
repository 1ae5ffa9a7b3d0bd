//! A client that sends at most 1,000 requests per second, one at a time, and records the start and the latency of each.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use rustix::thread::{CpuSet, sched_setaffinity};

/// The time between the starts of two requests, unless one takes longer.
const INTERVAL: Duration = Duration::from_millis(1);

/// How long a read may block.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
const END: &[u8] = b"ok";

/// The start and the latency of a request.
pub(crate) type Request = (Instant, Duration);

pub(crate) struct Client {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Request>>>,
}

impl Client {
    /// Starts to send requests to a server whose responses end in `ok`.
    pub(crate) fn start(cpu: Option<u32>, port: u16) -> Result<Self> {
        let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(READ_TIMEOUT))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            if let Some(cpu) = cpu {
                let mut cpus = CpuSet::new();
                cpus.set(cpu as usize);
                sched_setaffinity(None, &cpus)?;
            }
            let mut requests = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let start = Instant::now();
                request(&mut connection)?;
                let latency = start.elapsed();
                requests.push((start, latency));
                thread::sleep(INTERVAL.saturating_sub(latency));
            }
            Ok(requests)
        });
        Ok(Self { stop, thread })
    }

    pub(crate) fn finish(self) -> Result<Vec<Request>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_panic| anyhow!("the client has panicked"))?
    }
}

/// Sends a request and reads its response.
fn request(connection: &mut TcpStream) -> Result<()> {
    connection.write_all(REQUEST)?;
    let mut response = [0; 4096];
    let mut length = 0;
    while !response[..length].ends_with(END) {
        let more = connection.read(&mut response[length..])?;
        if more == 0 {
            bail!("the server has closed the client's connection");
        }
        length += more;
    }
    Ok(())
}
