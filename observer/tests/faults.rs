//! Failures around observer: the kernel refuses a call, the disk is full, `/proc` cannot be read, a target exits while
//! observer attaches. Each results in one clear error or in a counter, does not affect the target, and leaves nothing
//! in the kernel.

use std::{
    io::Read as _,
    os::unix::process::CommandExt as _,
    process::{Command, ExitStatus, Stdio},
    thread,
    time::Instant,
};

use nix::{
    libc::{self, c_long},
    sys::signal::Signal,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use serde_json::Value;

use crate::support::{
    LIMIT, Process, exit_within, http,
    interactive::Interactive,
    is_emulated, is_full,
    kernel::wait_until_clean,
    observer::{BINARY, Observer, Report},
    send,
    servers::Server,
    wait_for, waits_for_events,
};

/// Exit status and output of an observer that has ended.
struct Outcome {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl Outcome {
    /// Runs a command until it exits.
    fn run(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Self::wait(Process(child.unwrap()))
    }

    fn wait(mut process: Process) -> Self {
        let (mut stdout, mut stderr) = (process.0.stdout.take().unwrap(), process.0.stderr.take().unwrap());
        // Read concurrently, because output that does not fit into the pipe would block observer.
        let reader = thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).unwrap();
            text
        });
        let errors = thread::spawn(move || {
            let mut text = String::new();
            stderr.read_to_string(&mut text).unwrap();
            text
        });
        let status = exit_within(&mut process.0, LIMIT).expect("observer does not end");
        Self { status, stdout: reader.join().unwrap(), stderr: errors.join().unwrap() }
    }

    /// The error: one line with the reason, perhaps with further lines below, and no report.
    #[track_caller]
    fn failure(&self) -> &str {
        assert_eq!(self.status.code(), Some(1), "{}{}", self.stdout, self.stderr);
        let failures: Vec<_> = self.stderr.lines().filter(|line| line.starts_with("observer: ")).collect();
        assert_eq!(failures.len(), 1, "{}", self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        failures[0]
    }

    #[track_caller]
    fn report(&self) -> Report {
        assert!(self.status.success(), "{}{}", self.stdout, self.stderr);
        Report(serde_json::from_str(&self.stdout).unwrap())
    }
}

/// Arguments for a short observation of a process, added to a command that executes observer.
fn short_observation(command: &mut Command, pid: u32) -> &mut Command {
    command.args(["--pid", &pid.to_string(), "--no-listen", "--duration", "1s", "--format", "json"])
}

/// A system call that is refused, if its first argument is `command`.
struct RefusedCall {
    what: &'static str,
    call: c_long,
    command: Option<u64>,
    answer: i32,
}

impl RefusedCall {
    const fn bpf(what: &'static str, command: u64, answer: i32) -> Self {
        Self { what, call: libc::SYS_bpf, command: Some(command), answer }
    }

    fn filter(&self) -> BpfProgram {
        let condition =
            |value| SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value).unwrap();
        let rules =
            self.command.map(|command| SeccompRule::new(vec![condition(command)]).unwrap()).into_iter();
        let answer = SeccompAction::Errno(self.answer.cast_unsigned());
        let architecture = std::env::consts::ARCH.try_into().unwrap();
        let calls = [(self.call, rules.collect())].into();
        SeccompFilter::new(calls, SeccompAction::Allow, answer, architecture).unwrap().try_into().unwrap()
    }

    /// observer in a sandbox that refuses the call.
    fn observer(&self) -> Command {
        let filter = self.filter();
        let mut command = Command::new(BINARY);
        // SAFETY: makes two system calls between fork and exec, which allocate nothing and take no lock.
        unsafe {
            command.pre_exec(move || seccompiler::apply_filter(&filter).map_err(std::io::Error::other));
        }
        command
    }
}

