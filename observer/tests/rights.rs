//! Capabilities: observer drops those that it does not need, reports what it cannot do without the others, and does the
//! rest exactly.

use std::{fs, process::Command};

use serde_json::Value;

use crate::support::{
    http,
    observer::{BINARY, Observer, PublicBinary},
    servers::Server,
};

/// Number of connections of a test.
const CONNECTIONS: u32 = 23;

/// Numbers of the capabilities that observer may keep: `CAP_DAC_READ_SEARCH`, `CAP_SYS_PTRACE`, `CAP_SYS_ADMIN`,
/// `CAP_PERFMON`, `CAP_BPF`, `CAP_SYSLOG`.
const KEPT: [u32; 6] = [2, 19, 21, 38, 39, 34];

/// observer in a new mount namespace, after `preparation`, with only these capabilities.
fn with_only(capabilities: &str, preparation: &str) -> Command {
    let mut command = Command::new("unshare");
    let run = format!(
        "{preparation} && exec /usr/bin/setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,{capabilities} \"$0\" \"$@\""
    );
    command.args(["--mount", "sh", "-c", &run, BINARY]);
    command
}

/// Mounts tracefs if it is not mounted, because a process without `CAP_SYS_ADMIN` cannot.
const TRACEFS: &str = "{ mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing; }";

#[real_test]
fn unneeded_capabilities_are_dropped() {
    let server = Server::asyncio();
    let observer = Observer::attach(server.pid());
    let allowed = KEPT.iter().fold(0_u64, |mask, number| mask | 1 << number);
    for thread in fs::read_dir(format!("/proc/{}/task", observer.pid())).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let value = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim();
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            let held = u64::from_str_radix(value(set), 16).unwrap();
            assert_eq!(held & !allowed, 0, "{set} {held:x}");
        }
        assert_eq!(value("NoNewPrivs:"), "1");
    }
    http::get(server.port, "/");
    assert_eq!(observer.finish().listener(server.port)["accepts"], 1);
}

/// Without `CAP_SYS_ADMIN`, as some platform teams require. Since July 2025, kernels require it to attach to functions.
#[real_test(programs(&["setpriv", "unshare"]))]
fn without_sys_admin_all_but_uprobes_works() {
    let server = Server::asyncio();
    // Kernels before 5.11 count maps as locked memory.
    let rights = || {
        with_only(
            "+bpf,+perfmon,+sys_ptrace,+dac_read_search",
            &format!("{TRACEFS} && {{ ulimit -l unlimited || true; }}"),
        )
    };
    let flags = ["--pid", &server.pid().to_string(), "--no-listen"];
    // By default, Debian's kernels require it to attach to anything.
    let paranoid = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap();
    if paranoid.trim().parse::<i32>().unwrap() > 2 {
        let (code, output) = check(rights());
        assert_eq!(code, Some(1), "{output}");
        let item = item_of(&output, "perf_event_open()");
        assert!(item.starts_with("NO ") && item.contains("kernel.perf_event_paranoid is"), "{item}");
        return;
    }
    let observer = Observer::start_command(rights(), &flags, &[]);
    for _ in 0..CONNECTIONS {
        http::get(server.port, "/");
    }
    let report = observer.finish();
    let listener = report.listener(server.port);
    assert_eq!(listener["accepts"], CONNECTIONS);
    assert_eq!(listener["wait"]["count"], CONNECTIONS);
    assert!(report.target(server.pid())["reactors"][0]["slices"].as_u64() >= Some(1));
    let missing = report.0["self"]["missing"].as_array().unwrap();
    let is_missing = |what: &str| missing.iter().any(|m| m["source"].as_str().unwrap().contains(what));
    let is_followed = report.target(server.pid())["deferred"] != Value::Array(Vec::new());
    assert!(is_followed || is_missing("deferred tasks of asyncio"), "{missing:?}");
}

