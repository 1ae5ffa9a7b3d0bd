//! Changes to a running machine: its wall clock is set, and a CPU goes offline and online again. These tests run only
//! in guests.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::harness::skip;
use crate::support::{http, observer::Observer, servers::Server};

/// Number of connections of a test.
const CONNECTIONS: u64 = 23;

/// Moves the wall clock by this number of seconds.
fn step_clock(seconds: i64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().cast_signed();
    let then = format!("@{}", now + seconds);
    let status = Command::new("busybox").args(["date", "-s", &then]).stdout(Stdio::null()).status().unwrap();
    assert!(status.success());
}

/// Sets the clock an hour forward during one stall, and back during the next. Durations must not change.
#[real_test(guest_only("it sets the clock of the machine"))]
fn setting_the_wall_clock_changes_no_duration() {
    let server = Server::asyncio();
    let observer = Observer::attach(server.pid());
    let mut longest = 0.0_f64;
    for hour in [3_600, -3_600] {
        thread::scope(|scope| {
            let block = scope.spawn(|| server.block("sleep", 400));
            thread::sleep(Duration::from_millis(200));
            step_clock(hour);
            longest = longest.max(block.join().unwrap()["wall"].as_f64().unwrap());
        });
    }
    let report = observer.finish();
    report.assert_complete();
    let reactor = report.reactor(server.pid());
    assert_eq!(reactor["stalls"]["count"], 2, "{reactor:#}");
    for field in ["slice", "lag"] {
        let most = reactor[field]["max"].as_f64().unwrap();
        assert!(
            (0.39..longest + 0.2).contains(&most),
            "{field}: {most}, {longest} by the server's own clock"
        );
    }
    let waits = &report.listener(server.port)["wait"];
    assert_eq!(waits["count"], 2, "{waits:#}");
    assert!(waits["max"].as_f64().unwrap() < 60.0, "{waits:#}");
    assert!(report.0["duration_seconds"].as_f64().unwrap() < 600.0);
}

/// No counts are lost when a CPU goes offline, and events on it are observed when it is online again.
#[real_test(guest_only("it takes a CPU of the machine offline"))]
fn cpu_hotplug_loses_no_events() {
    let switch = Path::new("/sys/devices/system/cpu/cpu1/online");
    if !switch.exists() {
        skip("this machine has no CPU that can go offline");
    }
    let server = Server::nginx(2);
    let before = server.nginx_accepts_of_all();
    let observer = Observer::attach(server.pid());
    for state in ["0", "1", "0", "1"] {
        fs::write(switch, state).unwrap();
        for _ in 0..CONNECTIONS {
            http::get(server.port, "/");
        }
    }
    let accepts = server.nginx_accepts_of_all() - before;
    let report = observer.finish();
    report.assert_complete();
    let listener = report.listener(server.port);
    assert_eq!(listener["accepts"], accepts, "{listener:#}");
    assert_eq!(listener["wait"]["count"], accepts, "{listener:#}");
}
