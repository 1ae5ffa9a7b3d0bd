//! Findings of `observer check --pid`: whether a process can be observed, and how much of its sockets, memory and
//! runtimes.

use std::{
    fs::File,
    io::{self, Read as _},
    sync::Arc,
};

use super::{
    criteria,
    hooks::{Copy, Finder},
    info::{Process, ensure_observable},
    runtime::{Runtime, Runtimes},
};
use crate::{
    binary::{mappings::Mappings, memory::ProcessMemory},
    check_result::CheckResult,
    stacks::interpreter::Interpreter,
};

/// `e_ident[EI_CLASS]` of a 64-bit ELF file.
const ELF_CLASS_64: u8 = 2;

/// Checks a process. If it cannot be observed, returns that finding alone.
pub(crate) fn findings(pid: u32, runtimes: Runtimes) -> Vec<CheckResult> {
    let process = Process::of(pid);
    let workload = [
        process.workload.container.as_deref().map(|id| format!(", container {id}")),
        process
            .workload
            .kubernetes
            .as_ref()
            .map(|pod| format!(", pod {}", pod.name.as_deref().unwrap_or(&pod.uid))),
        process.workload.unit.as_deref().map(|unit| format!(", {unit}")),
    ];
    let workload: String = workload.into_iter().flatten().collect();
    let observable = ensure_observable(pid);
    let is_observable = observable.is_ok();
    let mut findings = vec![CheckResult {
        name: format!("process {pid}"),
        purpose: format!("{} {}{workload}", process.comm, process.exe),
        required: true,
        cure: observable.as_ref().err().map(|failure| failure.cure.clone()).unwrap_or_default(),
        outcome: observable.map_err(|failure| failure.what),
    }];
    if is_observable {
        findings.push(optional(
            "serves",
            "listens on a socket, or has an epoll set or an io_uring",
            if criteria::is_server(pid) {
                Ok(())
            } else {
                Err("it has no listener, no epoll set and no io_uring".into())
            },
            "none needed: it is observed once it has one; for loops that poll or select, use --reactor-calls",
        ));
        // An unreadable executable is reported by the checks of the code below.
        if let Ok(is_64_bit) = is_64_bit(pid) {
            findings.push(optional(
                "64-bit program",
                "system calls are identified by their numbers",
                if is_64_bit { Ok(()) } else { Err("it is a 32-bit program".into()) },
                "run a 64-bit program: the calls that this one blocks in are misreported, all else is right",
            ));
        }
        findings.extend(code_findings(pid, runtimes));
    }
    findings
}

/// A finding about something optional.
fn optional(name: &str, purpose: &str, outcome: Result<(), String>, cure: &str) -> CheckResult {
    CheckResult { name: name.into(), purpose: purpose.into(), required: false, outcome, cure: cure.into() }
}

fn is_64_bit(pid: u32) -> io::Result<bool> {
    let mut head = [0; 5];
    File::open(format!("/proc/{pid}/exe"))?.read_exact(&mut head)?;
    Ok(head[4] == ELF_CLASS_64)
}

/// Checks the memory of a process, its interpreter, its runtimes and the profiles that the user asked for.
fn code_findings(pid: u32, mut runtimes: Runtimes) -> Vec<CheckResult> {
    let rights = "see CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH above";
    let memory = ProcessMemory::of(pid).map(drop).map_err(|error| error.to_string());
    let is_read = memory.is_ok();
    let mut findings = vec![optional("memory", "functions on the stack during a stall", memory, rights)];
    if !is_read {
        return findings;
    }
    match Interpreter::of(pid) {
        Ok(None) => {}
        Ok(Some(interpreter)) => findings.push(optional(
            &interpreter.name,
            "interpreted functions by name",
            interpreter.readable(),
            "none needed: native functions are named instead",
        )),
        Err(error) => findings.push(optional("runtime", "functions by name", Err(error.to_string()), rights)),
    }
    let Ok(mappings) = Mappings::of(pid) else { return findings };
    let found = runtimes.of(&mappings);
    for (at, runtime) in found.iter().enumerate() {
        let profile = &runtime.profile;
        if let Some(collector) = &runtime.collector {
            findings.push(optional(
                &runtime.name,
                "garbage collections",
                collector.as_ref().map(drop).map_err(Clone::clone),
                "use a build of the runtime with these probes, such as those of distributions",
            ));
        }
        if !profile.hooks.is_empty() {
            let copies =
                |found: &[Runtime]| found.iter().filter(|r| Arc::ptr_eq(&r.profile, profile)).count();
            let copy = Copy { number: copies(&found[..at]), of: copies(&found) };
            let hooks = Finder::of(&mappings, runtime, copy).and_then(|finder| finder.all().map(drop));
            findings.push(optional(
                &runtime.name,
                "deferred tasks and their origins",
                hooks,
                "use a version that the profile supports (`observer profiles`), or write a profile: docs/profiles.md",
            ));
        }
    }
    findings.extend(runtimes.unmet().into_iter().map(|(profile, why)| {
        let cure =
            "check the name with `nm -D` or in /proc/PID/maps; the process must have loaded the module";
        optional(&format!("profile {profile}"), "deferred tasks and their origins", Err(why), cure)
    }));
    findings
}