/// Calls that a sandbox, a limit or a lack of memory may refuse.
const REFUSED: &[RefusedCall] = &[
    RefusedCall::bpf("a map", 0, libc::ENOMEM),
    RefusedCall::bpf("an entry of a map", 2, libc::ENOMEM),
    RefusedCall::bpf("a program", 5, libc::EPERM),
    RefusedCall::bpf("a run of a program", 10, libc::EPERM),
    RefusedCall::bpf("a BTF tracepoint", 17, libc::EPERM),
    RefusedCall::bpf("types of a program", 18, libc::EPERM),
    RefusedCall::bpf("a link", 28, libc::EPERM),
    RefusedCall::bpf("an iterator", 33, libc::EPERM),
    RefusedCall {
        what: "a plain tracepoint",
        call: libc::SYS_perf_event_open,
        command: None,
        answer: libc::EMFILE,
    },
    RefusedCall {
        what: "an event queue",
        call: libc::SYS_epoll_create1,
        command: None,
        answer: libc::ENFILE,
    },
];

#[real_test]
fn calls_that_the_kernel_refuses_are_reported() {
    let server = Server::redis();
    for refused in REFUSED {
        let end = Outcome::run(short_observation(&mut refused.observer(), server.pid()));
        let why = if end.status.success() {
            end.report().target(server.pid());
            "continues without it"
        } else {
            end.failure()
        };
        eprintln!("| {} | {why} |", refused.what);
        wait_until_clean();
    }
    assert!(server.redis_accepts() > 0, "the server does not answer any more");
}

/// With any limit on descriptors, observer works or reports that the limit is too low.
#[real_test]
fn low_descriptor_limit_is_reported() {
    let server = Server::redis();
    let enough = {
        let observer = Observer::attach(server.pid());
        let count = std::fs::read_dir(format!("/proc/{}/fd", observer.pid())).unwrap().count();
        observer.finish();
        count
    };
    let steps = if is_emulated() { 3 } else { 12 };
    for step in 1..=steps {
        let limit = 8 + enough * step / steps;
        let mut command = Command::new("prlimit");
        let end = Outcome::run(short_observation(
            command.arg(format!("--nofile={limit}")).arg(BINARY),
            server.pid(),
        ));
        let why = if end.status.success() { "works" } else { end.failure() };
        eprintln!("| {limit} of {enough} | {why} |");
        assert!(end.status.success() || why.contains("Too many open files"), "{}", end.stderr);
        wait_until_clean();
    }
    assert!(server.redis_accepts() > 0, "the server does not answer any more");
}

/// Kernels before 5.11 count maps and programs as locked memory of the user.
#[real_test]
fn low_locked_memory_limit_is_reported() {
    let server = Server::redis();
    // Even root may not always raise the limit.
    for limit in ["65536", "4000000", "8000000"] {
        let mut command = Command::new("prlimit");
        let end = Outcome::run(short_observation(
            command.arg(format!("--memlock={limit}")).arg(BINARY),
            server.pid(),
        ));
        let why = if end.status.success() { "works" } else { end.failure() };
        eprintln!("| {limit} bytes | {why} |");
        wait_until_clean();
    }
}

/// Waits for events until it is killed.
fn victim() -> Interactive {
    let mut victim = Interactive::python("import select; e = select.epoll(); print(flush=True); e.poll()");
    victim.next_line();
    victim
}

#[real_test]
fn target_that_exits_during_attach_is_reported() {
    let start = Instant::now();
    Observer::attach(victim().pid()).interrupt();
    let attach_time = start.elapsed();
    let rounds = if is_full() && !is_emulated() { 20 } else { 6 };
    let mut reported = 0;
    for round in 0..rounds {
        let victim = victim();
        let observer = Command::new(BINARY)
            .args(["--pid", &victim.pid().to_string(), "--no-listen", "--format", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        thread::sleep(attach_time * round / rounds);
        victim.process.signal(Signal::SIGKILL);
        let pid = victim.pid();
        // Every other process stays a zombie for a moment.
        let kept = (round % 2 == 0).then_some(victim);
        let end = Outcome::wait(Process(observer));
        drop(kept);
        if end.status.success() {
            reported += 1;
            assert_eq!(end.report().target(pid)["exited"], true, "{}", end.stdout);
        } else {
            let why = end.failure();
            assert!(why.contains(&pid.to_string()), "{why}");
        }
    }
    eprintln!(
        "{rounds} targets exited within {attach_time:?}: {reported} are in a report, the others in an error"
    );
    wait_until_clean();
}

/// observer with mounts over paths in `/proc`.
fn observer_with_mounts(mounts: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &format!("{mounts} && exec \"$@\""), "sh", BINARY]);
    command
}

