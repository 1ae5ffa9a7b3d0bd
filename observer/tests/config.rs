//! The configuration file: it selects like the command line, is reloaded on SIGHUP, and changes nothing if it is
//! invalid. Also the kill switch, which removes all programs from the kernel.

use std::{
    fs,
    io::Read as _,
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::Command,
};

use nix::{libc::SYS_accept4, sys::signal::Signal};
use tempfile::TempDir;

use crate::support::{
    LIMIT, Process, http,
    interactive::Interactive,
    kernel::wait_until_clean,
    observer::{BINARY, Observer, Report},
    send,
    servers::{Server, free_port},
    wait_for,
};

/// Number of connections of a test.
const CONNECTIONS: u32 = 23;

/// A configuration file in a folder of its own.
struct Config(TempDir);

impl Config {
    fn new(text: &str) -> Self {
        let config = Self(tempfile::tempdir().unwrap());
        config.write(text);
        config
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("observer.toml")
    }

    fn write(&self, text: &str) {
        fs::write(self.path(), text).unwrap();
    }

    fn observe(&self) -> Observer {
        Observer::start(&["--config", self.path().to_str().unwrap()])
    }
}

fn config_for_ports(ports: &[u16]) -> String {
    format!("listen = \"127.0.0.1:0\"\n[include]\nport = {ports:?}\n")
}

fn is_target(report: &Report, pid: u32) -> bool {
    report.0["targets"].as_array().unwrap().iter().any(|target| target["pid"] == pid)
}

fn reloads(observer: &Observer, outcome: &str) -> u32 {
    let scrape = observer.scrape();
    let name = format!("observer_self_config_reloads_total{{outcome=\"{outcome}\"}} ");
    let line = scrape.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap_or_else(|| panic!("{name} in {scrape}")).parse().unwrap()
}

#[real_test]
fn config_file_selects_targets_and_is_reloaded_on_sighup() {
    let (stays, goes, comes) = (Server::redis(), Server::redis(), Server::redis());
    let config = Config::new(&config_for_ports(&[stays.port, goes.port]));
    let before = (stays.redis_accepts(), comes.redis_accepts());
    let observer = config.observe();
    for _ in 0..CONNECTIONS {
        http::connect(stays.port);
        http::connect(goes.port);
    }
    config.write(&config_for_ports(&[stays.port, comes.port]));
    observer.signal(Signal::SIGHUP);
    wait_for("the configuration to be reloaded", || (reloads(&observer, "accepted") == 1).then_some(()));
    for _ in 0..CONNECTIONS {
        http::connect(stays.port);
        http::connect(comes.port);
        http::connect(goes.port);
    }
    let scrape = observer.scrape();
    assert!(!scrape.contains(&format!("pid=\"{}\"", goes.pid())), "{scrape}");

    // An invalid file changes nothing.
    config.write("[include]\nport = [\"http\"]\n");
    observer.signal(Signal::SIGHUP);
    let message = format!("{}:2:9: ", config.path().display());
    wait_for("the message", || observer.message().contains(&message).then_some(()));
    wait_for("the refused reload to be counted", || (reloads(&observer, "refused") == 1).then_some(()));
    let accepted = (stays.redis_accepts() - before.0, comes.redis_accepts() - before.1);
    let report = observer.finish();
    report.assert_complete();
    // Including the connections that read the counts.
    assert_eq!(accepted, (u64::from(2 * CONNECTIONS) + 1, u64::from(CONNECTIONS) + 1));
    assert_eq!(report.listener(stays.port)["accepts"].as_u64(), Some(accepted.0));
    assert_eq!(report.listener(comes.port)["accepts"].as_u64(), Some(accepted.1));
    assert!(!is_target(&report, goes.pid()));
}

