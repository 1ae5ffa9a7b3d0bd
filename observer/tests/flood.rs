//! A million connections, most of which their clients give up: all are counted, and none is remembered for ever.

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

/// Threads of clients, and connections of each until it waits for an answer: so many fit into nginx' queue of 511,
/// and whoever is answered was the last of its thread in the queue.
const THREADS: u64 = 4;
const BATCH: u64 = 64;

/// What became of the clients' connections, by their own count.
#[derive(Default)]
struct Clients {
    connected: AtomicU64,
    /// Reset at once. As many are reset when the server has surely accepted them.
    reset: AtomicU64,
}

impl Clients {
    /// Makes batches of connections of every fate.
    fn run(&self, port: u16, batches: u64) {
        let mut kept = Vec::new();
        for number in 0..batches * BATCH {
            let mut connection = http::connect(port);
            self.connected.fetch_add(1, Ordering::Relaxed);
            let request = b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
            match number % BATCH {
                // Closed in order, without a word: one in many, for it keeps its port for a minute.
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

/// Closes a connection by a reset, whatever is still to be sent or read.
fn reset(connection: TcpStream) {
    setsockopt(&connection, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 }).unwrap();
}

#[real_test]
fn a_million_connections_leave_nothing_behind() {
    let batches = match (is_emulated(), is_full()) {
        (true, _) => 80,
        (_, false) => 400,
        (_, true) => 4_000,
    };
    let server = Server::nginx(1);
    let before = server.nginx_accepts();
    let observer = Observer::of(server.pid());
    let (clients, start) = (Clients::default(), Instant::now());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| clients.run(server.port, batches));
        }
    });
    let elapsed = start.elapsed().as_secs_f64();
    // The one that asks stands behind all others in the queue.
    let connections = server.nginx_accepts() - before;
    let (connected, reset) = (clients.connected.into_inner(), clients.reset.into_inner());
    assert_eq!(connected, THREADS * batches * BATCH);
    // A client may believe in a connection that the kernel has dropped when its queue was full or memory short.
    assert!(
        (connected - connected / 10_000..=connected + 1).contains(&connections),
        "the server accepted {connections} of {connected}"
    );
    assert_eq!(observer.in_flight(), 0, "connections remembered though none waits");

    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(server.port);
    let figure = |name: &str| listener[name].as_u64().unwrap();
    let (waits, aborted, unknown) =
        (listener["wait"]["count"].as_u64().unwrap(), figure("aborted"), figure("accepts_unknown_wait"));
    eprintln!(
        "{connected} connections in {elapsed:.1} s, {reset} reset: {waits} waits, {aborted} reset in the queue, \
         {unknown} unknown"
    );
    assert_eq!(figure("accepts"), connections, "{listener:#}");
    assert_eq!(figure("arrivals"), connections, "{listener:#}");
    assert_eq!(figure("depth"), 0, "{listener:#}");
    assert!(aborted > 0 && aborted <= reset, "{listener:#}");
    // A reset may come while accept returns: then there is neither an arrival nor an end.
    assert_eq!(waits + aborted + unknown, connections, "{listener:#}");
    assert!(unknown <= connections / 10_000, "{listener:#}");
}
