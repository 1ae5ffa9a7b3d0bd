//! observer scraped by a real Prometheus: its metrics, the queries of the dashboards, and the rules.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufReader, Write as _},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::support::{
    acceptor::Acceptor,
    deferred::{DeferringServer, send_request},
    example, http,
    interactive::Interactive,
    observer::Observer,
    prometheus::{Prometheus, RANGE, dashboards},
    servers::Server,
    wait_for,
};

#[track_caller]
fn promtool(arguments: &[&str], input: &str) -> String {
    let mut tool = Command::new("promtool")
        .args(arguments)
        .current_dir(dashboards())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed");
    tool.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = tool.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {arguments:?}: {log}");
    log
}

#[real_test(host_only("guests have no Prometheus"))]
fn promtool_accepts_metrics_and_rules() {
    let server = Server::asyncio();
    let observer = Observer::start(&["--pid", &server.pid().to_string(), "--listen", "127.0.0.1:0"]);
    server.block("sleep", 60);
    let scrape = observer.scrape();
    observer.finish();
    assert_eq!(promtool(&["check", "metrics"], &scrape), "");
    assert!(promtool(&["check", "rules", "rules.yml"], "").contains("SUCCESS"));
    assert!(promtool(&["test", "rules", "rules.test.yml"], "").contains("SUCCESS"));
}

/// A load that blocks a server for a number of milliseconds at a time, with pauses of the same length. During long
/// blocks, another client waits.
struct Load<'s> {
    server: &'s Server,
    milliseconds: AtomicU32,
    is_over: AtomicBool,
}

impl<'s> Load<'s> {
    fn on(server: &'s Server) -> Self {
        Self { server, milliseconds: 20.into(), is_over: false.into() }
    }

    fn run(&self) {
        while !self.is_over.load(Ordering::Relaxed) {
            let milliseconds = self.milliseconds.load(Ordering::Relaxed);
            if milliseconds < 100 {
                self.server.block("sleep", milliseconds);
            } else {
                self.server.sleep_while_asked(milliseconds);
            }
            thread::sleep(Duration::from_millis(milliseconds.into()));
        }
    }
}

/// Sends a few jobs per second, each of which defers tasks.
fn send_jobs(server: &DeferringServer, is_over: &AtomicBool) {
    for job in 0.. {
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        let mut connection = BufReader::new(http::connect(server.port));
        send_request(&mut connection, &format!("/job/{job}"));
        thread::sleep(Duration::from_millis(250));
    }
}

/// A program with a custom library for deferred tasks; see `servers/scripted_library.rs`.
struct Library(Interactive);

impl Library {
    /// Flags that describe its functions to observer.
    const HOOKS: [&str; 6] = [
        "--snapshot",
        "scripted_library:task_submit:arg0",
        "--restore",
        "scripted_library:task_execute:arg0",
        "--forget",
        "scripted_library:task_free:arg0",
    ];

    fn start() -> Self {
        let mut library = Interactive::start(&mut Command::new(example("scripted_library")));
        assert_eq!(library.next_line(), "ready");
        Self(library)
    }

    #[track_caller]
    fn request(&mut self, command: &str) {
        assert_eq!(self.0.request(command), "ok");
    }
}

/// Ends a load when it is dropped, because the scope of its thread waits for it.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A query of a panel.
struct Query {
    panel: String,
    unit: String,
    expression: String,
}

fn queries() -> Vec<Query> {
    let files = fs::read_dir(dashboards()).unwrap().map(|entry| entry.unwrap().path());
    let mut queries = Vec::new();
    for file in files.filter(|file| file.extension().is_some_and(|end| end == "json")) {
        let dashboard: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        let variables = dashboard["templating"]["list"].as_array().unwrap();
        for panel in dashboard["panels"].as_array().unwrap() {
            // Rows and text panels have none.
            for target in panel["targets"].as_array().into_iter().flatten() {
                let mut expression = target["expr"].as_str().unwrap().replace("$__rate_interval", RANGE);
                for variable in variables {
                    let name = variable["name"].as_str().unwrap();
                    let value = if name == "job" { "observer" } else { ".*" };
                    expression = expression.replace(&format!("\"${name}\""), &format!("\"{value}\""));
                }
                assert!(!expression.contains('$'), "{expression}");
                let text = |value: &Value| value.as_str().unwrap().to_owned();
                let panel_title = format!("{}: {}", text(&dashboard["title"]), text(&panel["title"]));
                let legend = text(&target["legendFormat"]);
                queries.push(Query {
                    panel: format!("{panel_title}: {legend}"),
                    unit: text(&panel["fieldConfig"]["defaults"]["unit"]),
                    expression,
                });
            }
        }
    }
    queries
}