/// What `check` prints about one item, including its reason and cure.
#[track_caller]
fn item_of(output: &str, name: &str) -> String {
    let lines: Vec<_> = output.lines().collect();
    let at = lines.iter().position(|line| line.get(5..).is_some_and(|rest| rest.starts_with(name)));
    let at = at.unwrap_or_else(|| panic!("{name} in {output}"));
    let rest = lines[at + 1..].iter().take_while(|line| line.starts_with(' '));
    [&lines[at]].into_iter().chain(rest).copied().collect::<Vec<_>>().join("\n")
}

fn check(mut command: Command) -> (Option<i32>, String) {
    let output = command.arg("check").output().unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[real_test]
fn check_lists_each_missing_capability() {
    let binary = PublicBinary::new();
    let (code, output) = check(binary.as_nobody());
    assert_eq!(code, Some(1), "{output}");
    for (name, reason) in [
        ("CAP_BPF", "running as user 65534, not root"),
        ("CAP_PERFMON", "running as user 65534, not root"),
        ("CAP_SYS_PTRACE", "add the capability SYS_PTRACE"),
        ("bpf()", "kernel.unprivileged_bpf_disabled"),
        ("perf_event_open()", "kernel.perf_event_paranoid"),
    ] {
        let item = item_of(&output, name);
        assert!(item.starts_with("NO ") && item.contains(reason), "{item}");
        assert!(item.contains("cure: "), "{item}");
    }
    // Whether the kernel supports these is unknown without the capabilities.
    for (name, cure) in [
        ("eBPF programs", "see CAP_BPF"),
        ("ring buffer", "see CAP_BPF"),
        ("tracefs", "see CAP_SYS_ADMIN above, or mount it"),
        ("system call tracepoints", "see tracefs above"),
        ("BTF tracepoints", "see tracefs above"),
        ("io_uring tracepoints", "see tracefs above"),
    ] {
        let item = item_of(&output, name);
        // If tracefs is mounted for all users, nothing has to be fixed.
        assert!(item.starts_with("yes ") || item.contains(&format!("cure: {cure}")), "{item}");
    }
    assert!(!output.contains("upgrade to Linux"), "{output}");
}

#[real_test(programs(&["setpriv", "unshare"]))]
fn check_names_what_the_machine_lacks() {
    let all = "+bpf,+perfmon,+sys_ptrace,+dac_read_search,+sys_resource";
    let lockdown = "mount -t tmpfs none /sys/kernel/security 2>/dev/null && \
                    echo 'none integrity [confidentiality]' > /sys/kernel/security/lockdown";
    for (preparation, name, reason) in [
        ("mount -t tmpfs none /sys/kernel/btf", "BTF of the kernel", "no /sys/kernel/btf/vmlinux"),
        (
            "mount -t tmpfs none /sys/kernel/tracing && mount -t tmpfs none /sys/kernel/debug",
            "tracefs",
            "cannot",
        ),
        (lockdown, "lockdown", "lockdown is `confidentiality`"),
        ("mount -t tmpfs -o mode=700 none /proc/1", "/proc shows all processes", "cannot access /proc/1/ns"),
    ] {
        let (code, output) = check(with_only(all, &format!("{TRACEFS} && {preparation}")));
        let item = item_of(&output, name);
        assert_eq!(code, Some(1), "{output}");
        assert!(item.starts_with("NO ") && item.contains(reason), "{item}");
    }
}

#[real_test]
fn check_describes_a_process() {
    let server = Server::asyncio();
    let check = |pid: u32| {
        let output = Command::new(BINARY).args(["check", "--pid", &pid.to_string()]).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, output) = check(server.pid());
    assert_eq!(code, Some(0), "{output}");
    for name in [&format!("process {}", server.pid()), "serves", "64-bit program", "memory", "CPython 3.1"] {
        assert!(item_of(&output, name).starts_with("yes "), "{output}");
    }
    let (code, output) = check(2);
    assert_eq!(code, Some(1), "{output}");
    let item = item_of(&output, "process 2");
    assert!(item.starts_with("NO ") && item.contains("kernel thread"), "{item}");
}
