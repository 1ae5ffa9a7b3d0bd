//! The scrape endpoint as clients meet it, the hostile ones among them.

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

/// Memory that answering may take for good: what the allocator keeps. A kilobyte a scrape would be more.
const MEMORY: u64 = 4 << 20;

/// Without stalls: naming the functions that one is in takes memory, whoever scrapes.
fn observe(pid: u32) -> Observer {
    let pid = pid.to_string();
    Observer::start(&["--pid", &pid, "--listen", "127.0.0.1:0", "--stall-threshold", "1h"])
}

/// An answer: its head in small letters, and its body.
struct Answer {
    head: String,
    body: Vec<u8>,
}

/// Sends a request on a connection that may go on; `None` if the connection ends before the answer begins.
fn ask(connection: &mut BufReader<TcpStream>, request: &str) -> Option<Answer> {
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
    Some(Answer { head, body })
}

fn ask_once(port: u16, request: &str) -> Answer {
    ask(&mut BufReader::new(http::connect(port)), request).expect("an answer")
}

const SCRAPE: &str = "GET /metrics HTTP/1.1\r\nHost: test\r\nAccept-Encoding: gzip\r\n\r\n";

#[real_test(userspace)]
fn there_are_pages_for_people_and_machines() {
    let server = Server::nginx(1);
    let observer = observe(server.pid());
    let page = |path: &str| ask_once(observer.port(), &format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n"));
    let plain = page("/metrics");
    assert!(plain.head.contains("content-type: text/plain; version=0.0.4"), "{}", plain.head);
    assert!(!plain.head.contains("content-encoding"), "{}", plain.head);
    assert!(String::from_utf8(page("/").body).unwrap().contains("href=\"/metrics\""));
    assert_eq!((page("/healthz").body, page("/readyz").body), (b"ok\n".to_vec(), b"ready\n".to_vec()));
    assert!(page("/secrets").head.starts_with("http/1.1 404 "));
    let compressed = ask_once(observer.port(), SCRAPE);
    assert!(compressed.head.contains("content-encoding: gzip"), "{}", compressed.head);
    let mut text = String::new();
    GzDecoder::new(&*compressed.body).read_to_string(&mut text).unwrap();
    assert!(text.contains("# TYPE observer_accept_queue_accepts_total counter"), "{text}");
    assert!(compressed.body.len() * 4 < text.len());
    observer.finish();
}

#[real_test(userspace)]
fn the_series_of_a_dead_process_are_gone() {
    let (dying, living) = (Server::asyncio(), Server::asyncio());
    let pids = [dying.pid().to_string(), living.pid().to_string()];
    let observer = Observer::start(&["--pid", &pids[0], "--pid", &pids[1], "--listen", "127.0.0.1:0"]);
    let tells_of =
        |pid: &String| observer.scrape().lines().any(|line| line.contains(&format!("pid=\"{pid}\"")));
    assert!(tells_of(&pids[0]) && tells_of(&pids[1]));
    drop(dying);
    // Figures may have some age, the more the longer it takes to read them.
    wait_for("the series to end", || (!tells_of(&pids[0])).then_some(()));
    assert!(tells_of(&pids[1]));
    observer.finish();
}

/// Of a crowd of listeners the first are told one by one, the others together; nothing is missing from the sum.
#[real_test(userspace)]
fn a_crowd_is_told_together() {
    let mut crowd = Acceptor::group(250);
    let observer = observe(crowd.pid());
    let connections = crowd.tell("connect 400");
    assert_eq!(crowd.tell(&format!("accept {connections}")), connections);
    let scrape = observer.scrape();
    let series: Vec<_> =
        scrape.lines().filter(|line| line.starts_with("observer_accept_queue_accepts_total{")).collect();
    let count = |line: &&str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
    assert_eq!(series.len(), 201, "{series:#?}");
    assert!(series[200].contains("listener=\"other\"") && count(&series[200]) > 0.0, "{}", series[200]);
    assert_eq!(series.iter().map(count).sum::<f64>(), f64::from(connections));
    observer.finish();
}

/// Clients that say nothing, half of something, too much, nonsense, or do not read what they asked for: whoever
/// scrapes meanwhile does not notice, and observer does not grow.
#[real_test(userspace)]
fn hostile_clients_do_no_harm() {
    let server = Server::nginx(1);
    let observer = observe(server.pid());
    let port = observer.port();
    ask_once(port, SCRAPE);
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
            // It hangs up, or takes no more.
            let _refused = connection.write_all(request.as_bytes());
            held.push(connection);
        }
        if round % 10 == 0 {
            let answer = ask_once(port, SCRAPE);
            assert!(answer.head.starts_with("http/1.1 200 "), "{}", answer.head);
        }
    }
    let grown = observer.memory().saturating_sub(before);
    eprintln!("{} hostile connections: {} KiB more", held.len(), grown >> 10);
    assert!(grown < MEMORY, "{grown} bytes more");
    // Those that it still has open are ended in time.
    let open = || {
        let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
        // State 01, established, at our port.
        sockets
            .lines()
            .filter(|line| line.contains(&format!("0100007F:{port:04X} 0100007F:")) && line.contains(" 01 "))
            .count()
    };
    wait_for("the connections to end", || (open() == 0).then_some(()));
    observer.finish();
}

/// So many scrapes a second, for so long, while a server takes all the machine has: none fails, nothing grows.
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
    // With everything in place that lasts.
    let warm = Instant::now() + Duration::from_secs(3);
    while Instant::now() < warm {
        ask_once(observer.port(), SCRAPE);
    }
    let before = observer.memory();
    let (start, again) = (Instant::now(), AtomicU64::new(0));
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (again, port) = (&again, observer.port());
            scope.spawn(move || {
                let mut connection = BufReader::new(http::connect(port));
                for n in (client..rate * seconds).step_by(usize::try_from(CLIENTS).unwrap()) {
                    let due = start
                        + Duration::from_secs(1) * u32::try_from(n).unwrap() / u32::try_from(rate).unwrap();
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    // A connection may end while it is idle; every client takes a new one then.
                    let answer = ask(&mut connection, SCRAPE).unwrap_or_else(|| {
                        again.fetch_add(1, Ordering::Relaxed);
                        connection = BufReader::new(http::connect(port));
                        ask(&mut connection, SCRAPE).expect("an answer")
                    });
                    assert!(
                        answer.head.starts_with("http/1.1 200 ") && !answer.body.is_empty(),
                        "{}",
                        answer.head
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
        CLIENTS + again.into_inner(),
        grown >> 10
    );
    load.wait().unwrap();
    observer.finish().assert_complete();
    assert!(grown < MEMORY, "{grown} bytes more");
    #[expect(clippy::cast_precision_loss, reason = "seconds")]
    let limit = 1.5 * seconds as f64;
    assert!(took < limit, "{scrapes} scrapes took {took} s");
}

/// How long; as long as one likes by hand.
fn seconds() -> u64 {
    std::env::var("OBSERVER_TEST_SCRAPE_SECONDS").map_or(5, |seconds| seconds.parse().unwrap())
}
