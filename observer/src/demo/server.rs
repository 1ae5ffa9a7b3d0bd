//! The server of the demo: an event loop that blocks on purpose, and a thread that accepts too slowly.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    hint::black_box,
    io::{ErrorKind, Read as _, Write as _, stdin},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _},
    process::{ExitCode, exit},
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    prctl,
    signal::{SigHandler, Signal, signal},
};

/// Name of the event loop's thread.
pub(crate) const REACTOR: &str = "reactor";
/// Name of the thread that accepts too slowly.
pub(crate) const ACCEPTER: &str = "slow-accepter";
/// How long the event loop computes, once each [`PERIOD`].
pub(crate) const SPIN: Duration = Duration::from_millis(80);
/// How long the event loop sleeps, once each [`PERIOD`], half a period after the spin.
pub(crate) const SLEEP: Duration = Duration::from_millis(120);
/// How long a deferred task computes.
pub(crate) const DEFERRED_WORK: Duration = Duration::from_millis(3);
/// Pause of the slow thread between two accepts.
pub(crate) const ACCEPT_PAUSE: Duration = Duration::from_millis(40);
/// Path of the requests that make the server defer a task.
pub(crate) const DEFERRING_PATH: &str = "/order";

const PERIOD: Duration = Duration::from_secs(1);
/// Resolution of the timeout of a wait for events.
const TICK: Duration = Duration::from_millis(1);

/// Where the server listens on 127.0.0.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ports {
    /// Served by the event loop.
    pub(crate) reactor: u16,
    /// Served by the slow thread.
    pub(crate) accepter: u16,
}

/// The line that the server prints to report its ports.
impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.reactor, self.accepter)
    }
}

impl FromStr for Ports {
    type Err = anyhow::Error;

    fn from_str(line: &str) -> Result<Self> {
        let (reactor, accepter) = line.trim().split_once(' ').context("expected two ports")?;
        Ok(Self { reactor: reactor.parse()?, accepter: accepter.parse()? })
    }
}

/// Serves until standard input is closed, that is until the process that started it has exited.
pub(crate) fn run() -> Result<ExitCode> {
    // Ctrl-C reaches the whole process group, but the server must be running when the report is made.
    // SAFETY: ignoring a signal installs no handler.
    unsafe { signal(Signal::SIGINT, SigHandler::SigIgn) }?;
    prctl::set_name(c"demo-server")?;
    let listen = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen on loopback");
    let (fast, slow) = (listen()?, listen()?);
    println!("{}", Ports { reactor: fast.local_addr()?.port(), accepter: slow.local_addr()?.port() });
    thread::Builder::new().name(ACCEPTER.into()).spawn(move || accept_slowly(&slow))?;
    thread::Builder::new().name(REACTOR.into()).spawn(move || {
        if let Err(error) = run_event_loop(&fast) {
            eprintln!("the event loop of the demo server failed: {error:#}");
            exit(1);
        }
    })?;
    let _end_of_input = stdin().read_to_end(&mut Vec::new());
    Ok(ExitCode::SUCCESS)
}

fn accept_slowly(listener: &TcpListener) {
    for connection in listener.incoming() {
        // Closed at once: the client only waits to be accepted.
        drop(connection);
        thread::sleep(ACCEPT_PAUSE);
    }
}

fn run_event_loop(listener: &TcpListener) -> Result<()> {
    const LISTENER: u64 = 0;
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut connections = HashMap::<u64, TcpStream>::new();
    let mut deferred = VecDeque::<fn()>::new();
    let mut next_spin = Instant::now() + PERIOD;
    let mut next_sleep = next_spin + PERIOD / 2;
    loop {
        // Rounded up, because a timeout below a millisecond would not wait at all.
        let pause = next_spin.min(next_sleep).saturating_duration_since(Instant::now()) + TICK;
        let timeout = if deferred.is_empty() { EpollTimeout::try_from(pause)? } else { EpollTimeout::ZERO };
        let mut events = [EpollEvent::empty(); 64];
        let ready = epoll.wait(&mut events, timeout)?;
        for event in &events[..ready] {
            if event.data() == LISTENER {
                while let Ok((connection, _)) = listener.accept() {
                    connection.set_nonblocking(true)?;
                    let key = u64::try_from(connection.as_raw_fd())?;
                    epoll.add(connection.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, key))?;
                    connections.insert(key, connection);
                }
            } else if let Some(path) = connections.get_mut(&event.data()).and_then(answer) {
                if path == DEFERRING_PATH {
                    deferred.push_back(|| spin(DEFERRED_WORK));
                }
            } else {
                // Closing also removes it from the epoll set.
                connections.remove(&event.data());
            }
        }
        if ready == 0
            && let Some(work) = deferred.pop_front()
        {
            work();
        }
        if Instant::now() >= next_spin {
            spin(SPIN);
            next_spin += PERIOD;
        }
        if Instant::now() >= next_sleep {
            thread::sleep(SLEEP);
            next_sleep += PERIOD;
        }
    }
}

/// Answers a small request. Returns its path, empty if there was no request; `None` if the connection has ended.
fn answer(connection: &mut TcpStream) -> Option<String> {
    let mut request = [0; 1024];
    match connection.read(&mut request) {
        Ok(0) => None,
        Ok(length) => {
            connection.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n").ok()?;
            let request = String::from_utf8_lossy(&request[..length]);
            Some(request.split(' ').nth(1)?.to_owned())
        }
        Err(error) if error.kind() == ErrorKind::WouldBlock => Some(String::new()),
        Err(_) => None,
    }
}

/// Keeps the thread on a CPU for this time.
fn spin(time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        black_box(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_survive_the_line_that_carries_them() {
        let ports = Ports { reactor: 40_001, accepter: 40_002 };
        assert_eq!(ports.to_string().parse::<Ports>().unwrap(), ports);
        assert!("nothing".parse::<Ports>().is_err());
    }
}