#[real_test]
fn accept_in_progress_when_its_target_is_added_is_counted() {
    let first = Server::redis();
    let port = free_port();
    let program = format!(
        "import socket\nserver = socket.create_server(('127.0.0.1', {port}))\nwhile True: server.accept()[0].close()"
    );
    let server = Process(Command::new("/usr/bin/python3").args(["-c", &program]).spawn().unwrap());
    wait_for("the server to listen", || TcpStream::connect(("127.0.0.1", port)).ok());
    let call = format!("/proc/{}/syscall", server.pid());
    let accepts = || fs::read_to_string(&call).unwrap().starts_with(&format!("{SYS_accept4} ")).then_some(());
    wait_for("the server to block in accept", accepts);
    let config = Config::new(&config_for_ports(&[first.port]));
    let observer = config.observe();
    config.write(&config_for_ports(&[first.port, port]));
    observer.signal(Signal::SIGHUP);
    wait_for("the configuration to be reloaded", || (reloads(&observer, "accepted") == 1).then_some(()));
    wait_for("the server to block in accept", accepts);
    http::connect(port);
    let accepted = || {
        let scrape = observer.scrape();
        let of_it = format!("pid=\"{}\"", server.pid());
        let mut lines = scrape.lines().filter(|line| line.contains(&of_it) && line.ends_with(" 1"));
        lines.any(|line| line.starts_with("observer_accept_queue_accepts_total{")).then_some(())
    };
    wait_for("the accept to be counted", accepted);
    observer.finish().assert_complete();
}

/// A server, its child, and a grandchild that serves as well. The child exits on request.
const FAMILY: &str = "
import os, socket, sys
server = socket.create_server(('127.0.0.1', 0))
parent = os.fork()
if parent == 0:
    port = server.getsockname()[1]
    server.close()
    if os.fork() == 0:
        child = socket.create_server(('127.0.0.1', 0))
        print(port, os.getppid(), os.getpid(), child.getsockname()[1], flush=True)
        sys.exit(sys.stdin.read())
    os.waitpid(-1, 0)
os.waitpid(parent, 0)
print('gone', flush=True)
while True: server.accept()[0].close()
";

#[real_test]
fn descendant_stays_a_target_after_its_ancestors_exit() {
    let other = Server::redis();
    let mut family = Interactive::python(FAMILY);
    let ids: Vec<u32> = family.next_line().split(' ').map(|word| word.parse().unwrap()).collect();
    let [port, parent, child, port_of_child] = ids[..] else { panic!("{ids:?}") };
    let port = u16::try_from(port).unwrap();
    let config = Config::new(&config_for_ports(&[port, other.port]));
    let observer = config.observe();
    let sees = |pid: u32| observer.scrape().contains(&format!("pid=\"{pid}\""));
    wait_for("all processes to be observed", || (sees(child) && sees(other.pid())).then_some(()));
    send(parent, Signal::SIGKILL);
    assert_eq!(family.next_line(), "gone");

    // First another server is deselected. Then the file stays the same, and the selected parent exits, too.
    config.write(&config_for_ports(&[port]));
    observer.signal(Signal::SIGHUP);
    wait_for("the configuration to be reloaded", || (reloads(&observer, "accepted") == 1).then_some(()));
    assert!(sees(child) && !sees(other.pid()));
    family.process.0.kill().unwrap();
    family.process.0.wait().unwrap();
    observer.signal(Signal::SIGHUP);
    wait_for("the configuration to be reloaded", || (reloads(&observer, "accepted") == 2).then_some(()));
    assert!(sees(child));

    // No ancestor of the grandchild is selected any more.
    config.write(&config_for_ports(&[other.port]));
    observer.signal(Signal::SIGHUP);
    wait_for("the configuration to be reloaded", || (reloads(&observer, "accepted") == 3).then_some(()));
    assert!(!sees(child) && sees(other.pid()));
    let report = observer.finish();
    assert!(report.listeners(&format!("127.0.0.1:{port_of_child}")).is_empty());
}

