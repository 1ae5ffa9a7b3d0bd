//! A million connections, most of which their clients reset: all are counted, and no entries of them stay.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Instant,
};

use nix::{
    libc::linger,
    sys::socket::{setsockopt, sockopt},
};

use crate::support::{http, is_emulated, is_full, observer::Observer, servers::Server};

/// Number of client threads, and connections of each until it waits for a response. They fit into nginx's queue of 511.
/// A connection with a response was the last one of its thread in the queue.
const THREADS: u64 = 4;
const BATCH: u64 = 64;

/// What happened to the clients' connections, by their own count.
#[derive(Default)]
struct Clients {
    connected: AtomicU64,
    /// Reset immediately. As many are reset after the server has accepted them.
    reset: AtomicU64,
}

impl Clients {
    /// Opens batches of connections, and closes them in different ways.
    fn run(&self, port: u16, batches: u64) {
        let mut kept = Vec::new();
        for number in 0..batches * BATCH {
            let mut connection = http::connect(port);
            self.connected.fetch_add(1, Ordering::Relaxed);
            let request = b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
            match number % BATCH {
                // Closed without data: only one in 64, because it keeps its port for a minute.
                31 => continue,
                63 => {
                    connection.write_all(request).unwrap();
                    connection.read_to_end(&mut Vec::new()).unwrap();
                    reset(connection);
                    kept.drain(..).for_each(reset);
                }
                odd if odd % 2 == 1 => kept.push(connection),
                _ => {
                    reset(connection);
                    self.reset.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
}

/// Closes a connection with a reset.
fn reset(connection: TcpStream) {
    setsockopt(&connection, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 }).unwrap();
}

#[real_test]
fn connection_flood_is_counted_and_leaks_nothing() {
    let batches = match (is_emulated(), is_full()) {
        (true, _) => 80,
        (_, false) => 400,
        (_, true) => 4_000,
    };
    let server = Server::nginx(1);
    let before = server.nginx_accepts();
    let observer = Observer::attach(server.pid());
    let (clients, start) = (Clients::default(), Instant::now());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| clients.run(server.port, batches));
        }
    });
    let elapsed = start.elapsed().as_secs_f64();
    // The connection that reads the count is the last one in the queue.
    let connections = server.nginx_accepts() - before;
    let (connected, reset) = (clients.connected.into_inner(), clients.reset.into_inner());
    assert_eq!(connected, THREADS * batches * BATCH);
    // A client may consider a connection established that the kernel has dropped because its queue was full or memory
    // was short.
    assert!(
        (connected - connected / 10_000..=connected + 1).contains(&connections),
        "the server accepted {connections} of {connected}"
    );
    assert_eq!(observer.queued_connections(), 0, "connections remembered though none waits");

    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(server.port);
    let counter = |name: &str| listener[name].as_u64().unwrap();
    let (waits, aborted, unknown) =
        (listener["wait"]["count"].as_u64().unwrap(), counter("aborted"), counter("accepts_unknown_wait"));
    eprintln!(
        "{connected} connections in {elapsed:.1} s, {reset} reset: {waits} waits, {aborted} reset in the queue, \
         {unknown} unknown"
    );
    assert_eq!(counter("accepts"), connections, "{listener:#}");
    assert_eq!(counter("arrivals"), connections, "{listener:#}");
    assert_eq!(counter("depth"), 0, "{listener:#}");
    assert!(aborted > 0 && aborted <= reset, "{listener:#}");
    // A reset may arrive while accept returns: then neither a wait nor an abort is counted.
    assert_eq!(waits + aborted + unknown, connections, "{listener:#}");
    assert!(unknown <= connections / 10_000, "{listener:#}");
}
