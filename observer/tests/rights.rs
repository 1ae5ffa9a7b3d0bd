//! What observer may do: it goes on with no more than it needs, says what it cannot do without, and does the rest exactly.

use std::{fs, process::Command};

use serde_json::Value;

use crate::support::{
    http,
    observer::{BINARY, Observer, PublicBinary},
    servers::Server,
};

/// Known operations.
const CONNECTIONS: u32 = 23;

/// Numbers of the capabilities that may be left: `CAP_DAC_READ_SEARCH`, `CAP_SYS_PTRACE`, `CAP_SYS_ADMIN`, `CAP_PERFMON`,
/// `CAP_BPF`, `CAP_SYSLOG`.
const KEPT: [u32; 6] = [2, 19, 21, 38, 39, 34];

/// A command in a mount namespace of its own, after `preparation`, with these capabilities and no way to others.
fn with_only(capabilities: &str, preparation: &str) -> Command {
    let mut command = Command::new("unshare");
    let run = format!(
        "{preparation} && exec /usr/bin/setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,{capabilities} \"$0\" \"$@\""
    );
    command.args(["--mount", "sh", "-c", &run, BINARY]);
    command
}

/// Where nobody has mounted it, whoever has no right to needs it mounted.
const TRACEFS: &str = "{ mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing; }";

#[real_test]
fn what_is_not_needed_is_given_up() {
    let server = Server::asyncio();
    let observer = Observer::of(server.pid());
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

/// As where a platform team grants no `CAP_SYS_ADMIN`, which kernels ask for since July 2025 before they attach to
/// functions.
#[real_test(programs(&["setpriv", "unshare"]))]
fn without_the_right_to_attach_to_functions_the_rest_is_exact() {
    let server = Server::asyncio();
    // Before 5.11, maps are locked memory.
    let rights = || {
        with_only(
            "+bpf,+perfmon,+sys_ptrace,+dac_read_search",
            &format!("{TRACEFS} && {{ ulimit -l unlimited || true; }}"),
        )
    };
    let flags = ["--pid", &server.pid().to_string(), "--no-listen"];
    // Debian's kernels ask for it before they attach to anything, unless told otherwise.
    let paranoid = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap();
    if paranoid.trim().parse::<i32>().unwrap() > 2 {
        let (code, output) = check(rights());
        assert_eq!(code, Some(1), "{output}");
        let said = said_of(&output, "perf_event_open()");
        assert!(said.starts_with("NO ") && said.contains("kernel.perf_event_paranoid is"), "{said}");
        return;
    }
    let observer = Observer::start_by(rights(), &flags, &[]);
    for _ in 0..CONNECTIONS {
        http::get(server.port, "/");
    }
    let report = observer.finish();
    let listener = report.listener(server.port);
    assert_eq!(listener["accepts"], CONNECTIONS);
    assert_eq!(listener["wait"]["count"], CONNECTIONS);
    assert!(report.target(server.pid())["reactors"][0]["slices"].as_u64() >= Some(1));
    let missing = report.0["self"]["missing"].as_array().unwrap();
    let is_told = |what: &str| missing.iter().any(|m| m["source"].as_str().unwrap().contains(what));
    let is_followed = report.target(server.pid())["deferred"] != Value::Array(Vec::new());
    assert!(is_followed || is_told("deferred work of asyncio"), "{missing:?}");
}

/// What `check` says of one thing, its reason and cure included.
#[track_caller]
fn said_of(output: &str, name: &str) -> String {
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
fn a_user_without_rights_is_told_of_each() {
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
        let said = said_of(&output, name);
        assert!(said.starts_with("NO ") && said.contains(reason), "{said}");
        assert!(said.contains("cure: "), "{said}");
    }
    // Nobody has looked whether the kernel has it.
    for (name, cure) in [
        ("eBPF programs", "see CAP_BPF"),
        ("ring buffer", "see CAP_BPF"),
        ("tracefs", "see CAP_SYS_ADMIN above, or mount it"),
        ("system call tracepoints", "see tracefs above"),
        ("BTF tracepoints", "see tracefs above"),
        ("io_uring tracepoints", "see tracefs above"),
    ] {
        let said = said_of(&output, name);
        // With tracefs mounted for all, there is nothing to mend in it.
        assert!(said.starts_with("yes ") || said.contains(&format!("cure: {cure}")), "{said}");
    }
    assert!(!output.contains("upgrade to Linux"), "{output}");
}

#[real_test(programs(&["setpriv", "unshare"]))]
fn what_this_machine_lacks_is_named() {
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
        let said = said_of(&output, name);
        assert_eq!(code, Some(1), "{output}");
        assert!(said.starts_with("NO ") && said.contains(reason), "{said}");
    }
}

#[real_test]
fn a_process_is_looked_at_before_it_is_observed() {
    let server = Server::asyncio();
    let check = |pid: u32| {
        let output = Command::new(BINARY).args(["check", "--pid", &pid.to_string()]).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, output) = check(server.pid());
    assert_eq!(code, Some(0), "{output}");
    for name in [&format!("process {}", server.pid()), "serves", "64-bit program", "memory", "CPython 3.1"] {
        assert!(said_of(&output, name).starts_with("yes "), "{output}");
    }
    let (code, output) = check(2);
    assert_eq!(code, Some(1), "{output}");
    let said = said_of(&output, "process 2");
    assert!(said.starts_with("NO ") && said.contains("kernel thread"), "{said}");
}
