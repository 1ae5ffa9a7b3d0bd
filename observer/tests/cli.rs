//! The command line: what goes wrong says so in one clear line with the right exit code, and whatever ends
//! observer leaves nothing behind.

use std::{
    io::Read as _,
    net::TcpListener,
    os::unix::process::CommandExt as _,
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use crate::support::{
    Process, http,
    observer::{BINARY, Observer},
    servers::{Server, free_port},
    wait_for,
};

fn observer(arguments: &[&str]) -> Output {
    Command::new(BINARY).args(arguments).output().unwrap()
}

/// One line why, one line what to do, nothing else.
#[track_caller]
fn assert_refused(output: &Output, why: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{stderr}");
    assert!(lines[0].starts_with("observer: ") && lines[0].contains(why), "{stderr}");
    assert!(lines[1].starts_with("  "), "{stderr}");
    assert!(output.stdout.is_empty());
}

#[test]
fn a_missing_pid() {
    assert_refused(&observer(&["--pid", "4194304"]), "no process has the id 4194304");
}

#[test]
fn a_kernel_thread() {
    assert_refused(&observer(&["--pid", "2"]), "process 2 (kthreadd) is a kernel thread");
}

#[test]
fn a_thread_instead_of_a_process() {
    let server = Server::node();
    let threads = std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let thread = threads
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .find(|tid| *tid != server.pid().to_string())
        .unwrap();
    assert_refused(
        &observer(&["--pid", &thread]),
        &format!("{thread} is a thread of process {}", server.pid()),
    );
}

#[test]
fn without_root() {
    let nobody = 65_534;
    let output =
        Command::new(BINARY).args(["--pid", "1", "--no-listen"]).uid(nobody).gid(nobody).output().unwrap();
    assert_refused(&output, "missing rights: CAP_BPF, CAP_PERFMON");
}

#[test]
fn a_busy_port() {
    let server = Server::asyncio();
    let port = free_port();
    let _busy = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let pid = server.pid().to_string();
    let output = observer(&["--pid", &pid, "--listen", &format!("127.0.0.1:{port}"), "--duration", "5s"]);
    assert_refused(&output, &format!("cannot listen on 127.0.0.1:{port}"));
}

#[test]
fn a_flame_graph_in_no_folder() {
    let server = Server::asyncio();
    let pid = server.pid().to_string();
    let output =
        observer(&["--pid", &pid, "--no-listen", "--duration", "1s", "--flame", "/no/such/folder/x.svg"]);
    assert_refused(&output, "cannot write the flame graph to /no/such/folder/x.svg");
}

#[test]
fn wrong_usage() {
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

/// What observer prints about itself.
fn printed(arguments: &[&str]) -> String {
    let output = observer(arguments);
    assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a program of the machine, unless it has none of that name.
fn run_on(test: &str, program: &str, arguments: &[&str]) -> Option<Output> {
    let output = Command::new(program).args(arguments).output();
    if output.is_err() {
        eprintln!("skipped: cli::{test}: no {program} here");
    }
    output.ok()
}

#[test]
fn bash_completes_options_and_commands() {
    // Asks the function that the script has registered, as bash does when somebody presses Tab.
    let script = printed(&["completions", "bash"])
        + r#"
            word=$(complete -p observer); word=${word##*-F }; function=${word%% *}
            for typed in --st prof met; do
                COMP_WORDS=(observer $typed) COMP_CWORD=1
                $function observer $typed observer
                echo "${COMPREPLY[*]}"
            done
        "#;
    if let Some(output) = run_on("bash_completes_options_and_commands", "bash", &["-c", &script]) {
        assert_eq!(String::from_utf8_lossy(&output.stdout), "--stall-threshold\nprofiles\n\n", "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn man_finds_no_fault_with_the_page() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("observer.8");
    std::fs::write(&page, printed(&["man"])).unwrap();
    let arguments = ["--warnings", "--encoding=UTF-8", "--local-file", page.to_str().unwrap()];
    if let Some(output) = run_on("man_finds_no_fault_with_the_page", "man", &arguments) {
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        assert!(text.contains("--stall-threshold <TIME> [default: 50ms]"), "{text}");
    }
}

#[test]
fn check_says_yes_here() {
    let output = observer(&["check"]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{stdout}");
    assert!(!stdout.contains("NO "), "{stdout}");
}

#[test]
fn check_says_no_without_rights() {
    let output = Command::new(BINARY).arg("check").uid(65_534).gid(65_534).output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    assert!(stdout.contains("NO   CAP_BPF") && stdout.contains("cure:"), "{stdout}");
}

/// A process is called what would change a terminal's title and colours, and begin a line.
#[test]
fn names_do_not_steer_the_terminal() {
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

#[test]
fn a_duration_ends_by_itself() {
    let server = Server::asyncio();
    let report =
        Observer::start(&["--pid", &server.pid().to_string(), "--no-listen", "--duration", "1s"]).report();
    let observed = report.0["duration_seconds"].as_f64().unwrap();
    assert!(observed >= 1.0, "{observed}");
    assert_eq!(report.0["schema"], "observer.report/1");
}

/// Names of our programs, and links of any kind, as bpftool shows them.
pub(crate) fn in_the_kernel() -> (Vec<String>, usize) {
    let bpftool = |what: &str| -> serde_json::Value {
        let output =
            Command::new("bpftool").args(["-j", what, "show"]).output().expect("bpftool is installed");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    };
    let ours = [
        "epoll_enter",
        "epoll_exit",
        "sched_switch",
        "sched_wakeup",
        "sock_state",
        "accept_enter",
        "accept_exit",
    ];
    let programs = bpftool("prog");
    let names = programs.as_array().into_iter().flatten().filter_map(|p| p["name"].as_str());
    let links = bpftool("link").as_array().map_or(0, Vec::len);
    (names.filter(|name| ours.contains(name)).map(str::to_owned).collect(), links)
}

#[test]
fn a_kill_leaves_nothing_behind_and_the_server_untouched() {
    let server = Server::nginx(1);
    let (_, links_before) = in_the_kernel();
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
        let observer = Observer::of(server.pid());
        let programs = in_the_kernel().0.len();
        observer.kill();
        // Programs are freed a grace period after their last descriptor.
        wait_for("the kernel to free the programs", || {
            let (programs, links) = in_the_kernel();
            (programs.is_empty() && links <= links_before).then_some(())
        });
        done.store(true, Ordering::Relaxed);
        assert_eq!(programs, 7, "all programs were there while observer ran");
        client.join().unwrap()
    });
    assert!(served > 0);
}
