//! A tokio server whose requests defer tasks, chains of tasks, and blocking work. It logs which request each task came
//! from, when it was enqueued and when it started. Prints its port.
//!
//! `deferred_tokio current|multi LOG`: a runtime with one thread or with several, and the log file, with a line of JSON
//! for each task. `GET /job/ID` enqueues all kinds of tasks and responds at once, `GET /abort/ID` a task that is
//! aborted before it runs.

use std::{
    env,
    fs::File,
    io::{self, Write as _},
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    runtime::Builder,
    task::{JoinHandle, spawn_blocking},
    time::sleep,
};

/// `CLOCK_MONOTONIC` in nanoseconds.
fn now() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

/// A deferred task, from when it is enqueued.
struct TaskRecord {
    log: Arc<File>,
    request: String,
    depth: u32,
    enqueued: i64,
}

impl TaskRecord {
    fn of(log: &Arc<File>, request: &str) -> Self {
        Self { log: Arc::clone(log), request: request.to_owned(), depth: 1, enqueued: now() }
    }

    /// A task that this one enqueues.
    fn next(&self) -> Self {
        Self { depth: self.depth + 1, ..Self::of(&self.log, &self.request) }
    }

    /// A single write for each line, so that lines of several threads do not mix.
    fn started(&self, name: &str) {
        let Self { request, depth, enqueued, .. } = self;
        let start = now();
        let line = format!(
            "{{\"request\": \"{request}\", \"name\": \"{name}\", \"depth\": {depth}, \"enqueued\": {enqueued}, \"start\": {start}}}\n"
        );
        (&*self.log).write_all(line.as_bytes()).unwrap();
    }
}

async fn at_once(record: TaskRecord) {
    record.started("at_once");
}

async fn sleeper(record: TaskRecord) {
    record.started("sleeper");
    for _ in 0..3 {
        sleep(Duration::from_millis(5)).await;
    }
}

async fn chain_first(record: TaskRecord) {
    record.started("chain_first");
    sleep(Duration::from_millis(2)).await;
    tokio::spawn(chain_second(record.next()));
}

async fn chain_second(record: TaskRecord) {
    record.started("chain_second");
    sleep(Duration::from_millis(2)).await;
    tokio::spawn(chain_third(record.next()));
}

async fn chain_third(record: TaskRecord) {
    record.started("chain_third");
}

/// Its output is not read while the connection is open: the task finishes long before its memory is freed.
async fn kept(record: TaskRecord) {
    record.started("kept");
}

async fn aborted(record: TaskRecord) {
    record.started("aborted");
}

fn enqueue(log: &Arc<File>, request: &str) -> JoinHandle<()> {
    tokio::spawn(at_once(TaskRecord::of(log, request)));
    tokio::spawn(sleeper(TaskRecord::of(log, request)));
    tokio::spawn(chain_first(TaskRecord::of(log, request)));
    let record = TaskRecord::of(log, request);
    spawn_blocking(move || record.started("blocking"));
    tokio::spawn(kept(TaskRecord::of(log, request)))
}

async fn serve(client: TcpStream, log: Arc<File>) -> io::Result<()> {
    let mut client = BufReader::new(client);
    let mut handles = Vec::new();
    loop {
        let (mut first, mut line) = (String::new(), String::new());
        if client.read_line(&mut first).await? == 0 {
            return Ok(());
        }
        while line != "\r\n" {
            line.clear();
            if client.read_line(&mut line).await? == 0 {
                return Ok(());
            }
        }
        let path = first.split(' ').nth(1).unwrap_or_default();
        if let Some(request) = path.strip_prefix("/job/") {
            handles.push(enqueue(&log, request));
        } else if let Some(request) = path.strip_prefix("/abort/") {
            tokio::spawn(aborted(TaskRecord::of(&log, request))).abort();
        }
        client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await?;
    }
}

fn main() -> io::Result<()> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [flavor, log] = &arguments[..] else { panic!("usage: deferred_tokio current|multi LOG") };
    let mut builder = match flavor.as_str() {
        "current" => Builder::new_current_thread(),
        "multi" => Builder::new_multi_thread(),
        other => panic!("{other}: neither current nor multi"),
    };
    let log = Arc::new(File::options().create(true).append(true).open(log)?);
    builder.worker_threads(3).enable_all().build()?.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        println!("{}", listener.local_addr()?.port());
        // In a task, as in servers: the future that `block_on` runs is not a task.
        tokio::spawn(async move {
            loop {
                tokio::spawn(serve(listener.accept().await?.0, Arc::clone(&log)));
            }
        })
        .await?
    })
}