/// The loop blocks for about 20 of every 40 ms and does nothing else. The loop of a second process is mostly idle and
/// defers a few tasks. Each value must have the order of magnitude that follows from this, in the unit of its panel.
#[real_test(host_only("guests have no Prometheus"))]
#[expect(clippy::too_many_lines, reason = "one scenario against one Prometheus")]
fn every_panel_and_rule_has_data_in_its_unit() {
    let server = Server::asyncio();
    let deferring = DeferringServer::script("/usr/bin/python3", "deferred_asyncio.py");
    let pids = [server.pid(), deferring.pid()].map(|pid| pid.to_string());
    let observer = Observer::start(&["--pid", &pids[0], "--pid", &pids[1], "--listen", "127.0.0.1:0"]);
    let prometheus = Prometheus::scraping(&[observer.port()]);
    let load = Load::on(&server);
    let (queries, mut values) = (queries(), BTreeMap::new());
    thread::scope(|scope| {
        let _end = StopOnDrop(&load.is_over);
        scope.spawn(|| load.run());
        scope.spawn(|| send_jobs(&deferring, &load.is_over));
        // Until all samples in the range were taken under load.
        thread::sleep(Duration::from_secs(12));
        for query in &queries {
            let result = wait_for(&format!("data for {}: {}", query.panel, query.expression), || {
                let result = prometheus.query(&query.expression);
                (!result.is_empty() && result.iter().all(|(_, value)| value.is_finite())).then_some(result)
            });
            let most = match query.unit.as_str() {
                "percentunit" => 1.0,
                // Tasks that wait for 200 ms on purpose. Buckets are powers of two, and a load that starts may be late.
                "s" if query.panel.contains("Deferred") => 0.6,
                // Nothing here takes longer.
                "s" => 0.2,
                // 25 requests a second, with one connection and a few events each.
                "cps" => 500.0,
                "cpm" => 60.0 * 50.0,
                "short" => 4096.0,
                other => panic!("{} has the unit {other}", query.panel),
            };
            for (labels, value) in &result {
                assert!((0.0..=most).contains(value), "{} is {value} of {labels}", query.panel);
            }
            values.insert(query.panel.clone(), result[0].1);
        }
        let rules = fs::read_to_string(dashboards().join("rules.yml")).unwrap();
        let recorded: Vec<_> =
            rules.lines().filter_map(|line| line.trim().strip_prefix("- record: ")).collect();
        assert!(recorded.len() >= 5, "{recorded:?}");
        for rule in recorded {
            let result = wait_for(rule, || Some(prometheus.query(rule)).filter(|result| !result.is_empty()));
            for (labels, value) in &result {
                let most = if rule.contains(":ratio") {
                    1.0
                } else if rule.starts_with("task:") {
                    0.6
                } else {
                    0.2
                };
                assert!((0.0..=most).contains(value), "{rule} is {value} of {labels}");
            }
        }
        assert_eq!(prometheus.firing(), Vec::<String>::new());
    });
    observer.finish();
    let value_of = |panel: &str| {
        let found: Vec<_> = values.iter().filter(|(name, _)| name.starts_with(panel)).collect();
        assert_eq!(found.len(), 1, "{panel} in {values:#?}");
        *found[0].1
    };
    let between = |panel: &str, least: f64, most: f64| {
        let value = value_of(panel);
        assert!((least..=most).contains(&value), "{panel} is {value}");
    };
    // Half of all instants are in a block with 0 to 20 ms left: 5 ms on average. Buckets are powers of two.
    between("observer / Event loops: Lag: p99", 0.010, 0.080);
    // The mostly idle loop counts with the same weight.
    between("observer / Event loops: Lag: mean", 0.001, 0.020);
    between("observer / Event loops: Slices: p99", 0.016, 0.080);
    between("observer / Event loops: Utilisation by loop", 0.25, 0.75);
    between("observer / Fleet: Utilisation", 0.25, 0.75);
    between("observer / Fleet: Lag, 99th percentile", 0.010, 0.080);
    between("observer / Accept queue: Arrivals and accepts: accepts", 10.0, 40.0);
    between("observer / Accept queue: Overflows, drops and aborts: overflows", 0.0, 0.0);
    // Four jobs a second with fifteen tasks each, and the tasks of asyncio itself.
    between("observer / Deferred tasks: Enqueued, started and finished tasks: started", 30.0, 400.0);
    between("observer / Deferred tasks: Enqueued, started and finished tasks: finished", 30.0, 400.0);
    between("observer / Deferred tasks: Started tasks by kind", 4.0, 400.0);
    between("observer / Fleet: Started deferred tasks", 30.0, 400.0);
    eprintln!("{values:#?}");
}