#[real_test]
fn changed_setting_requires_a_restart() {
    let server = Server::redis();
    let config = Config::new(&config_for_ports(&[server.port]));
    let observer = config.observe();
    config.write(&format!("stall_threshold = \"5ms\"\n{}", config_for_ports(&[server.port])));
    observer.signal(Signal::SIGHUP);
    let message = "restart: stall_threshold";
    wait_for("the message", || observer.message().contains(message).then_some(()));
    assert!(is_target(&observer.finish(), server.pid()));
}

#[real_test]
fn config_error_reports_line_and_column() {
    let config = Config::new("[include]\nall = true\n[exclude]\nexe = [\"[a\"]\n");
    let output = Command::new(BINARY).arg("--config").arg(config.path()).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.starts_with(&format!("observer: {}:4:7: ", config.path().display())), "{message}");
    assert!(message.contains("docs/configuration.md"), "{message}");
}

#[real_test]
fn sighup_without_config_file_ends_with_a_report() {
    let server = Server::redis();
    let observer = Observer::attach(server.pid());
    observer.signal(Signal::SIGHUP);
    assert!(is_target(&observer.report(), server.pid()));
}

#[real_test(alone)]
fn excluded_processes_are_not_observed() {
    let (wanted, other) = (Server::redis(), Server::asyncio());
    let program = fs::read_link(format!("/proc/{}/exe", other.pid())).unwrap();
    let arguments = ["--all", "--no-listen", "--exclude-exe", program.to_str().unwrap()];
    let report = Observer::start(&arguments).finish();
    assert!(is_target(&report, wanted.pid()) && !is_target(&report, other.pid()));

    let children = Server::nginx(2);
    let port = other.port.to_string();
    let pids = [children.pid().to_string(), other.pid().to_string()];
    let arguments = ["--pid", &pids[0], "--pid", &pids[1], "--no-listen"];
    let observer =
        Observer::start(&[&arguments[..], &["--exclude-comm", "nginx", "--exclude-port", &port]].concat());
    http::connect(other.port);
    let report = observer.finish();
    let targets: Vec<_> = report.0["targets"].as_array().unwrap().iter().map(|t| t["pid"].as_u64()).collect();
    // Only the processes that are selected by pid: the workers have the same name as their master.
    let asked_for = [children.pid(), other.pid()].map(u64::from).map(Some);
    assert_eq!(targets.len(), 2, "{targets:?}");
    assert!(asked_for.iter().all(|pid| targets.contains(pid)), "{targets:?}");
}

#[real_test]
fn kill_switch_removes_all_programs() {
    let server = Server::redis();
    let folder = tempfile::tempdir().unwrap();
    let switch = folder.path().join("observer.off");
    let pid = server.pid().to_string();
    let flags = ["--pid", &pid, "--listen", "127.0.0.1:0", "--kill-switch", switch.to_str().unwrap()];
    let observer = Observer::start(&flags);
    let is_off = || observer.scrape().contains("observer_self_off 1\n");
    assert!(observer.has_all_programs() && !is_off());
    fs::write(&switch, "").unwrap();
    wait_for("the programs to be gone", || (observer.programs() == 0).then_some(()));
    wait_until_clean();
    wait_for("the endpoint to report it", || is_off().then_some(()));
    let scrape = observer.scrape();
    assert!(!scrape.contains(&format!("pid=\"{pid}\"")), "{scrape}");
    assert_eq!(http::get(observer.port(), "/healthz"), "ok\n");
    // A kubelet must not take this for a failure.
    let answer = http::get(observer.port(), "/readyz");
    assert_eq!(answer, "turned off: the --kill-switch file exists\n");
    fs::remove_file(&switch).unwrap();
    wait_for("the programs to be attached again", || observer.has_all_programs().then_some(()));
    wait_for("the endpoint to report it", || (!is_off()).then_some(()));
    for _ in 0..CONNECTIONS {
        http::connect(server.port);
    }
    wait_for("the accepts since then", || {
        let scrape = observer.scrape();
        let accepts = format!("listener=\"127.0.0.1:{}\"}} {CONNECTIONS}", server.port);
        let mut lines = scrape.lines().filter(|l| l.starts_with("observer_accept_queue_accepts_total{"));
        lines.any(|line| line.ends_with(&accepts)).then_some(())
    });
    assert!(is_target(&observer.finish(), server.pid()));
}

