//! The scrape endpoint, with well-behaved and hostile clients.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use flate2::read::GzDecoder;

use crate::support::{acceptor::Acceptor, http, is_emulated, observer::Observer, servers::Server, wait_for};

/// Memory growth that is tolerated for what the allocator keeps. A leak of one kilobyte per scrape would exceed it.
const MEMORY_GROWTH: u64 = 4 << 20;

/// Observes without stalls, because the symbols of their stacks take memory.
fn observe(pid: u32) -> Observer {
    let pid = pid.to_string();
    Observer::start(&["--pid", &pid, "--listen", "127.0.0.1:0", "--stall-threshold", "1h"])
}

/// A response: its head in lower case, and its body.
struct Response {
    head: String,
    body: Vec<u8>,
}

/// Sends a request on a keep-alive connection; `None` if the connection is closed before the response begins.
fn exchange(connection: &mut BufReader<TcpStream>, request: &str) -> Option<Response> {
    connection.get_mut().write_all(request.as_bytes()).ok()?;
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        match connection.read_line(&mut head) {
            Ok(length) if length > 0 => {}
            _ if head.is_empty() => return None,
            end => panic!("an answer ends in its head: {end:?} {head}"),
        }
    }
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    connection.read_exact(&mut body).unwrap();
    Some(Response { head, body })
}

fn exchange_once(port: u16, request: &str) -> Response {
    exchange(&mut BufReader::new(http::connect(port)), request).expect("an answer")
}

const SCRAPE: &str = "GET /metrics HTTP/1.1\r\nHost: test\r\nAccept-Encoding: gzip\r\n\r\n";

#[real_test(userspace)]
fn pages_are_served_plain_and_compressed() {
    let server = Server::nginx(1);
    let observer = observe(server.pid());
    let page =
        |path: &str| exchange_once(observer.port(), &format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n"));
    let plain = page("/metrics");
    assert!(plain.head.contains("content-type: text/plain; version=0.0.4"), "{}", plain.head);
    assert!(!plain.head.contains("content-encoding"), "{}", plain.head);
    assert!(String::from_utf8(page("/").body).unwrap().contains("href=\"/metrics\""));
    assert_eq!((page("/healthz").body, page("/readyz").body), (b"ok\n".to_vec(), b"ready\n".to_vec()));
    assert!(page("/secrets").head.starts_with("http/1.1 404 "));
    let compressed = exchange_once(observer.port(), SCRAPE);
    assert!(compressed.head.contains("content-encoding: gzip"), "{}", compressed.head);
    let mut text = String::new();
    GzDecoder::new(&*compressed.body).read_to_string(&mut text).unwrap();
    assert!(text.contains("# TYPE observer_accept_queue_accepts_total counter"), "{text}");
    assert!(compressed.body.len() * 4 < text.len());
    observer.finish();
}

#[real_test(userspace)]
fn series_of_an_exited_process_end() {
    let (dying, living) = (Server::asyncio(), Server::asyncio());
    let pids = [dying.pid().to_string(), living.pid().to_string()];
    let observer = Observer::start(&["--pid", &pids[0], "--pid", &pids[1], "--listen", "127.0.0.1:0"]);
    let has_series_of =
        |pid: &String| observer.scrape().lines().any(|line| line.contains(&format!("pid=\"{pid}\"")));
    assert!(has_series_of(&pids[0]) && has_series_of(&pids[1]));
    drop(dying);
    // Metrics may be out of date, by more on slow machines.
    wait_for("the series to end", || (!has_series_of(&pids[0])).then_some(()));
    assert!(has_series_of(&pids[1]));
    observer.finish();
}

/// The first listeners have series of their own, all others share one, and the sum is complete.
#[real_test(userspace)]
fn listeners_beyond_the_limit_share_a_series() {
    let mut crowd = Acceptor::group(250);
    let observer = observe(crowd.pid());
    let connections = crowd.request("connect 400");
    assert_eq!(crowd.request(&format!("accept {connections}")), connections);
    let scrape = observer.scrape();
    let series: Vec<_> =
        scrape.lines().filter(|line| line.starts_with("observer_accept_queue_accepts_total{")).collect();
    let count = |line: &&str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
    assert_eq!(series.len(), 201, "{series:#?}");
    assert!(series[200].contains("listener=\"other\"") && count(&series[200]) > 0.0, "{}", series[200]);
    assert_eq!(series.iter().map(count).sum::<f64>(), f64::from(connections));
    observer.finish();
}

/// Clients that send nothing, half a request, too much or garbage, or do not read the response: other scrapes are not
/// affected, and the memory of observer does not grow.
#[real_test(userspace)]
fn hostile_clients_do_not_affect_scrapes_or_memory() {
    let server = Server::nginx(1);
    let observer = observe(server.pid());
    let port = observer.port();
    exchange_once(port, SCRAPE);
    let before = observer.memory();
    let too_long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(1 << 20));
    let too_many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "X: x\r\n".repeat(1000));
    let unread = "GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n".repeat(200);
    let requests = [
        "",
        "GET /met",
        &too_long,
        &too_many,
        &unread,
        "\0\u{1}\u{2}nonsense\r\n\r\n",
        "POST /metrics HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\nx",
    ];
    let mut held = Vec::new();
    for round in 0..100 {
        for request in requests {
            let mut connection = http::connect(port);
            connection.set_nonblocking(true).unwrap();
            // The server closes the connection, or stops reading.
            let _refused = connection.write_all(request.as_bytes());
            held.push(connection);
        }
        if round % 10 == 0 {
            let response = exchange_once(port, SCRAPE);
            assert!(response.head.starts_with("http/1.1 200 "), "{}", response.head);
        }
    }
    let grown = observer.memory().saturating_sub(before);
    eprintln!("{} hostile connections: {} KiB more", held.len(), grown >> 10);
    assert!(grown < MEMORY_GROWTH, "{grown} bytes more");
    // Connections that are still open are closed after a time limit.
    let open = || {
        let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
        // State 01 is an established connection.
        sockets
            .lines()
            .filter(|line| line.contains(&format!("0100007F:{port:04X} 0100007F:")) && line.contains(" 01 "))
            .count()
    };
    wait_for("the connections to end", || (open() == 0).then_some(()));
    observer.finish();
}

