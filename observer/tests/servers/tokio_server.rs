//! A server on tokio's multi-threaded runtime. The response is JSON with the ids of two threads: the worker that served
//! the request, and a thread of the pool for blocking calls that did part of the work. `/lock/N` first makes the worker
//! wait for a mutex that another thread holds for N milliseconds. `/sleep/N` makes it sleep, and `/handed-over/N` makes it
//! sleep after it has handed its place on to another thread (`block_in_place`). Prints its port.
//!
//! Usage: `tokio_server [WORKERS]`, 3 by default

use std::{
    env, fs, io,
    net::Ipv4Addr,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use nix::unistd::{Pid, gettid};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    runtime::Builder,
    task::{block_in_place, spawn_blocking},
};

/// Waits for a mutex that another thread holds for this time after the waiting thread has blocked.
fn wait_for_a_lock(time: Duration) {
    let lock = Mutex::new(());
    let (holds, held) = mpsc::channel();
    let (worker, is_about_to) = (gettid(), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            let _guard = lock.lock();
            let _ignored = holds.send(());
            // On a busy machine, blocking may be delayed by as much as the time to wait.
            let is_blocked = || is_about_to.load(Ordering::SeqCst) && is_asleep(worker);
            (0..MAX_POLLS).take_while(|_| !is_blocked()).for_each(|_| thread::sleep(POLL_INTERVAL));
            thread::sleep(time);
        });
        let _ignored = held.recv();
        is_about_to.store(true, Ordering::SeqCst);
        let _guard = lock.lock();
    });
}

/// How often to check whether a thread is asleep, and the maximum number of checks.
const POLL_INTERVAL: Duration = Duration::from_millis(1);
const MAX_POLLS: u32 = 10_000;

fn is_asleep(tid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|state| state.starts_with('S'))
}

async fn serve(client: TcpStream) -> io::Result<()> {
    let mut client = BufReader::new(client);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        if client.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let time = |path: &str| {
            let time = line.strip_prefix("GET /")?.strip_prefix(path)?.split(' ').next()?.parse().ok()?;
            Some(Duration::from_millis(time))
        };
        if let Some(time) = time("lock/") {
            wait_for_a_lock(time);
        } else if let Some(time) = time("sleep/") {
            thread::sleep(time);
        } else if let Some(time) = time("handed-over/") {
            block_in_place(|| thread::sleep(time));
        }
    }
    let blocking = spawn_blocking(gettid).await?;
    let body = format!("{{\"worker\": {}, \"blocking\": {blocking}}}", gettid());
    let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}", body.len());
    client.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await
}

fn main() -> io::Result<()> {
    let workers = env::args().nth(1).map_or(3, |workers| workers.parse().expect("a number of workers"));
    Builder::new_multi_thread().worker_threads(workers).enable_all().build()?.block_on(run())
}

async fn run() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    println!("{}", listener.local_addr()?.port());
    // In a task, as in servers: the future of `main` runs in its own thread, which is not a worker.
    tokio::spawn(async move {
        loop {
            tokio::spawn(serve(listener.accept().await?.0));
        }
    })
    .await?
}
