//! Counts the instructions of operations that observer's programs are attached to: without observer, while it observes
//! another process, and while it observes this one. Runs in a guest whose clock advances by a nanosecond for each
//! instruction (`xtask/src/ledger.rs`), so durations are counts.
//!
//! Arguments: the observer binary, and the file to which the counts are written as JSON.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::{self, Child, Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    event::{Timespec, epoll, eventfd},
    io::{read, write},
    process::{Pid, Signal, getppid, kill_process},
};

/// Runs of each measurement, of which the lowest counts: the kernel's own timers disturb the others.
const ROUNDS: usize = 3;
/// Threads that wait on the shared set.
const THREADS: usize = 8;

/// Instructions of one operation, by name.
type Counts = BTreeMap<&'static str, f64>;

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let [observer, output] = [arguments.next(), arguments.next()].map(Option::unwrap_or_default);
    let operations = Operations::new()?;
    // Once before each count: the first time, pages are still missing.
    operations.count()?;
    let mut all = BTreeMap::from([("without observer", operations.count()?)]);
    let mut other = Command::new("sleep").arg("600").spawn()?;
    for (name, pid) in [("other process", other.id()), ("target", process::id())] {
        let observer = Observer::start(&observer, pid)?;
        operations.count()?;
        all.insert(name, operations.count()?);
        observer.end()?;
    }
    other.kill()?;
    fs::write(output, serde_json::to_string(&all)?)?;
    process::exit(0)
}

/// observer, stopped: the CPU that it would use is that of the measurement.
struct Observer(Child);

impl Observer {
    fn start(path: &str, pid: u32) -> Result<Self> {
        let pid = pid.to_string();
        let arguments = ["--pid", &pid, "--no-listen", "--format", "json", "--profile", "none"];
        let command = &mut Command::new(path);
        let mut child = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stderr.take().context("its messages")?).lines();
        let mut lines = lines.map_while(Result::ok).inspect(|line| eprintln!("{line}"));
        ensure!(lines.any(|line| line.starts_with("report ")), "observer does not start");
        kill_process(pid_of(&child)?, Signal::STOP)?;
        Ok(Self(child))
    }

    fn end(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

fn pid_of(child: &Child) -> Result<Pid> {
    Pid::from_raw(child.id().try_into()?).context("a process id")
}

/// What the operations use. Its threads exist before observer starts.
struct Operations {
    listener: TcpListener,
    /// A set that never has an event.
    idle: OwnedFd,
    /// Returns what it is sent, with blocking reads.
    echo: Echo,
    /// The same, from a thread that waits on a set of its own.
    event_loop: Echo,
    /// The same, from threads that share a set.
    shared: Echo,
}

/// Another thread that answers.
struct Echo {
    request: OwnedFd,
    answer: OwnedFd,
}

impl Operations {
    fn new() -> Result<Self> {
        let shared = Echo::new()?;
        let set = shared.set()?;
        for _ in 0..THREADS {
            let (set, request, answer) =
                (set.try_clone()?, shared.request.try_clone()?, shared.answer.try_clone()?);
            thread::spawn(move || serve(Some(&set), &request, &answer));
        }
        let event_loop = Echo::new()?;
        let set = event_loop.set()?;
        let (request, answer) = (event_loop.request.try_clone()?, event_loop.answer.try_clone()?);
        thread::spawn(move || serve(Some(&set), &request, &answer));
        let echo = Echo::new()?;
        let (request, answer) = (echo.request.try_clone()?, echo.answer.try_clone()?);
        thread::spawn(move || serve(None, &request, &answer));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let idle = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self { listener, idle, echo, event_loop, shared })
    }

    fn count(&self) -> Result<Counts> {
        let look = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut events = Vec::with_capacity(1);
        Ok(BTreeMap::from([
            (
                "getppid",
                lowest(100_000, || {
                    let _parent = getppid();
                    Ok(())
                })?,
            ),
            (
                "epoll_wait that does not block",
                lowest(50_000, || {
                    epoll::wait(&self.idle, rustix::buffer::spare_capacity(&mut events), Some(&look))?;
                    Ok(())
                })?,
            ),
            ("two blocking reads of two threads", lowest(10_000, || self.echo.ask())?),
            ("the same, one in epoll_wait", lowest(10_000, || self.event_loop.ask())?),
            ("the same, eight in epoll_wait on one set", lowest(10_000, || self.shared.ask())?),
            ("TCP connection", lowest(1_000, || self.connect())?),
        ]))
    }

    fn connect(&self) -> Result<()> {
        let _client = TcpStream::connect(self.listener.local_addr()?)?;
        let _server = self.listener.accept()?;
        Ok(())
    }
}

impl Echo {
    fn new() -> Result<Self> {
        let new = || eventfd(0, rustix::event::EventfdFlags::CLOEXEC);
        Ok(Self { request: new()?, answer: new()? })
    }

    /// A set with the requests.
    fn set(&self) -> Result<OwnedFd> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Edge triggered: one thread gets each request.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&set, &self.request, epoll::EventData::new_u64(0), flags)?;
        Ok(set)
    }

    fn ask(&self) -> Result<()> {
        send(&self.request)?;
        receive(&self.answer)
    }
}

/// Answers each request, for which it waits on `set` first if there is one.
fn serve(set: Option<&OwnedFd>, request: &OwnedFd, answer: &OwnedFd) {
    let mut events = Vec::with_capacity(1);
    loop {
        if let Some(set) = set {
            events.clear();
            epoll::wait(set, rustix::buffer::spare_capacity(&mut events), None).expect("a wait");
        }
        receive(request).and_then(|()| send(answer)).expect("an answer");
    }
}

fn send(to: &OwnedFd) -> Result<()> {
    write(to, &1_u64.to_ne_bytes())?;
    Ok(())
}

fn receive(from: &OwnedFd) -> Result<()> {
    read(from, &mut [0; 8])?;
    Ok(())
}

/// Instructions of one call, in the least disturbed of several rounds.
fn lowest(calls: u32, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut lowest = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        lowest = lowest.min(start.elapsed().as_secs_f64() * 1e9 / f64::from(calls));
    }
    Ok(lowest)
}
