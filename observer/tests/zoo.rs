//! The zoo: servers as people run them, each under light load. Nothing planted: no false alarm, and every connection is
//! counted. Then 20 planted stalls, which are counted and attributed. `servers/zoo/zoo.toml` describes the servers.
//! `cargo xtask test --zoo` installs all of them, and writes what was seen to `docs/servers.md`; the tests of a usual run
//! are those whose servers other tests need as well.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use procfs::process::Process as ProcessInfo;
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    harness::skip,
    support::{
        LIMIT, Process, http,
        observer::{Observer, Report},
        send,
        servers::{children, free_port},
        wait_for,
    },
};

/// Declares a test for each server: its name in `zoo.toml`, and the program that it needs.
macro_rules! zoo {
    ($({ $($name:ident $program:literal)* } are $declared:tt;)*) => {
        $($(zoo!(@test $declared $name $program);)*)*
    };
    (@test ($($declared:ident)*) $name:ident $program:literal) => {
        #[real_test($($declared,)* host_only("its servers are not in the guests"), programs(&[$program]))]
        fn $name() {
            check(stringify!($name));
        }
    };
}

zoo! {
    {
        gunicorn_gthread "python3"
        gunicorn_sync "python3"
        haproxy "haproxy"
        nginx "nginx"
        node "node"
        redis "redis-server"
    } are (quiet);
    {
        apache_event "apache2"
        apache_prefork "apache2"
        apache_worker "apache2"
        beanstalkd "beanstalkd"
        caddy "caddy"
        cherrypy "python3"
        daphne "python3"
        dnsmasq "dnsmasq"
        erlang "erl"
        etcd "etcd"
        go "go"
        gunicorn_gevent "python3"
        gunicorn_tornado "python3"
        h2o "h2o"
        http_server "python3"
        hypercorn "python3"
        lighttpd "lighttpd"
        memcached "memcached"
        mosquitto "mosquitto"
        nats "nats-server"
        nghttpx "nghttpx"
        node_cluster "node"
        pgbouncer "pgbouncer"
        postgresql "pg_ctlcluster"
        prometheus "prometheus"
        puma "puma"
        puma_cluster "puma"
        sslh_select "sslh-select"
        stunnel "stunnel4"
        thin "thin"
        tinyproxy "tinyproxy"
        tornado "python3"
        twisted_web "python3"
        unbound "unbound"
        unicorn "unicorn"
        uvicorn "python3"
        uwsgi "uwsgi_python3"
        uwsgi_http_router "uwsgi"
        varnish "varnishd"
        waitress "python3"
        wsgiref "python3"
    } are (full alone);
}

/// Connections of the quiet phase, and stalls of the planted one.
const CONNECTIONS: u64 = 40;
const STALLS: u64 = 20;

/// Length of a planted stall, and what counts as one: a server that is stopped by a signal may be asked a little later.
const STALL: Duration = Duration::from_millis(150);
const MOST_OF_STALL: f64 = 0.1;

/// Pause between two requests.
const PAUSE: Duration = Duration::from_millis(20);

/// A server as `zoo.toml` describes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    name: String,
    command: Vec<String>,
    send: Option<String>,
    stall: Option<String>,
    #[serde(default = "yes")]
    loops: bool,
    module: Option<String>,
    user: Option<String>,
    prepare: Option<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    files: BTreeMap<String, String>,
}

const fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct ZooFile {
    server: Vec<Description>,
}

fn folder() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers/zoo")
}

fn description(name: &str) -> Description {
    let file: ZooFile = toml::from_str(&fs::read_to_string(folder().join("zoo.toml")).unwrap()).unwrap();
    file.server.into_iter().find(|description| description.name == name).expect("described in zoo.toml")
}

/// A running server.
struct RunningServer {
    process: Process,
    port: u16,
    description: Description,
    _folder: TempDir,
}

