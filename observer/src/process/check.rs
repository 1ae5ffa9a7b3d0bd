//! What can be seen of a process, told before it is observed: its sockets, its memory, its runtimes and their functions.

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
    finding::Finding,
    stacks::{interpreter::Interpreter, mappings::Mappings, memory::Live},
};

/// Fifth byte of an ELF file for machine words of 64 bits.
const ELF_CLASS_64: u8 = 2;

/// Looks at a process. Whoever cannot be observed at all has one finding alone.
pub(crate) fn findings(pid: u32, runtimes: Runtimes) -> Vec<Finding> {
    let process = Process::of(pid);
    let place = [
        process.place.container.as_deref().map(|id| format!(", container {id}")),
        process
            .place
            .kubernetes
            .as_ref()
            .map(|pod| format!(", pod {}", pod.name.as_deref().unwrap_or(&pod.uid))),
        process.place.unit.as_deref().map(|unit| format!(", {unit}")),
    ];
    let place: String = place.into_iter().flatten().collect();
    let observable = ensure_observable(pid);
    let is_observable = observable.is_ok();
    let mut findings = vec![Finding {
        name: format!("process {pid}"),
        purpose: format!("{} {}{place}", process.comm, process.exe),
        required: true,
        cure: observable.as_ref().err().map(|failure| failure.cure.clone()).unwrap_or_default(),
        outcome: observable.map_err(|failure| failure.what),
    }];
    if is_observable {
        findings.push(finding(
            "serves",
            "listens, or has what event loops wait on",
            if criteria::is_server(pid) {
                Ok(())
            } else {
                Err("it has neither a listener nor an epoll set nor an io_uring".into())
            },
            "nothing: it is seen from the moment when it has; loops that poll or select: --reactor-calls",
        ));
        // Whether it can be read is told below.
        if let Ok(is_64_bit) = is_64_bit(pid) {
            findings.push(finding(
                "64-bit program",
                "system calls are told apart by their numbers",
                if is_64_bit { Ok(()) } else { Err("it is a 32-bit program".into()) },
                "a 64-bit program: what this one blocks in is told wrong, all else is right",
            ));
        }
        findings.extend(code(pid, runtimes));
    }
    findings
}

/// One that the main job goes without.
fn finding(name: &str, purpose: &str, outcome: Result<(), String>, cure: &str) -> Finding {
    Finding { name: name.into(), purpose: purpose.into(), required: false, outcome, cure: cure.into() }
}

fn is_64_bit(pid: u32) -> io::Result<bool> {
    let mut head = [0; 5];
    File::open(format!("/proc/{pid}/exe"))?.read_exact(&mut head)?;
    Ok(head[4] == ELF_CLASS_64)
}

/// What is known of the code it runs.
fn code(pid: u32, mut runtimes: Runtimes) -> Vec<Finding> {
    let rights = "see CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH above";
    let memory = Live::of(pid).map(drop).map_err(|error| error.to_string());
    let is_read = memory.is_ok();
    let mut findings = vec![finding("memory", "functions that were on top in a stall", memory, rights)];
    if !is_read {
        return findings;
    }
    match Interpreter::of(pid) {
        Ok(None) => {}
        Ok(Some(interpreter)) => findings.push(finding(
            &interpreter.name,
            "its own functions by name",
            interpreter.readable(),
            "nothing: native functions are named instead",
        )),
        Err(error) => findings.push(finding("runtime", "functions by name", Err(error.to_string()), rights)),
    }
    let Ok(mappings) = Mappings::of(pid) else { return findings };
    let found = runtimes.of(&mappings);
    for (at, runtime) in found.iter().enumerate() {
        let profile = &runtime.profile;
        if let Some(collector) = &runtime.collector {
            findings.push(finding(
                &runtime.name,
                "garbage collections",
                collector.as_ref().map(drop).map_err(Clone::clone),
                "a build of the runtime with these probes, as distributions have it",
            ));
        }
        if !profile.hooks.is_empty() {
            let copies =
                |found: &[Runtime]| found.iter().filter(|r| Arc::ptr_eq(&r.profile, profile)).count();
            let copy = Copy { number: copies(&found[..at]), of: copies(&found) };
            let hooks = Finder::of(&mappings, runtime, copy).and_then(|finder| finder.all().map(drop));
            findings.push(finding(
                &runtime.name,
                "deferred work, tied to its requests",
                hooks,
                "a version that the profile knows (`observer profiles`), or a profile of your own: docs/profiles.md",
            ));
        }
    }
    findings.extend(runtimes.unmet().into_iter().map(|(profile, why)| {
        let cure = "the name as `nm -D` or /proc/PID/maps shows it, and a process that has it loaded by now";
        finding(&format!("profile {profile}"), "deferred work, tied to its requests", Err(why), cure)
    }));
    findings
}
