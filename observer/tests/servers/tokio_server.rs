//! A server on tokio's multi-threaded runtime. Each connection is answered, as JSON, by the ids of two threads: the worker
//! that served it, and one of the pool for blocking calls that did some of its work; `/lock/N` first has the worker wait for
//! a mutex that another thread holds for so many milliseconds. Prints its port.

use std::{
    io,
    net::Ipv4Addr,
    sync::{Mutex, mpsc},
    thread,
    time::Duration,
};

use nix::unistd::gettid;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    task::spawn_blocking,
};

/// Waits for a mutex for as long as another thread holds it.
fn wait_for_a_lock(time: Duration) {
    let lock = Mutex::new(());
    let (holds, held) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            let _guard = lock.lock();
            let _unless_gone = holds.send(());
            thread::sleep(time);
        });
        let _unless_gone = held.recv();
        let _guard = lock.lock();
    });
}

async fn serve(client: TcpStream) -> io::Result<()> {
    let mut client = BufReader::new(client);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        if client.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let time = line.strip_prefix("GET /lock/").and_then(|rest| rest.split(' ').next()?.parse().ok());
        if let Some(milliseconds) = time {
            wait_for_a_lock(Duration::from_millis(milliseconds));
        }
    }
    let blocking = spawn_blocking(gettid).await?;
    let body = format!("{{\"worker\": {}, \"blocking\": {blocking}}}", gettid());
    let head = format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}", body.len());
    client.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await
}

#[tokio::main(worker_threads = 3)]
async fn main() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    println!("{}", listener.local_addr()?.port());
    // In a task, as servers do: what `main` waits for is run by its own thread, which is no worker.
    tokio::spawn(async move {
        loop {
            tokio::spawn(serve(listener.accept().await?.0));
        }
    })
    .await?
}
