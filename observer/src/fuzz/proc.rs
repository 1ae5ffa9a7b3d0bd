//! Targets for text from `/proc` and tracefs, and for names in log folders. Observed processes choose much of it: names,
//! paths, cgroups.

use std::path::Path;

use procfs::{
    FromRead, FromReadSI as _, ProcessCGroups, current_system_info,
    net::{TcpNetEntries, UnixNetEntries},
    process::{Stat, Status},
};

use super::{files::names, input::choice};
use crate::{
    binary::mappings::{Mappings, module_name},
    kernel::tracefs,
    process::{
        container, criteria, drops, identity, pod,
        wait_call::{self, WaitCall},
    },
    stacks::{interpreter::innermost_id, reader},
};

/// A letter that selects the parser, followed by the text.
pub(super) fn proc(data: &[u8]) {
    let (parser, bytes) = choice(data);
    let text = String::from_utf8_lossy(bytes);
    match parser.saturating_sub(b'a') {
        0 => format(&text),
        1 => maps(bytes),
        2 => cgroups(bytes),
        3 => drop(drops::parse(&text)),
        4 => syscall(&text),
        5 => stack(&text),
        6 => status(bytes, &text),
        7 => sockets(bytes),
        8 => logs(&text),
        _ => {
            let (pattern, name) = text.split_once('\n').unwrap_or_default();
            names(pattern, name.as_bytes());
        }
    }
}

/// The `format` file of a tracepoint.
fn format(text: &str) {
    for field in ["fd", "ret", "common_type", ""] {
        if let Some(offset) = tracefs::field_offset(text, field) {
            assert!(text.contains(&offset.to_string()) || text.contains('+') || text.contains('0'));
        }
    }
}

/// `/proc/PID/maps`.
fn maps(bytes: &[u8]) {
    let mappings = Mappings::parse(1, bytes);
    let _ = mappings.vdso();
    for address in [0, 0x1000, 0x7f00_0000_1000, u64::MAX] {
        let found = mappings.find(address);
        assert!(found.is_none_or(|map| (map.address.0..map.address.1).contains(&address)));
    }
    for map in mappings.modules() {
        assert!(module_name(map).is_none_or(|name| !name.contains('/')));
    }
    let _ = mappings.modules_named("lib").count();
}

/// `/proc/PID/cgroup`.
fn cgroups(bytes: &[u8]) {
    let Ok(cgroups) = ProcessCGroups::from_read(bytes) else { return };
    let found = identity::in_cgroups(&cgroups);
    assert!(found.container.is_none_or(|id| container::is_id(&id)));
    assert!(found.kubernetes.is_none_or(|pod| pod::is_uid(&pod.uid)));
    assert!(found.unit.is_none_or(|unit| unit.ends_with(".service") && !unit.contains('/')));
    for cgroup in (&cgroups).into_iter().filter(|cgroup| cgroup.pathname.starts_with('/')) {
        assert!(criteria::is_below(&cgroup.pathname, "/"));
        assert!(criteria::is_below(&cgroup.pathname, cgroup.pathname.trim_end_matches('/')));
    }
}

/// `/proc/PID/task/TID/syscall`.
fn syscall(text: &str) {
    let all = [WaitCall::Epoll, WaitCall::IoUring, WaitCall::Poll, WaitCall::Select];
    let memory = |at: u64, into: &mut [u8]| {
        into.fill(at.to_le_bytes()[0]);
        (at < 1 << 47).then_some(())
    };
    let _ = wait_call::parse(text, &all, memory);
    if let Some(registers) = reader::blocked_registers(text, 5) {
        assert_eq!(registers.bp, 5);
    }
}

/// `/proc/PID/task/TID/stack`.
fn stack(text: &str) {
    let functions = reader::parse_kernel_stack(text);
    assert!(functions.len() <= text.lines().count());
    assert!(functions.iter().all(|name| !name.contains(['\n', '+'])));
}

/// `/proc/PID/status`, and `/proc/PID/stat` with the text's first line as the name.
fn status(bytes: &[u8], text: &str) {
    /// The fields after the name, which the kernel writes.
    const REST: &str = " S 1 7 7 0 -1 4194560 1 0 0 0 3 1 0 0 20 0 1 0 123 5000000 900 18446744073709551615 1 1 0 0 0 0 0 \
        16781312 0 0 0 0 17 1 0 0 0 0 0 0 0 0 0 0 0 0 0\n";

    let _ = innermost_id(text, 7);
    let _ = Status::from_read(bytes);
    // The process chooses only the name.
    let name = text.lines().next().unwrap_or_default();
    let stat = Stat::from_read(format!("7 ({name}){REST}").as_bytes()).expect("parse stat");
    assert_eq!(stat.comm, name);
    assert!(stat.flags().is_ok() && stat.ppid == 1);
}

/// `/proc/net/tcp` and `/proc/net/unix`.
fn sockets(bytes: &[u8]) {
    if let Ok(TcpNetEntries(entries)) = TcpNetEntries::from_read(bytes, current_system_info()) {
        assert!(entries.len() <= bytes.len());
    }
    if let Ok(UnixNetEntries(entries)) = UnixNetEntries::from_read(bytes) {
        assert!(entries.len() <= bytes.len());
    }
}

/// The name of a pod's log folder, or the name and the target of a container's log link.
fn logs(text: &str) {
    if let Some(pod) = pod::of_folder(text) {
        assert!(pod::is_uid(&pod.uid));
        let names = [pod.namespace, pod.name].map(Option::unwrap_or_default);
        assert_eq!(format!("{}_{}_{}", names[0], names[1], pod.uid), *text);
    }
    let (name, target) = text.split_once('\n').unwrap_or_default();
    if let Some(link) = pod::Link::parse(name, || Some(Path::new(target).into())) {
        assert!(container::is_id(&link.id) && pod::is_uid(&link.pod.uid));
        assert!(link.pod.container.is_some_and(|name| !name.contains('/')));
    }
}
