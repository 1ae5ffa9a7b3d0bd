//! Processes that serve one connection at a time: they are reported as a group of workers, and that they are busy keeps
//! nobody waiting.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::support::{
    http,
    interactive::Interactive,
    observer::{Observer, Report},
    servers::children,
    wait_for,
};

/// Number of planted stalls, and the length of each in milliseconds.
const STALLS: usize = 24;
const STALL: &str = "150\n";

/// How long all workers wait for their clients: three times the stall threshold.
const HELD: Duration = Duration::from_millis(150);

/// `workers.py`.
struct Server {
    program: Interactive,
    port: u16,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/workers.py");
        let mut command = Command::new("/usr/bin/python3");
        let mut program = Interactive::start(command.arg(script).args(arguments));
        let port = program.next_line().trim().parse().unwrap();
        Self { program, port }
    }

    fn observe(&self) -> Observer {
        Observer::start(&["--pid", &self.program.pid().to_string(), "--listen", "127.0.0.1:0"])
    }

    fn connect(&self) -> Client {
        Client(BufReader::new(http::connect(self.port)))
    }

    /// Has so many clients at once block a worker each, in turns of one connection after another.
    fn stall(&self, clients: usize) {
        thread::scope(|scope| {
            for _ in 0..clients {
                scope.spawn(|| (0..STALLS / clients).for_each(|_| self.connect().stall()));
            }
        });
    }
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn stall(&mut self) {
        self.0.get_mut().write_all(STALL.as_bytes()).unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        assert_eq!(answer, "done\n");
    }
}

/// The only group of workers of a report.
#[track_caller]
fn only_group(report: &Report) -> &Value {
    report.assert_complete();
    let groups = report.0["workers"].as_array().unwrap();
    assert_eq!(groups.len(), 1, "{groups:#?}");
    &groups[0]
}

/// Event loops of all targets that are not workers and have had a stall.
fn stalled_loops(report: &Report) -> usize {
    let targets = report.0["targets"].as_array().unwrap().iter();
    let loops = targets.flat_map(|target| target["reactors"].as_array().unwrap());
    loops.filter(|reactor| reactor["is_worker"] == false && reactor["stalls"]["count"] != 0).count()
}

/// Asserts that each planted stall is counted once, and besides so many of workers that waited for their clients.
#[track_caller]
fn assert_stalls(group: &Value, of_clients: usize) {
    let of_cause = |cause: &str| {
        let recent = group["stalls"]["recent"].as_array().unwrap().iter();
        recent.filter(|stall| stall["cause"] == cause).count()
    };
    assert_eq!(group["stalls"]["count"], STALLS + of_clients, "{group:#}");
    assert_eq!((of_cause("sleep"), of_cause("network")), (STALLS, of_clients), "{group:#}");
}

/// Like uWSGI: three of four workers are busy, and each connection finds the fourth.
#[real_test]
fn workers_that_share_a_listener_are_a_group() {
    let server = Server::start(&["listener", "4"]);
    let observer = server.observe();
    server.stall(3);
    // Workers that are idle until then are known by their first slice.
    let held: Vec<_> = (0..4).map(|_| server.connect()).collect();
    let are_busy = |workers| (observer.metric("observer_workers_busy") == workers).then_some(());
    wait_for("all workers to be busy", || are_busy(4.0));
    // The last one may have become busy just now.
    thread::sleep(HELD);
    drop(held);
    wait_for("all workers to be idle", || are_busy(0.0));
    let report = observer.finish();
    let group = only_group(&report);
    assert_eq!(group["parent"], server.program.pid(), "{group:#}");
    assert_eq!((&group["running"], &group["exited"]), (&4.into(), &0.into()), "{group:#}");
    assert_stalls(group, 4);
    assert_eq!(stalled_loops(&report), 0, "{:#}", report.0["targets"]);
    assert_eq!(report.listener(server.port)["accepts"], STALLS + 4);
}

/// Like PostgreSQL.
#[real_test]
fn processes_of_one_connection_each_are_a_group() {
    const CLIENTS: usize = 6;
    let server = Server::start(&["connection"]);
    let observer = server.observe();
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| server.connect()).collect();
    wait_for("all workers", || (children(server.program.pid()).len() == CLIENTS).then_some(()));
    thread::scope(|scope| {
        for client in &mut clients {
            scope.spawn(|| (0..STALLS / CLIENTS).for_each(|_| client.stall()));
        }
    });
    assert_eq!(observer.metric("observer_workers"), CLIENTS as f64);
    drop(clients);
    wait_for("the workers to exit", || children(server.program.pid()).is_empty().then_some(()));
    let report = observer.finish();
    let group = only_group(&report);
    assert_eq!((&group["running"], &group["exited"]), (&0.into(), &CLIENTS.into()), "{group:#}");
    assert_stalls(group, 0);
    assert_eq!(stalled_loops(&report), 0, "{:#}", report.0["targets"]);
}

/// A server of one process that has no connections waits like a worker. It is an event loop.
#[real_test]
fn a_single_process_is_no_group() {
    let server = Server::start(&["listener", "1"]);
    let observer = server.observe();
    server.stall(1);
    let report = observer.finish();
    assert_eq!(report.0["workers"], Value::Array(Vec::new()));
    assert_eq!(stalled_loops(&report), 1, "{:#}", report.0["targets"]);
}
