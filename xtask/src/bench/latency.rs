//! A client that asks at a moderate rate, one request at a time, and notes when each began and how long it took.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use rustix::thread::{CpuSet, sched_setaffinity};

/// Requests come so far apart unless one takes longer.
const PAUSE: Duration = Duration::from_millis(1);

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
const END: &[u8] = b"ok";

/// A request: when it began, and how long it took.
pub(super) type Request = (Instant, Duration);

pub(super) struct Client {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Request>>>,
}

impl Client {
    /// Begins to ask a server that answers with a body that ends in `ok`.
    pub(super) fn start(cpu: Option<u32>, port: u16) -> Result<Self> {
        let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let thread = thread::spawn(move || {
            if let Some(cpu) = cpu {
                let mut cpus = CpuSet::new();
                cpus.set(cpu as usize);
                sched_setaffinity(None, &cpus)?;
            }
            let mut requests = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let begin = Instant::now();
                ask(&mut connection)?;
                let took = begin.elapsed();
                requests.push((begin, took));
                thread::sleep(PAUSE.saturating_sub(took));
            }
            Ok(requests)
        });
        Ok(Self { is_over, thread })
    }

    pub(super) fn finish(self) -> Result<Vec<Request>> {
        self.is_over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_panic| anyhow!("the client has panicked"))?
    }
}

fn ask(connection: &mut TcpStream) -> Result<()> {
    connection.write_all(REQUEST)?;
    let mut answer = [0; 4096];
    let mut length = 0;
    while !answer[..length].ends_with(END) {
        let more = connection.read(&mut answer[length..])?;
        if more == 0 {
            bail!("the server has closed the client's connection");
        }
        length += more;
    }
    Ok(())
}