/// Creates the condition of each alert, waits until it fires, removes the condition and waits until it resolves.
#[real_test(host_only("guests have no Prometheus"))]
#[expect(clippy::too_many_lines, reason = "one scenario against one Prometheus")]
fn every_alert_fires_and_resolves() {
    let server = Server::asyncio();
    let mut library = Library::start();
    let mut acceptor = Acceptor::in_own_namespace(8);
    // More listeners than the capacity of observer.
    let mut crowd = Acceptor::group(40);
    let start = |pids: &[u32], more: &[&'static str]| {
        let pids: Vec<_> = pids.iter().map(u32::to_string).collect();
        let mut arguments = [&["--listen", "127.0.0.1:0"], more].concat();
        arguments.extend(pids.iter().flat_map(|pid| ["--pid", pid]));
        Observer::start(&arguments)
    };
    let observer = start(&[server.pid(), acceptor.pid(), library.0.pid()], &Library::HOOKS);
    let crowded = start(&[crowd.pid()], &["--capacity", "16"]);
    let prometheus = Prometheus::scraping(&[observer.port(), crowded.port()]);
    let mut fired = Vec::new();
    let mut fires = |what: &str| {
        wait_for(&format!("{what} to fire"), || {
            prometheus.firing().iter().any(|name| name == what).then_some(())
        });
        fired.push(what.to_owned());
    };
    let resolves = |what: &str| {
        wait_for(&format!("{what} to end"), || {
            let firing = prometheus.firing();
            (!firing.iter().any(|name| name == what)).then_some(())
        });
    };
    assert_eq!(prometheus.firing(), Vec::<String>::new());

    acceptor.request("connect 50");
    for alert in ["ObserverAcceptQueueOverflow", "ObserverAcceptQueueOverflowing", "ObserverConnectionWaits"]
    {
        fires(alert);
    }
    acceptor.request("reset");
    for alert in ["ObserverAcceptQueueOverflow", "ObserverAcceptQueueOverflowing", "ObserverConnectionWaits"]
    {
        resolves(alert);
    }

    let load = Load::on(&server);
    load.milliseconds.store(300, Ordering::Relaxed);
    thread::scope(|scope| {
        let _end = StopOnDrop(&load.is_over);
        scope.spawn(|| load.run());
        fires("ObserverLoopLate");
    });
    resolves("ObserverLoopLate");

    library.request("unmatched 1000");
    fires("ObserverDeferredNeverMatches");
    for _ in 0..50 {
        library.request("submit 1");
        library.request("execute 1");
    }
    resolves("ObserverDeferredNeverMatches");
    library.request("submit 5");
    library.request("drop 5");
    fires("ObserverDeferredOrphans");
    resolves("ObserverDeferredOrphans");
    library.request("submit 1");
    fires("ObserverDeferredStuck");
    library.request("execute 1");
    resolves("ObserverDeferredStuck");

    crowd.request("close");
    crowd.request("listen");
    fires("ObserverLosesEvents");
    resolves("ObserverLosesEvents");
    assert_eq!(prometheus.firing(), Vec::<String>::new());
    observer.finish();
    crowded.finish();

    let rules = fs::read_to_string(dashboards().join("rules.yml")).unwrap();
    let alerts = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    for alert in alerts {
        assert!(fired.iter().any(|name| name == alert), "{alert} is not tested");
    }
}
