//! What changes under a machine that runs on: its wall clock is set, a processor goes and comes back. Both are done on
//! machines of our own only.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::harness::skip;
use crate::support::{http, observer::Observer, servers::Server};

/// Known operations.
const CONNECTIONS: u64 = 23;

/// Sets the wall clock by so many seconds.
fn step(seconds: i64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().cast_signed();
    let then = format!("@{}", now + seconds);
    let status = Command::new("busybox").args(["date", "-s", &then]).stdout(Stdio::null()).status().unwrap();
    assert!(status.success());
}

/// An hour forward in the middle of a stall, and back in the middle of the next: all durations are what they were.
#[real_test(guest_only("the clock of this machine is others' too"))]
fn a_clock_that_is_set_changes_no_duration() {
    let server = Server::asyncio();
    let observer = Observer::of(server.pid());
    let mut longest = 0.0_f64;
    for hour in [3_600, -3_600] {
        thread::scope(|scope| {
            let block = scope.spawn(|| server.block("sleep", 400));
            thread::sleep(Duration::from_millis(200));
            step(hour);
            longest = longest.max(block.join().unwrap()["wall"].as_f64().unwrap());
        });
    }
    let report = observer.finish();
    report.assert_complete();
    let reactor = report.reactor(server.pid());
    assert_eq!(reactor["stalls"]["count"], 2, "{reactor:#}");
    for figure in ["slice", "lag"] {
        let most = reactor[figure]["max"].as_f64().unwrap();
        assert!(
            (0.39..longest + 0.2).contains(&most),
            "{figure}: {most}, {longest} by the server's own clock"
        );
    }
    let waits = &report.listener(server.port)["wait"];
    assert_eq!(waits["count"], 2, "{waits:#}");
    assert!(waits["max"].as_f64().unwrap() < 60.0, "{waits:#}");
    assert!(report.0["duration_seconds"].as_f64().unwrap() < 600.0);
}

/// A processor that goes takes nothing with it, and what happens on it when it is back is seen.
#[real_test(guest_only("the processors of this machine are others' too"))]
fn a_processor_may_go_and_come_back() {
    let switch = Path::new("/sys/devices/system/cpu/cpu1/online");
    if !switch.exists() {
        skip("this machine has one processor, or none that can go");
    }
    let server = Server::nginx(2);
    let before = server.nginx_accepts_of_all();
    let observer = Observer::of(server.pid());
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
