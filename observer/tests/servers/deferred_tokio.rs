//! A server on tokio whose requests leave work behind them: tasks, chains of tasks, blocking work. It writes down itself
//! which request each piece came from, when that was enqueued and when it started. Prints its port.
//!
//! `deferred_tokio current|multi TRUTH`: a runtime of one thread or of several, and the file for that, a JSON line a piece.
//! `GET /job/ID` starts all kinds of work and is answered at once, `GET /abort/ID` a task that is aborted before it runs.

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

/// Nanoseconds of `CLOCK_MONOTONIC`.
fn now() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

/// A piece of deferred work from when it is enqueued.
struct Piece {
    truth: Arc<File>,
    request: String,
    depth: u32,
    enqueued: i64,
}

impl Piece {
    fn of(truth: &Arc<File>, request: &str) -> Self {
        Self { truth: Arc::clone(truth), request: request.to_owned(), depth: 1, enqueued: now() }
    }

    /// What this piece enqueues in its turn.
    fn next(&self) -> Self {
        Self { depth: self.depth + 1, ..Self::of(&self.truth, &self.request) }
    }

    /// One write a line, so that lines of several threads do not mix.
    fn started(&self, name: &str) {
        let Self { request, depth, enqueued, .. } = self;
        let start = now();
        let line = format!(
            "{{\"request\": \"{request}\", \"name\": \"{name}\", \"depth\": {depth}, \"enqueued\": {enqueued}, \"start\": {start}}}\n"
        );
        (&*self.truth).write_all(line.as_bytes()).unwrap();
    }
}

async fn at_once(piece: Piece) {
    piece.started("at_once");
}

async fn sleeper(piece: Piece) {
    piece.started("sleeper");
    for _ in 0..3 {
        sleep(Duration::from_millis(5)).await;
    }
}

async fn chain_first(piece: Piece) {
    piece.started("chain_first");
    sleep(Duration::from_millis(2)).await;
    tokio::spawn(chain_second(piece.next()));
}

async fn chain_second(piece: Piece) {
    piece.started("chain_second");
    sleep(Duration::from_millis(2)).await;
    tokio::spawn(chain_third(piece.next()));
}

async fn chain_third(piece: Piece) {
    piece.started("chain_third");
}

/// Its output is never asked for while its connection lives: the task is over long before its memory is.
async fn kept(piece: Piece) {
    piece.started("kept");
}

async fn aborted(piece: Piece) {
    piece.started("aborted");
}

fn enqueue(truth: &Arc<File>, request: &str) -> JoinHandle<()> {
    tokio::spawn(at_once(Piece::of(truth, request)));
    tokio::spawn(sleeper(Piece::of(truth, request)));
    tokio::spawn(chain_first(Piece::of(truth, request)));
    let piece = Piece::of(truth, request);
    spawn_blocking(move || piece.started("blocking"));
    tokio::spawn(kept(Piece::of(truth, request)))
}

async fn serve(client: TcpStream, truth: Arc<File>) -> io::Result<()> {
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
            handles.push(enqueue(&truth, request));
        } else if let Some(request) = path.strip_prefix("/abort/") {
            tokio::spawn(aborted(Piece::of(&truth, request))).abort();
        }
        client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await?;
    }
}

fn main() -> io::Result<()> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let [flavor, truth] = &arguments[..] else { panic!("usage: deferred_tokio current|multi TRUTH") };
    let mut builder = match flavor.as_str() {
        "current" => Builder::new_current_thread(),
        "multi" => Builder::new_multi_thread(),
        other => panic!("{other}: neither current nor multi"),
    };
    let truth = Arc::new(File::options().create(true).append(true).open(truth)?);
    builder.worker_threads(3).enable_all().build()?.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        println!("{}", listener.local_addr()?.port());
        // In a task, as servers do: what `block_on` waits for is no task itself.
        tokio::spawn(async move {
            loop {
                tokio::spawn(serve(listener.accept().await?.0, Arc::clone(&truth)));
            }
        })
        .await?
    })
}
