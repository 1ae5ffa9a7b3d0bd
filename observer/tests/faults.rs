//! What goes wrong around observer: a kernel that refuses in the middle, a disk that is full, a `/proc` that cannot be
//! read, a target that dies while it is looked at. Each ends in one clear line or in a figure that says so, the target
//! never notices, and nothing of ours stays in the kernel.

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
    LIMIT, Process, exit_within, http, is_emulated, is_full,
    kernel::wait_until_clean,
    observer::{BINARY, Observer, Report},
    send,
    servers::Server,
    told::Told,
    wait_for, waits_for_events,
};

/// What became of an observer that ended by itself.
struct End {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl End {
    /// Of this command, run to its end.
    fn of(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Self::when_over(Process(child.unwrap()))
    }

    fn when_over(mut process: Process) -> Self {
        let (mut stdout, mut stderr) = (process.0.stdout.take().unwrap(), process.0.stderr.take().unwrap());
        // Read beside waiting: what does not fit into a pipe would never be written otherwise.
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

    /// What it failed with: one line why, perhaps further ones below it, and nothing in place of a report.
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

/// A short look at a process, by this command that becomes observer.
fn look_at(command: &mut Command, pid: u32) -> &mut Command {
    command.args(["--pid", &pid.to_string(), "--no-listen", "--duration", "1s", "--format", "json"])
}

/// A system call that is refused, and what its first argument has to be for that.
struct Refused {
    what: &'static str,
    call: c_long,
    command: Option<u64>,
    answer: i32,
}

impl Refused {
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

    /// observer as it is where this is refused.
    fn observer(&self) -> Command {
        let filter = self.filter();
        let mut command = Command::new(BINARY);
        // SAFETY: between fork and exec it makes two system calls, which allocate nothing and take no lock.
        unsafe {
            command.pre_exec(move || seccompiler::apply_filter(&filter).map_err(std::io::Error::other));
        }
        command
    }
}

/// Where a sandbox, a limit or a lack of memory stops observer halfway.
const REFUSED: &[Refused] = &[
    Refused::bpf("a map", 0, libc::ENOMEM),
    Refused::bpf("an entry of a map", 2, libc::ENOMEM),
    Refused::bpf("a program", 5, libc::EPERM),
    Refused::bpf("a run of a program", 10, libc::EPERM),
    Refused::bpf("a BTF tracepoint", 17, libc::EPERM),
    Refused::bpf("types of a program", 18, libc::EPERM),
    Refused::bpf("a link", 28, libc::EPERM),
    Refused::bpf("an iterator", 33, libc::EPERM),
    Refused {
        what: "a plain tracepoint",
        call: libc::SYS_perf_event_open,
        command: None,
        answer: libc::EMFILE,
    },
    Refused { what: "an event queue", call: libc::SYS_epoll_create1, command: None, answer: libc::ENFILE },
];

#[real_test]
fn what_the_kernel_refuses_halfway_is_told() {
    let server = Server::redis();
    for refused in REFUSED {
        let end = End::of(look_at(&mut refused.observer(), server.pid()));
        let why = if end.status.success() {
            end.report().target(server.pid());
            "it does without"
        } else {
            end.failure()
        };
        eprintln!("| {} | {why} |", refused.what);
        wait_until_clean();
    }
    assert!(server.redis_accepts() > 0, "the server does not answer any more");
}

/// Whatever number of descriptors it may have, it works or says that there are too few.
#[real_test]
fn too_few_descriptors_are_told() {
    let server = Server::redis();
    let enough = {
        let observer = Observer::of(server.pid());
        let count = std::fs::read_dir(format!("/proc/{}/fd", observer.pid())).unwrap().count();
        observer.finish();
        count
    };
    let steps = if is_emulated() { 3 } else { 12 };
    for step in 1..=steps {
        let limit = 8 + enough * step / steps;
        let mut command = Command::new("prlimit");
        let end = End::of(look_at(command.arg(format!("--nofile={limit}")).arg(BINARY), server.pid()));
        let why = if end.status.success() { "works" } else { end.failure() };
        eprintln!("| {limit} of {enough} | {why} |");
        assert!(end.status.success() || why.contains("Too many open files"), "{}", end.stderr);
        wait_until_clean();
    }
    assert!(server.redis_accepts() > 0, "the server does not answer any more");
}

/// Kernels before 5.11 count what is in maps and programs as locked memory of the user.
#[real_test]
fn too_little_locked_memory_is_told() {
    let server = Server::redis();
    // Not even root may raise it everywhere.
    for limit in ["65536", "4000000", "8000000"] {
        let mut command = Command::new("prlimit");
        let end = End::of(look_at(command.arg(format!("--memlock={limit}")).arg(BINARY), server.pid()));
        let why = if end.status.success() { "works" } else { end.failure() };
        eprintln!("| {limit} bytes | {why} |");
        wait_until_clean();
    }
}

/// Waits for events until it is killed.
fn victim() -> Told {
    let mut victim = Told::python("import select; e = select.epoll(); print(flush=True); e.poll()");
    victim.said();
    victim
}

#[real_test]
fn a_target_may_die_while_observer_comes() {
    let start = Instant::now();
    Observer::of(victim().pid()).interrupt();
    let time_to_come = start.elapsed();
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
        thread::sleep(time_to_come * round / rounds);
        victim.process.signal(Signal::SIGKILL);
        let pid = victim.pid();
        // Half of them stay as zombies for a moment.
        let kept = (round % 2 == 0).then_some(victim);
        let end = End::when_over(Process(observer));
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
        "{rounds} targets died within {time_to_come:?}: {reported} were reported, of the others it was said"
    );
    wait_until_clean();
}

/// observer where something is put over places in `/proc`.
fn with_covered(covers: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &format!("{covers} && exec \"$@\""), "sh", BINARY]);
    command
}

