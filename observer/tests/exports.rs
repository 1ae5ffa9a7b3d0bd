//! Outputs: the scrape, the JSON report and the text report have the same values.

use std::process::Command;

use crate::support::{
    http, is_emulated,
    observer::{BINARY, Observer},
    servers::Server,
};

/// Value of the only series with this name and these labels.
fn series(scrape: &str, name: &str, labels: &[&str]) -> f64 {
    let found: Vec<&str> = scrape
        .lines()
        .filter(|line| {
            line.starts_with(&format!("{name}{{")) && labels.iter().all(|label| line.contains(label))
        })
        .collect();
    assert_eq!(found.len(), 1, "{name} with {labels:?} in {scrape}");
    found[0].rsplit(' ').next().unwrap().parse().unwrap()
}

#[real_test(userspace)]
fn scrape_and_report_agree() {
    let server = Server::asyncio();
    let observer = Observer::start(&["--pid", &server.pid().to_string(), "--listen", "127.0.0.1:0"]);
    for _ in 0..5 {
        server.block("sleep", 100);
    }
    let scrape = observer.scrape();
    let report = observer.finish();
    let (listener, reactor) = (report.listener(server.port), report.reactor(server.pid()));

    let address = format!("listener=\"127.0.0.1:{}\"", server.port);
    assert_eq!(series(&scrape, "observer_accept_queue_accepts_total", &[&address]), 5.0);
    assert_eq!(listener["accepts"], 5);
    assert_eq!(series(&scrape, "observer_accept_queue_wait_seconds_count", &[&address]), 5.0);
    assert_eq!(
        series(&scrape, "observer_accept_queue_limit", &[&address]),
        listener["limit"].as_f64().unwrap()
    );

    let pid = format!("pid=\"{}\"", server.pid());
    let slices =
        |le: &str| series(&scrape, "observer_reactor_slice_seconds_bucket", &[&pid, &format!("le=\"{le}\"")]);
    // An emulated machine takes longer for the work around the sleep.
    let longest = if is_emulated() { "1.073741824" } else { "0.134217728" };
    assert_eq!(slices(longest) - slices("0.067108864"), 5.0);
    assert_eq!(slices("+Inf"), series(&scrape, "observer_reactor_slice_seconds_count", &[&pid]));
    assert!(series(&scrape, "observer_reactor_slice_seconds_sum", &[&pid]) >= 0.5);
    assert!(reactor["slice"]["sum"].as_f64().unwrap() >= 0.5);
    assert_eq!(series(&scrape, "observer_self_lost_total", &["cause=\"reactors_full\""]), 0.0);
}

/// With the highest resolution, the scrape has the same bounds of buckets as the report.
#[real_test(userspace)]
fn resolution_flag_sets_the_buckets_of_a_scrape() {
    let server = Server::asyncio();
    let pid = server.pid().to_string();
    let observer = Observer::start(&["--pid", &pid, "--listen", "127.0.0.1:0", "--resolution", "8"]);
    server.block("sleep", 100);
    let scrape = observer.scrape();
    let report = observer.finish();
    let bucket = format!("observer_reactor_slice_seconds_bucket{{pid=\"{pid}\"");
    let bounds: Vec<f64> = scrape
        .lines()
        .filter(|line| line.starts_with(&bucket) && !line.contains("+Inf"))
        .map(|line| line.split("le=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap())
        .collect();
    let reported = report.reactor(server.pid())["slice"]["buckets"].as_array().unwrap().clone();
    assert!(bounds.len() > 200, "{bounds:?}");
    for bucket in reported {
        assert!(bounds.contains(&bucket[0].as_f64().unwrap()), "{bucket} is not among {bounds:?}");
    }
}

/// Each metric has one HELP and one TYPE line, and no series appears twice.
#[real_test(userspace)]
fn scrape_is_well_formed() {
    let server = Server::nginx(2);
    let observer = Observer::start(&["--pid", &server.pid().to_string(), "--listen", "127.0.0.1:0"]);
    http::get(server.port, "/");
    let scrape = observer.scrape();
    observer.finish();
    let mut seen = std::collections::HashSet::new();
    for line in scrape.lines() {
        let key = if line.starts_with('#') { line } else { line.rsplit_once(' ').unwrap().0 };
        assert!(seen.insert(key), "{key} twice");
    }
    assert!(scrape.contains("# TYPE observer_reactor_slice_seconds histogram"), "{scrape}");
    assert!(scrape.contains("# TYPE observer_accept_queue_accepts_total counter"), "{scrape}");
}

/// The demo shows the problems that it announces.
#[real_test(alone, userspace)]
fn demo_reports_its_spins_sleeps_and_waits() {
    let output = Command::new(BINARY)
        .args(["demo", "--duration", "5s", "--no-listen", "--format", "json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = crate::support::observer::Report(serde_json::from_slice(&output.stdout).unwrap());
    report.assert_complete();
    let target = &report.0["targets"][0];
    let reactor = &target["reactors"][0];
    assert_eq!(reactor["name"], "reactor");
    // Each occurs once a second, and the first and the last may be missed. An emulated machine takes longer than five
    // seconds.
    let seconds = report.0["duration_seconds"].as_f64().unwrap();
    assert!(seconds >= 5.0, "{seconds} s");
    // On an emulated machine, other work sometimes takes as long.
    let expected = seconds - 2.0..=seconds + if is_emulated() { 3.0 } else { 1.0 };
    let spins = crate::support::observer::count_between(&reactor["slice"], 0.075_497_472, 0.117_440_512);
    let sleeps = crate::support::observer::count_between(&reactor["slice"], 0.117_440_512, f64::MAX);
    assert!(expected.contains(&(spins as f64)), "{spins} spins in {seconds} s: {reactor:#}");
    assert!(expected.contains(&(sleeps as f64)), "{sleeps} sleeps in {seconds} s: {reactor:#}");
    let waits: Vec<f64> =
        target["listeners"].as_array().unwrap().iter().map(|l| l["wait"]["max"].as_f64().unwrap()).collect();
    assert_eq!(waits.len(), 2);
    // The last of ten connections waits for nine pauses of 40 ms.
    assert!(waits.iter().any(|&wait| wait > 0.25), "{waits:?}");
}

/// The first line of a report says whether a loop is late, and where the time went.
#[real_test(userspace)]
fn text_report_names_the_late_loop() {
    let server = Server::asyncio();
    let pid = server.pid().to_string();
    let mut observer = Command::new(BINARY)
        // Without profiles: attaching to runtimes takes seconds on an emulated machine, and stalls are not sampled
        // meanwhile.
        .args(["--pid", &pid, "--no-listen", "--duration", "2s", "--profile", "none"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    while observer.try_wait().unwrap().is_none() {
        server.sleep_while_asked(300);
    }
    let output = observer.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines().skip(2);
    let first = lines.next().unwrap();
    assert!(first.starts_with("LATE: event loop python3"), "{text}");
    // It names the function that slept.
    assert!(first.contains(" % in block (servers/asyncio_server.py:"), "{text}");
    // The finding goes on in the indented lines.
    let details: Vec<_> = lines.take_while(|line| line.starts_with("      ")).collect();
    let has = |parts: [&str; 2]| details.iter().any(|line| parts.iter().all(|part| line.contains(part)));
    assert!(has(["% of the lag: ", " in block ("]) && has(["busy time: ", "% asleep"]), "{text}");
}