/// Scrapes at this rate for this time, while a server is under full load: none fails, and memory does not grow.
#[real_test(alone, userspace)]
fn a_thousand_scrapes_a_second_are_served() {
    const CLIENTS: u64 = 8;
    let (rate, seconds) = if is_emulated() { (40, 4) } else { (1000, seconds()) };
    let server = Server::nginx(2);
    let observer = observe(server.pid());
    let mut load = Command::new("wrk")
        .args(["-t", "1", "-c", "16", "-d", &format!("{}", seconds + 5)])
        .arg(format!("http://127.0.0.1:{}/", server.port))
        .stdout(Stdio::null())
        .spawn()
        .expect("wrk is installed");
    // Warm up, so that all permanent allocations are made.
    let warm = Instant::now() + Duration::from_secs(3);
    while Instant::now() < warm {
        exchange_once(observer.port(), SCRAPE);
    }
    let before = observer.memory();
    let (start, reconnects) = (Instant::now(), AtomicU64::new(0));
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (reconnects, port) = (&reconnects, observer.port());
            scope.spawn(move || {
                let mut connection = BufReader::new(http::connect(port));
                for n in (client..rate * seconds).step_by(usize::try_from(CLIENTS).unwrap()) {
                    let due = start
                        + Duration::from_secs(1) * u32::try_from(n).unwrap() / u32::try_from(rate).unwrap();
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    // An idle connection may be closed; a client opens a new one then.
                    let response = exchange(&mut connection, SCRAPE).unwrap_or_else(|| {
                        reconnects.fetch_add(1, Ordering::Relaxed);
                        connection = BufReader::new(http::connect(port));
                        exchange(&mut connection, SCRAPE).expect("an answer")
                    });
                    assert!(
                        response.head.starts_with("http/1.1 200 ") && !response.body.is_empty(),
                        "{}",
                        response.head
                    );
                }
            });
        }
    });
    let took = start.elapsed().as_secs_f64();
    let grown = observer.memory().saturating_sub(before);
    let scrapes = rate * seconds;
    eprintln!(
        "{scrapes} scrapes in {took:.1} s on {} connections: {} KiB more",
        CLIENTS + reconnects.into_inner(),
        grown >> 10
    );
    load.wait().unwrap();
    observer.finish().assert_complete();
    assert!(grown < MEMORY_GROWTH, "{grown} bytes more");
    #[expect(clippy::cast_precision_loss, reason = "seconds")]
    let limit = 1.5 * seconds as f64;
    assert!(took < limit, "{scrapes} scrapes took {took} s");
}

/// Duration of the test in seconds; OBSERVER_TEST_SCRAPE_SECONDS overrides it.
fn seconds() -> u64 {
    std::env::var("OBSERVER_TEST_SCRAPE_SECONDS").map_or(5, |seconds| seconds.parse().unwrap())
}
