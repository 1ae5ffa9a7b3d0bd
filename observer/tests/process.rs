//! The process probe: existing and later children, exits, and the exit of the last target.

use std::process::{Command, Stdio};

use crate::support::{
    Process, http,
    interactive::Interactive,
    observer::Observer,
    send,
    servers::{Server, children},
    wait_for,
};
use nix::sys::signal::Signal;

#[real_test]
fn workers_of_an_nginx_master_are_targets() {
    let server = Server::nginx(2);
    let workers = children(server.pid());
    let report = Observer::attach(server.pid()).finish();
    for worker in workers {
        assert_eq!(report.target(worker)["comm"], "nginx");
        report.reactor(worker);
    }
}

/// nginx replaces its worker on SIGHUP, so the new one is forked while observer runs.
#[real_test(contract)]
fn child_forked_later_is_followed() {
    let server = Server::nginx(1);
    let first = children(server.pid());
    let observer = Observer::attach(server.pid());
    server.process.signal(Signal::SIGHUP);
    let second = wait_for("a new worker", || {
        let now = children(server.pid());
        (!now.is_empty() && now.iter().all(|pid| !first.contains(pid))).then(|| now[0])
    });
    http::get(server.port, "/");
    let report = observer.finish();
    assert_eq!(report.target(first[0])["exited"], true);
    assert_eq!(report.target(second)["exited"], false);
    assert!(report.reactor(second)["slices"].as_u64().unwrap() > 0);
    assert_eq!(report.listener(server.port)["accepts"], 1);
}

#[real_test]
fn no_follow_excludes_children() {
    let server = Server::nginx(1);
    let report =
        Observer::start(&["--pid", &server.pid().to_string(), "--no-follow", "--no-listen"]).finish();
    assert_eq!(report.0["targets"].as_array().unwrap().len(), 1);
    report.target(server.pid());
}

/// Two targets at once have separate counts.
#[real_test]
fn several_pids_have_separate_counts() {
    let (asyncio, redis) = (Server::asyncio(), Server::redis());
    let arguments = ["--pid", &asyncio.pid().to_string(), "--pid", &redis.pid().to_string(), "--no-listen"];
    let observer = Observer::start(&arguments);
    http::get(asyncio.port, "/");
    drop(http::connect(redis.port));
    redis.redis_accepts();
    let report = observer.finish();
    assert_eq!(report.listener(asyncio.port)["accepts"], 1);
    assert_eq!(report.listener(redis.port)["accepts"], 2);
}

/// observer ends when no target is left, and reports those that have exited.
#[real_test]
fn exit_of_the_last_target_ends_observer() {
    let server = Server::asyncio();
    let observer = Observer::attach(server.pid());
    http::get(server.port, "/");
    send(server.pid(), Signal::SIGKILL);
    let report = observer.report();
    assert_eq!(report.target(server.pid())["exited"], true);
    assert!(report.reactor(server.pid())["slices"].as_u64().unwrap() > 0);
    assert_eq!(report.listener(server.port)["accepts"], 1);
}

/// Hundreds of short-lived children are followed, and no entries of them stay.
#[real_test]
fn fork_storm_loses_no_exit() {
    const FORKS: usize = 500;
    let files = tempfile::tempdir().unwrap();
    let (start, end) = (files.path().join("start"), files.path().join("end"));
    let script = format!(
        "until [ -e {start} ]; do sleep 0.1; done; for n in $(seq {FORKS}); do (:); done; touch {end}; read never",
        start = start.display(),
        end = end.display()
    );
    let storm = Process(Command::new("sh").args(["-c", &script]).stdin(Stdio::piped()).spawn().unwrap());
    let observer = Observer::attach(storm.pid());
    std::fs::write(&start, "").unwrap();
    wait_for("the end of the storm", || end.exists().then_some(()));
    let report = observer.finish();
    report.assert_complete();
    let exited = report.0["targets"].as_array().unwrap().iter().filter(|t| t["exited"] == true).count();
    assert!(exited >= FORKS, "{exited} exits seen");
}

/// A server that daemonizes: the process that opened the listener has exited, but the listener is still open.
#[real_test]
fn inherited_listener_belongs_to_the_child() {
    let script = "import os, socket, time\n\
        s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()\n\
        child = os.fork()\n\
        if child: print(child, flush=True); os._exit(0)\n\
        time.sleep(60)";
    let mut parent = Interactive::python(script);
    let port = parent.next_line().parse().unwrap();
    let observer = Observer::attach(parent.pid());
    let child: u32 = parent.request("").parse().unwrap();
    parent.process.0.wait().unwrap();
    let _waiting = http::connect(port);
    let report = observer.finish();
    send(child, Signal::SIGKILL);
    assert_eq!(report.target(parent.pid())["exited"], true);
    let listeners = report.target(child)["listeners"].as_array().unwrap();
    assert_eq!(listeners.len(), 1, "{:#}", report.0);
    assert_eq!(listeners[0]["depth"], 1);
    assert_eq!(listeners[0]["closed"], false);
}