#[real_test]
fn unreadable_process_is_an_error() {
    let server = Server::redis();
    let mount = format!("mount -t tmpfs none /proc/{}", server.pid());
    let end = Outcome::run(short_observation(&mut observer_with_mounts(&mount), server.pid()));
    assert!(end.failure().contains(&format!("no process has the id {}", server.pid())), "{}", end.stderr);
}

/// If parts of `/proc/PID` cannot be read, everything else is reported, and the counts of the programs are exact.
#[real_test]
fn unreadable_files_of_a_process_affect_nothing_else() {
    const CONNECTIONS: u64 = 23;
    let server = Server::asyncio();
    let pid = server.pid();
    let files = ["maps", "mem", "environ", "cgroup", "comm", "syscall", "mountinfo"];
    let files = files.map(|file| format!("mount --bind /dev/null /proc/{pid}/{file}"));
    let folders =
        ["fd", "task", "ns", "map_files"].map(|folder| format!("mount -t tmpfs none /proc/{pid}/{folder}"));
    let mounts = files.into_iter().chain(folders).collect::<Vec<_>>().join(" && ");
    for selector in [["--pid".to_owned(), pid.to_string()], ["--comm".into(), "python3".into()]] {
        let selector: Vec<&str> = selector.iter().map(String::as_str).collect();
        let observer = Observer::start_command(
            observer_with_mounts(&mounts),
            &[&selector[..], &["--no-listen"]].concat(),
            &[],
        );
        for _ in 0..CONNECTIONS {
            http::get(server.port, "/");
        }
        server.block("sleep", 100);
        let report = observer.finish();
        assert_eq!(report.listener(server.port)["accepts"], CONNECTIONS + 1, "{:#}", report.0);
        let reactors = report.target(pid)["reactors"].as_array().unwrap();
        assert_eq!(reactors.len(), 1, "{reactors:#?}");
        assert_eq!(reactors[0]["stalls"]["count"], 1, "{:#}", reactors[0]);
        eprintln!("not seen: {}", report.0["self"]["missing"]);
    }
}

/// A report that cannot be written is a failure.
#[real_test]
fn full_disk_is_an_error() {
    let server = Server::asyncio();
    let pid = server.pid().to_string();
    for format in ["text", "json"] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = Command::new(BINARY)
            .args(["--pid", &pid, "--no-listen", "--duration", "1s", "--format", format])
            .stdout(full)
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        let failures: Vec<_> = stderr.lines().filter(|line| line.starts_with("observer: ")).collect();
        assert!(failures.len() == 1 && failures[0].contains("No space left on device"), "{stderr}");
    }
}

/// The report is printed anyway, because it is the only result of the observation.
#[real_test]
fn full_disk_for_the_flame_graph_is_an_error() {
    let server = Server::asyncio();
    let pid = server.pid().to_string();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lag.svg");
    let mut command = Command::new("unshare");
    let run = format!("mount -t tmpfs -o size=4k none {} && exec \"$@\"", folder.path().display());
    command.args(["-m", "sh", "-c", &run, "sh", BINARY, "--pid", &pid, "--no-listen", "--duration", "5s"]);
    let command = command.args(["--format", "json", "--flame"]).arg(&file);
    let end = thread::scope(|scope| {
        let end = scope.spawn(|| Outcome::run(command));
        // observer may take seconds to attach.
        while !end.is_finished() {
            server.block("sleep", 60);
            server.block("spin", 60);
        }
        end.join().unwrap()
    });
    let why = end.failure();
    assert!(why.contains(file.to_str().unwrap()) && why.contains("No space left on device"), "{why}");
    let report: Value =
        serde_json::from_str(&end.stdout).unwrap_or_else(|_| panic!("no report: {}", end.stderr));
    assert_eq!(report["targets"][0]["pid"], server.pid());
}

