//! The command line: errors have a clear message and the right exit code, and observer leaves nothing behind however it
//! ends.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use nix::sys::signal::Signal;

use crate::support::{
    Process, http, is_emulated,
    kernel::wait_until_clean,
    observer::{BINARY, Observer, PublicBinary},
    servers::{Server, free_port},
    wait_for,
};

fn observer(arguments: &[&str]) -> Output {
    Command::new(BINARY).args(arguments).output().unwrap()
}

/// Asserts that standard error has one line with the reason and one with the solution.
#[track_caller]
fn assert_error(output: &Output, why: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{stderr}");
    assert!(lines[0].starts_with("observer: ") && lines[0].contains(why), "{stderr}");
    assert!(lines[1].starts_with("  "), "{stderr}");
    assert!(output.stdout.is_empty());
}

#[real_test(userspace)]
fn missing_pid_is_an_error() {
    assert_error(&observer(&["--pid", "4194304"]), "no process has the id 4194304");
}

#[real_test(userspace)]
fn kernel_thread_is_an_error() {
    assert_error(&observer(&["--pid", "2"]), "process 2 (kthreadd) is a kernel thread");
}

#[real_test(userspace)]
fn thread_id_is_an_error() {
    let server = Server::node();
    let threads = std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let thread = threads
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .find(|tid| *tid != server.pid().to_string())
        .unwrap();
    assert_error(
        &observer(&["--pid", &thread]),
        &format!("{thread} is a thread of process {}", server.pid()),
    );
}

#[real_test(userspace)]
fn missing_capabilities_are_an_error() {
    let binary = PublicBinary::new();
    let output = binary.as_nobody().args(["--pid", "1", "--no-listen"]).output().unwrap();
    assert_error(&output, "missing rights: CAP_BPF, CAP_PERFMON");
}

#[real_test(userspace)]
fn port_in_use_is_an_error() {
    let server = Server::asyncio();
    let port = free_port();
    let _busy = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let pid = server.pid().to_string();
    let output = observer(&["--pid", &pid, "--listen", &format!("127.0.0.1:{port}"), "--duration", "5s"]);
    assert_error(&output, &format!("cannot listen on 127.0.0.1:{port}"));
}

#[real_test(userspace)]
fn flame_graph_in_missing_folder_is_an_error() {
    let server = Server::asyncio();
    let pid = server.pid().to_string();
    let output =
        observer(&["--pid", &pid, "--no-listen", "--duration", "1s", "--flame", "/no/such/folder/x.svg"]);
    assert_error(&output, "cannot write the flame graph to /no/such/folder/x.svg");
}