/// A selection that was reloaded before the kill switch is kept, and a file that was changed meanwhile is used
/// afterwards.
#[real_test]
fn kill_switch_keeps_the_selection() {
    let (first, second, third) = (Server::redis(), Server::redis(), Server::redis());
    let config = Config::new(&config_for_ports(&[first.port]));
    let switch = config.0.path().join("observer.off");
    let file = config.path();
    let arguments = ["--config", file.to_str().unwrap(), "--kill-switch", switch.to_str().unwrap()];
    let observer = Observer::start(&arguments);
    let observed = || {
        let scrape = observer.scrape();
        [&first, &second, &third].map(|server| scrape.contains(&format!("pid=\"{}\"", server.pid())))
    };
    assert_eq!(observed(), [true, false, false]);
    let cycle = |meanwhile: &dyn Fn()| {
        fs::write(&switch, "").unwrap();
        wait_for("the programs to be gone", || (observer.programs() == 0).then_some(()));
        wait_until_clean();
        meanwhile();
        fs::remove_file(&switch).unwrap();
        wait_for("the programs to be attached again", || observer.has_all_programs().then_some(()));
    };
    config.write(&config_for_ports(&[second.port]));
    observer.signal(Signal::SIGHUP);
    wait_for("the configuration to be reloaded", || (observed() == [false, true, false]).then_some(()));
    // If the file is invalid by then, the last selection stays.
    cycle(&|| config.write("[include]\nport = [\"http\"]\n"));
    wait_for("the same targets to be observed", || (observed() == [false, true, false]).then_some(()));
    cycle(&|| {
        config.write(&config_for_ports(&[third.port]));
        observer.signal(Signal::SIGHUP);
    });
    wait_for("the changed configuration to be used", || (observed() == [false, false, true]).then_some(()));
}

/// A collector that accepts connections and never responds does not delay the removal.
#[real_test]
fn kill_switch_does_not_wait_for_the_collector() {
    let server = Server::redis();
    let collector = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    collector.set_nonblocking(true).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let switch = folder.path().join("observer.off");
    let (pid, url) = (server.pid().to_string(), format!("http://{}", collector.local_addr().unwrap()));
    let arguments = ["--pid", &pid, "--listen", "127.0.0.1:0", "--otlp-endpoint", &url];
    let arguments = [&arguments[..], &["--kill-switch", switch.to_str().unwrap()]].concat();
    let observer = Observer::start_with(&arguments, &[("OTEL_EXPORTER_OTLP_TIMEOUT", "600000")]);
    let (mut push, _) = wait_for("a push", || collector.accept().ok());
    push.set_nonblocking(false).unwrap();
    push.set_read_timeout(Some(LIMIT)).unwrap();
    push.read_exact(&mut [0; 4]).unwrap();

    fs::write(&switch, "").unwrap();
    wait_for("the programs to be gone", || (observer.programs() == 0).then_some(()));
    wait_until_clean();
    // Only then is the push abandoned.
    let given_up = |message: &String| message.contains("were not delivered");
    let before = observer.messages();
    assert!(!before.iter().any(given_up), "{before:?}");
    wait_for("the push to be abandoned", || given_up(&observer.message()).then_some(()));
    fs::remove_file(&switch).unwrap();
    wait_for("the programs to be attached again", || observer.has_all_programs().then_some(()));
    assert!(is_target(&observer.finish(), server.pid()));
}