/// Stalls that do not fit into the ring buffer while observer is stopped are counted as lost, and all other values stay
/// exact.
#[real_test]
fn stalls_lost_in_a_full_ring_buffer_are_counted() {
    let blocks = if is_emulated() { 2_500_u64 } else { 5_000 };
    let script = format!(
        "import select, socket, sys, time\n\
         e = select.epoll(); a, b = socket.socketpair(); e.register(b); a.send(b'x')\n\
         print(flush=True); sys.stdin.readline()\n\
         for _ in range({blocks}):\n    e.poll(); time.sleep(0.0012)\n\
         print(flush=True); e.unregister(b); e.poll()"
    );
    let mut server = Interactive::python(&script);
    server.next_line();
    let pid = server.pid().to_string();
    let observer = Observer::start(&["--pid", &pid, "--no-listen", "--stall-threshold", "1ms"]);
    send(observer.pid(), Signal::SIGSTOP);
    server.request("");
    // The last slice ends when the next wait begins.
    wait_for("the last wait", || waits_for_events(server.pid(), server.pid()).then_some(()));
    send(observer.pid(), Signal::SIGCONT);
    let report = observer.finish();
    let lost = report.lost("stalls_full");
    let reactor = report.reactor(server.pid());
    let reported = reactor["stalls"]["count"].as_u64().unwrap();
    eprintln!("{blocks} stalls: {reported} reported, {lost} counted as lost");
    assert_eq!(reactor["slices"], blocks, "{reactor:#}");
    assert!(lost > 0 && reported > 0, "{reactor:#}");
    assert_eq!(reported + lost, blocks, "{reactor:#}");
    assert!(
        report.0["self"]["lost"]
            .as_array()
            .unwrap()
            .iter()
            .all(|l| l["count"] == 0 || l["cause"] == "stalls_full")
    );
}

/// On request, creates more threads, listeners and processes than the maps can hold.
const CROWD: &str = "
import os, select, socket, sys, threading
sets = [select.epoll() for _ in range(40)]; print(flush=True); sys.stdin.readline()
for epoll in sets: threading.Thread(target=epoll.poll, daemon=True).start()
listeners = [socket.create_server(('127.0.0.1', 0)) for _ in range(40)]
children = []
for _ in range(100):
    child = os.fork()
    if child == 0: os.execvp('sleep', ['sleep', '100'])
    children.append(child)
print(flush=True); sys.stdin.readline()
for child in children: os.kill(child, 9)
print(flush=True)
";

/// What exceeds the capacity is counted as lost, all other counts are exact, and the memory that the capacity takes is
/// announced.
#[real_test]
fn objects_beyond_the_capacity_are_counted_as_lost() {
    let mut crowd = Interactive::python(CROWD);
    crowd.next_line();
    let pid = crowd.pid().to_string();
    let start =
        |capacity: &str| Observer::start(&["--pid", &pid, "--listen", "127.0.0.1:0", "--capacity", capacity]);
    let memory = |observer: &Observer| {
        let scrape = observer.scrape();
        let line =
            scrape.lines().find_map(|line| line.strip_prefix("observer_self_map_memory_bytes ")).unwrap();
        let reported: u64 = line.parse().unwrap();
        let of_all = observer.map_bytes();
        assert!(reported > 0 && reported <= of_all, "{reported} of {of_all} bytes");
        reported
    };
    let large = start("1024");
    let usual = memory(&large);
    large.finish();
    let observer = start("16");
    let line =
        observer.announcement.iter().find(|line| line.starts_with("capacity: 16 event loops")).unwrap();
    assert!(line.contains("MiB of kernel memory"), "{line}");
    let least = memory(&observer);
    eprintln!("{} KiB for 1024 event loops, {} KiB for 16", usual >> 10, least >> 10);
    assert!(least < usual / 4);
    crowd.request("");
    let report = observer.finish();
    crowd.request("");
    let lost = ["reactors_full", "listeners_full", "targets_full"].map(|cause| report.lost(cause));
    eprintln!("lost: {lost:?}");
    assert!(lost.iter().all(|&count| count > 0), "{lost:?}");
    let target = report.target(crowd.pid());
    assert_eq!(target["reactors"].as_array().unwrap().len(), 16);
    assert_eq!(target["listeners"].as_array().unwrap().len(), 16);
}