#[real_test]
fn a_process_that_cannot_be_read_is_not_observed() {
    let server = Server::redis();
    let cover = format!("mount -t tmpfs none /proc/{}", server.pid());
    let end = End::of(look_at(&mut with_covered(&cover), server.pid()));
    assert!(end.failure().contains(&format!("no process has the id {}", server.pid())), "{}", end.stderr);
}

/// Of a process of which only this and that can be read, this and that is told, and what the programs count is exact.
#[real_test]
fn what_cannot_be_read_of_a_process_harms_nothing_else() {
    const CONNECTIONS: u64 = 23;
    let server = Server::asyncio();
    let pid = server.pid();
    let files = ["maps", "mem", "environ", "cgroup", "comm", "syscall", "mountinfo"];
    let files = files.map(|file| format!("mount --bind /dev/null /proc/{pid}/{file}"));
    let folders =
        ["fd", "task", "ns", "map_files"].map(|folder| format!("mount -t tmpfs none /proc/{pid}/{folder}"));
    let covers = files.into_iter().chain(folders).collect::<Vec<_>>().join(" && ");
    for selector in [["--pid".to_owned(), pid.to_string()], ["--comm".into(), "python3".into()]] {
        let selector: Vec<&str> = selector.iter().map(String::as_str).collect();
        let observer =
            Observer::start_by(with_covered(&covers), &[&selector[..], &["--no-listen"]].concat(), &[]);
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

/// A report that nobody can write down is no success.
#[real_test]
fn a_full_disk_is_told() {
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

/// The report is printed all the same: it is all there is of what was observed.
#[real_test]
fn a_full_disk_under_the_flame_graph_is_told() {
    let server = Server::asyncio();
    let pid = server.pid().to_string();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("lag.svg");
    let mut command = Command::new("unshare");
    let run = format!("mount -t tmpfs -o size=4k none {} && exec \"$@\"", folder.path().display());
    command.args(["-m", "sh", "-c", &run, "sh", BINARY, "--pid", &pid, "--no-listen", "--duration", "3s"]);
    let command = command.args(["--format", "json", "--flame"]).arg(&file);
    let end = thread::scope(|scope| {
        let end = scope.spawn(|| End::of(command));
        for _ in 0..20 {
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

/// Stalls that end while observer is held up find no room: they are counted, and all figures but theirs stay exact.
#[real_test]
fn what_finds_no_room_in_a_ring_is_counted() {
    let blocks = if is_emulated() { 2_500_u64 } else { 5_000 };
    let script = format!(
        "import select, socket, sys, time\n\
         e = select.epoll(); a, b = socket.socketpair(); e.register(b); a.send(b'x')\n\
         print(flush=True); sys.stdin.readline()\n\
         for _ in range({blocks}):\n    e.poll(); time.sleep(0.0012)\n\
         print(flush=True); e.unregister(b); e.poll()"
    );
    let mut server = Told::python(&script);
    server.said();
    let pid = server.pid().to_string();
    let observer = Observer::start(&["--pid", &pid, "--no-listen", "--stall-threshold", "1ms"]);
    send(observer.pid(), Signal::SIGSTOP);
    server.tell("");
    // The last slice ends where the next wait begins.
    wait_for("the last wait", || waits_for_events(server.pid(), server.pid()).then_some(()));
    send(observer.pid(), Signal::SIGCONT);
    let report = observer.finish();
    let lost = report.lost("stalls_full");
    let reactor = report.reactor(server.pid());
    let told = reactor["stalls"]["count"].as_u64().unwrap();
    eprintln!("{blocks} stalls: {told} told, {lost} counted as lost");
    assert_eq!(reactor["slices"], blocks, "{reactor:#}");
    assert!(lost > 0 && told > 0, "{reactor:#}");
    assert_eq!(told + lost, blocks, "{reactor:#}");
    assert!(
        report.0["self"]["lost"]
            .as_array()
            .unwrap()
            .iter()
            .all(|l| l["count"] == 0 || l["cause"] == "stalls_full")
    );
}

/// Starts more of everything than there is room for, when it is told to.
const CROWD: &str = "
import os, select, socket, sys, threading
epoll = select.epoll(); print(flush=True); sys.stdin.readline()
for _ in range(40): threading.Thread(target=epoll.poll, daemon=True).start()
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

/// What finds no room is counted, what found some is exact, and what all the room takes of the kernel is told beforehand.
#[real_test]
fn more_than_there_is_room_for_is_counted() {
    let mut crowd = Told::python(CROWD);
    crowd.said();
    let pid = crowd.pid().to_string();
    let start =
        |capacity: &str| Observer::start(&["--pid", &pid, "--listen", "127.0.0.1:0", "--capacity", capacity]);
    let memory = |observer: &Observer| {
        let scrape = observer.scrape();
        let line =
            scrape.lines().find_map(|line| line.strip_prefix("observer_self_map_memory_bytes ")).unwrap();
        let told: u64 = line.parse().unwrap();
        let of_all = observer.map_bytes();
        assert!(told > 0 && told <= of_all, "{told} of {of_all} bytes");
        told
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
    crowd.tell("");
    let report = observer.finish();
    crowd.tell("");
    let lost = ["reactors_full", "listeners_full", "targets_full"].map(|cause| report.lost(cause));
    eprintln!("lost: {lost:?}");
    assert!(lost.iter().all(|&count| count > 0), "{lost:?}");
    let target = report.target(crowd.pid());
    assert_eq!(target["reactors"].as_array().unwrap().len(), 16);
    assert_eq!(target["listeners"].as_array().unwrap().len(), 16);
}