impl RunningServer {
    fn start(description: Description) -> Self {
        let files = tempfile::tempdir().unwrap();
        fs::set_permissions(files.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let port = free_port();
        let fill = |text: &str| {
            let servers = folder();
            text.replace("{dir}", files.path().to_str().unwrap())
                .replace("{port}", &port.to_string())
                .replace("{servers}", servers.to_str().unwrap())
        };
        for (name, text) in &description.files {
            fs::write(files.path().join(name), fill(text)).unwrap();
        }
        if let Some(prepare) = &description.prepare {
            let mut shell = Command::new("sh");
            shell.arg("-c").arg(fill(prepare)).current_dir(files.path()).stdout(Stdio::null());
            assert!(shell.status().unwrap().success(), "{prepare}");
        }
        let words: Vec<_> = description.command.iter().map(|word| fill(word)).collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).current_dir(files.path()).process_group(0);
        command.envs(description.env.iter().map(|(name, value)| (name, fill(value))));
        if let Some(user) = &description.user {
            let user = nix::unistd::User::from_name(user).unwrap().expect("its package creates it");
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let server = Self { process: Process(child), port, description, _folder: files };
        wait_for("the server", || server.try_ask("/"));
        server
    }

    /// Sends a request on a new connection, and waits for the response.
    fn try_ask(&self, path: &str) -> Option<()> {
        let connection = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).ok()?;
        self.try_receive(self.try_send(connection, path)?)
    }

    fn try_send(&self, mut connection: TcpStream, path: &str) -> Option<TcpStream> {
        connection.set_read_timeout(Some(LIMIT)).unwrap();
        match &self.description.send {
            Some(words) => connection.write_all(words.as_bytes()).ok()?,
            None => {
                write!(connection, "GET {path} HTTP/1.1\r\nHost: zoo\r\nConnection: close\r\n\r\n").ok()?
            }
        }
        Some(connection)
    }

    fn try_receive(&self, mut connection: TcpStream) -> Option<()> {
        let has_answered = match self.description.send.as_deref() {
            Some("") => true,
            Some(_) => connection.read(&mut [0; 512]).ok()? > 0,
            None => {
                let mut response = Vec::new();
                connection.read_to_end(&mut response).ok()?;
                response.starts_with(b"HTTP/1.")
            }
        };
        has_answered.then_some(())
    }

    fn ask(&self, path: &str) {
        self.try_ask(path).unwrap_or_else(|| panic!("no response to {path}"));
    }

    /// Observes the server during a load.
    fn observe(&self, load: impl FnOnce()) -> Report {
        let observer = Observer::attach(self.process.pid());
        load();
        let report = observer.finish();
        report.assert_complete();
        report
    }

    /// All processes of the server.
    fn pids(&self) -> Vec<u32> {
        let mut pids = vec![self.process.pid()];
        let mut next = 0;
        while next < pids.len() {
            pids.extend(children(pids[next]));
            next += 1;
        }
        pids
    }

    /// Blocks the server for a while, in a handler or by a signal, while a client waits.
    fn stall(&self) {
        if let Some(path) = &self.description.stall {
            self.ask(path);
            return;
        }
        let pids = self.pids();
        pids.iter().for_each(|&pid| send(pid, Signal::SIGSTOP));
        for &pid in &pids {
            wait_for("the server to stop", || has_stopped(pid).then_some(()));
        }
        // The kernel completes the handshake.
        let connection = self.try_send(http::connect(self.port), "/").unwrap();
        thread::sleep(STALL);
        pids.iter().for_each(|&pid| send(pid, Signal::SIGCONT));
        self.try_receive(connection).expect("a response after the stop");
    }
}

impl Drop for RunningServer {
    fn drop(&mut self) {
        let group = Pid::from_raw(i32::try_from(self.process.pid()).unwrap());
        let _gone = killpg(group, Signal::SIGKILL);
    }
}

/// Whether all threads of a process are stopped.
fn has_stopped(pid: u32) -> bool {
    let threads = ProcessInfo::new(pid.cast_signed()).and_then(|process| process.tasks());
    threads.unwrap().flatten().filter_map(|thread| thread.stat().ok()).all(|stat| stat.state == 'T')
}

fn reactors(report: &Report) -> impl Iterator<Item = &Value> {
    let targets = report.0["targets"].as_array().unwrap().iter();
    targets.flat_map(|target| target["reactors"].as_array().unwrap())
}

/// The listener that clients connect to. Some servers listen on other ports as well.
fn listener(report: &Report, port: u16) -> &Value {
    let targets = report.0["targets"].as_array().unwrap().iter();
    let mut listeners = targets.flat_map(|target| target["listeners"].as_array().unwrap());
    let of_port = |listener: &&Value| listener["address"].as_str().unwrap().ends_with(&format!(":{port}"));
    listeners.find(|listener| of_port(listener) && listener["accepts"] != 0).expect("a listener")
}