#[real_test(userspace)]
fn invalid_arguments_exit_with_status_2() {
    for arguments in [
        &[][..],
        &["--pid", "1", "--stall-threshold", "10us"],
        &["--pid", "nginx"],
        &["--duration", "5s"],
        &["--pid", "1", "--no-such-option"],
    ] {
        assert_eq!(observer(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

/// Output of a successful command.
fn printed(arguments: &[&str]) -> String {
    let output = observer(arguments);
    assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[real_test(userspace, programs(&["bash"]))]
fn bash_completes_options_and_commands() {
    // Calls the completion function as bash does when the user presses Tab.
    let script = printed(&["completions", "bash"])
        + r#"
            word=$(complete -p observer); word=${word##*-F }; function=${word%% *}
            for typed in --st prof met; do
                COMP_WORDS=(observer $typed) COMP_CWORD=1
                $function observer $typed observer
                echo "${COMPREPLY[*]}"
            done
        "#;
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "--stall-threshold\nprofiles\n\n", "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[real_test(userspace, programs(&["man"]))]
fn man_page_has_no_warnings() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("observer.8");
    std::fs::write(&page, printed(&["man"])).unwrap();
    let arguments = ["--warnings", "--encoding=UTF-8", "--local-file", page.to_str().unwrap()];
    let output = Command::new("man").args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert!(text.contains("--stall-threshold <TIME> [default: 50ms]"), "{text}");
}

#[real_test(userspace)]
fn check_succeeds_as_root() {
    let output = observer(&["check"]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{stdout}");
    assert!(!stdout.contains("NO "), "{stdout}");
}

#[real_test(userspace)]
fn check_fails_without_capabilities() {
    let binary = PublicBinary::new();
    let output = binary.as_nobody().arg("check").output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    assert!(stdout.contains("NO   CAP_BPF") && stdout.contains("cure:"), "{stdout}");
}

/// The name of this process contains sequences that change the title and colours of a terminal and start a new line.
#[real_test(userspace)]
fn control_characters_in_names_are_replaced() {
    let script = "import select; open('/proc/self/comm', 'w').write('\\x1b]0;x\\x07\\x9bm\\nLATE'); print(flush=True); \
                  select.epoll().poll()";
    let mut child =
        Command::new("/usr/bin/python3").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    let process = Process(child);
    let pid = process.pid().to_string();
    for arguments in [
        &["--pid", &pid, "--no-listen", "--duration", "1s", "--format", "text"][..],
        &["check", "--pid", &pid],
    ] {
        let output = observer(arguments);
        for (text, has_name) in [(output.stdout, true), (output.stderr, arguments[0] != "check")] {
            let text = String::from_utf8(text).unwrap();
            assert_eq!(text.contains("\u{fffd}]0;x\u{fffd}\u{fffd}m\u{fffd}LATE"), has_name, "{text:?}");
            assert!(text.lines().all(|line| !line.chars().any(char::is_control)), "{text:?}");
            assert!(!text.lines().any(|line| line.starts_with("LATE")), "{text}");
        }
    }
}

/// The duration includes the time in which observer attaches to the runtime.
#[real_test(quiet, userspace)]
fn duration_ends_the_observation() {
    let server = Server::node();
    let duration = if is_emulated() { 20.0 } else { 4.0 };
    let arguments =
        ["--pid", &server.pid().to_string(), "--no-listen", "--duration", &format!("{duration}s")];
    let report = Observer::start(&arguments).report();
    let observed = report.0["duration_seconds"].as_f64().unwrap();
    assert!(observed >= duration && observed < duration * 1.1, "{observed}");
    assert_eq!(report.0["schema"], "observer.report/1");
}

/// Metrics do not wait until observer has attached to the runtime of a target.
#[real_test(quiet, host_only("the announcement of an emulated observer may be read late"))]
fn metrics_are_served_while_observer_attaches_to_a_runtime() {
    let server = Server::node();
    let port = free_port();
    let (pid, address) = (server.pid().to_string(), format!("127.0.0.1:{port}"));
    let child = Command::new(BINARY)
        .args(["--pid", &pid, "--listen", &address])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut observer = Process(child);
    let is_attached = AtomicBool::new(false);
    thread::scope(|scope| {
        let lines = BufReader::new(observer.0.stderr.take().unwrap()).lines();
        scope.spawn(|| {
            for line in lines.map_while(Result::ok) {
                is_attached.fetch_or(line.starts_with("report "), Ordering::Relaxed);
            }
        });
        let has_loop = || {
            let mut connection = TcpStream::connect(("127.0.0.1", port)).ok()?;
            connection.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
            let mut page = String::new();
            connection.read_to_string(&mut page).ok()?;
            page.contains("\nobserver_reactor_lag_seconds_count{").then_some(())
        };
        wait_for("metrics of the loop", has_loop);
        let is_early = !is_attached.load(Ordering::Relaxed);
        wait_for("the announcement", || is_attached.load(Ordering::Relaxed).then_some(()));
        observer.signal(Signal::SIGTERM);
        observer.0.wait().unwrap();
        assert!(is_early, "there were no metrics before the announcement");
    });
}

#[real_test(userspace)]
fn killed_observer_leaves_nothing_and_server_continues() {
    let server = Server::nginx(1);
    let done = AtomicBool::new(false);
    let served = thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut served = 0;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(http::get(server.port, "/"), "ok");
                served += 1;
            }
            served
        });
        let observer = Observer::attach(server.pid());
        let has_all = observer.has_all_programs();
        observer.kill();
        wait_until_clean();
        done.store(true, Ordering::Relaxed);
        assert!(has_all, "all programs were there while observer ran");
        client.join().unwrap()
    });
    assert!(served > 0);
}