/// Number of connections that waited for most of a stall.
fn held_up(listener: &Value) -> u64 {
    let buckets = listener["wait"]["buckets"].as_array().unwrap().iter();
    let below = buckets.filter(|bucket| bucket[0].as_f64().unwrap() <= MOST_OF_STALL);
    let below = below.map(|bucket| bucket[1].as_u64().unwrap()).max().unwrap_or(0);
    listener["wait"]["count"].as_u64().unwrap() - below
}

fn check(name: &str) {
    let description = description(name);
    if let Some(module) = &description.module {
        let import = Command::new("/usr/bin/python3").args(["-c", &format!("import {module}")]).output();
        if !import.unwrap().status.success() {
            skip(format!("Debian's Python has no module {module}"));
        }
    }
    let server = RunningServer::start(description);
    let quiet = server.observe(|| {
        for _ in 0..CONNECTIONS {
            server.ask("/");
            thread::sleep(PAUSE);
        }
    });
    assert_no_false_alarm(&quiet, server.port);
    let planted = server.observe(|| {
        for _ in 0..STALLS {
            server.stall();
            thread::sleep(PAUSE);
        }
    });
    let seen = stalls_seen(&planted, &server);
    // `cargo xtask test --zoo` makes a table of these.
    let rows = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/zoo");
    if rows.exists() {
        let row = format!("| {} | {} | {seen} |\n", name.replace('_', " "), what_is_known(&planted));
        fs::write(rows.join(name), row).unwrap();
    }
}

#[track_caller]
fn assert_no_false_alarm(report: &Report, port: u16) {
    for reactor in reactors(report) {
        assert_eq!(reactor["stalls"]["count"], 0, "{reactor:#}");
    }
    let listener = listener(report, port);
    assert_eq!(listener["accepts"], CONNECTIONS, "{listener:#}");
    assert_eq!(listener["drops"], 0, "{listener:#}");
    assert_eq!(held_up(listener), 0, "{listener:#}");
}

/// Checks that each planted stall was seen once. Returns where.
#[track_caller]
fn stalls_seen(report: &Report, server: &RunningServer) -> String {
    let count = |reactor: &Value| reactor["stalls"]["count"].as_u64().unwrap();
    let Some(_) = &server.description.stall else {
        // All processes were stopped, so every loop has stalled.
        let most = reactors(report).map(count).max();
        assert_eq!(most, server.description.loops.then_some(STALLS), "{:#}", report.0);
        let listener = listener(report, server.port);
        assert_eq!(held_up(listener), STALLS, "{listener:#}");
        return "20 of 20 stops, in the accept queue".to_owned()
            + if server.description.loops { " and the loops" } else { "" };
    };
    let total: u64 = reactors(report).map(count).sum();
    assert_eq!(total, if server.description.loops { STALLS } else { 0 }, "{:#}", report.0);
    if !server.description.loops {
        return "the handler blocks no event loop".into();
    }
    let mut causes: Vec<_> = reactors(report)
        .flat_map(|reactor| reactor["stalls"]["sites"].as_array().unwrap())
        .map(|site| site["cause"].as_str().unwrap())
        .collect();
    causes.sort_unstable();
    causes.dedup();
    // Beside other tests, a handler that uses a CPU may wait longer for one.
    causes.retain(|&cause| cause != "runqueue");
    assert_eq!(causes.len(), 1, "{:#}", report.0);
    assert!(["sleep", "cpu"].contains(&causes[0]), "{causes:?}");
    format!("20 of 20 stalls, cause {}", causes[0])
}

/// Which parts of the server are watched.
fn what_is_known(report: &Report) -> String {
    let targets = report.0["targets"].as_array().unwrap();
    let loops = reactors(report).filter(|reactor| reactor["is_worker"] == false).count();
    let workers: u64 =
        report.0["workers"].as_array().unwrap().iter().filter_map(|group| group["running"].as_u64()).sum();
    let unwatched = targets.iter().find_map(|target| target["unwatched_waits"].as_str());
    let lag = match (loops, unwatched) {
        (0, None) => "no event loop".to_owned(),
        (0, Some(call)) => format!("lag not known: it waits with `{call}` (`--reactor-calls`)"),
        (1, _) => "1 event loop".to_owned(),
        (loops, _) => format!("{loops} event loops"),
    };
    let lag = if workers > 0 { format!("{lag}, {workers} workers") } else { lag };
    let processes =
        if targets.len() == 1 { "1 process".to_owned() } else { format!("{} processes", targets.len()) };
    format!("{processes} | {lag}")
}
