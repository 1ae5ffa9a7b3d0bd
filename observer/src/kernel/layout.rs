//! Determines the `KernelLayout` for the programs: member offsets from BTF, record offsets from tracefs. The fields are
//! listed in `observer-common/src/layout.rs`.

use anyhow::{Context as _, Result, bail, ensure};
use observer_common::{layout::KernelLayout, ring::RingShape};

use super::{btf::Btf, tracefs};

/// BTF of the running kernel.
pub(crate) const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// System calls with the last argument that the programs read, and its index. If the kernel lacks a call, the programs
/// for it are not attached.
const ENTER_ARGUMENTS: &[(&str, &str, u32)] = &[
    ("accept", "fd", 0),
    ("connect", "fd", 0),
    ("listen", "fd", 0),
    ("epoll_wait", "timeout", 3),
    ("epoll_pwait", "timeout", 3),
    ("epoll_pwait2", "timeout", 3),
    ("io_uring_enter", "flags", 3),
    ("poll", "timeout_msecs", 2),
    ("ppoll", "tsp", 2),
    ("select", "tvp", 4),
    ("pselect6", "tsp", 4),
];

/// The layout of the running kernel. Fails with the name of the first item that is missing.
pub(crate) fn of_running_kernel() -> Result<KernelLayout> {
    let data = std::fs::read(VMLINUX).with_context(|| format!("cannot read {VMLINUX}"))?;
    let btf = Btf::parse(&data)?;
    let mut layout = members(&btf)?;
    layout.switch_has_state = u32::from(switch_has_state(&btf)?);
    layout.ring_shape = ring_shape(&btf) as u32;
    layout.enter_arguments = tracefs::offset("syscalls/sys_enter_accept4", "fd")?;
    for (call, argument, index) in ENTER_ARGUMENTS {
        let event = format!("syscalls/sys_enter_{call}");
        if tracefs::has(&event) {
            let expected = layout.enter_arguments + 8 * index;
            let offset = tracefs::offset(&event, argument)?;
            ensure!(
                offset == expected,
                "{event}: unsupported offset {offset} of {argument}, expected {expected}"
            );
        }
    }
    layout.exit_ret = tracefs::offset("syscalls/sys_exit_accept4", "ret")?;
    // One program serves the exits of several calls, so their records must have the same layout.
    for call in ["accept"].into_iter().chain(ENTER_ARGUMENTS.iter().map(|(call, ..)| *call)) {
        let event = format!("syscalls/sys_exit_{call}");
        if tracefs::has(&event) {
            let ret = tracefs::offset(&event, "ret")?;
            ensure!(
                ret == layout.exit_ret,
                "{event}: unsupported offset {ret} of ret, expected {}",
                layout.exit_ret
            );
        }
    }
    Ok(layout)
}

/// Whether maps count as locked memory of their creator, as before Linux 5.11; `true` if BTF cannot be read.
pub(super) fn maps_are_locked_memory() -> bool {
    let data = std::fs::read(VMLINUX).unwrap_or_default();
    Btf::parse(&data).map_or(true, |btf| btf.offset("bpf_map_memory", "pages").is_some())
}

/// Reads the offsets of members from BTF. Fails if a required member is missing.
pub(crate) fn members(btf: &Btf) -> Result<KernelLayout> {
    let mut layout = KernelLayout::ZERO;
    for (structure, alternatives, field) in KernelLayout::MEMBERS {
        *field(&mut layout) = alternatives
            .split('|')
            .find_map(|path| btf.offset(structure, path))
            .with_context(|| format!("this kernel's BTF has no {structure}.{alternatives}"))?;
    }
    for (structure, alternatives, field) in KernelLayout::OPTIONAL {
        if let Some(offset) = alternatives.split('|').find_map(|path| btf.offset(structure, path)) {
            *field(&mut layout) = offset;
        }
    }
    Ok(layout)
}

/// Whether the arguments of `sched_switch` include the previous state: (data, preempt, prev, next[, prev_state]). Early
/// 5.18 passed it before `prev`; such a kernel is refused rather than misread.
pub(crate) fn switch_has_state(btf: &Btf) -> Result<bool> {
    let arguments =
        btf.tracepoint_arguments("sched_switch").context("this kernel's BTF has no sched_switch")?;
    match arguments[..] {
        [true, false, true, true] => Ok(false),
        [true, false, true, true, false] => Ok(true),
        _ => bail!("the argument order of this kernel's sched_switch is unsupported"),
    }
}

/// What the tracepoints of io_uring pass, derived from which of their arguments are pointers.
pub(crate) fn ring_shape(btf: &Btf) -> RingShape {
    let arguments = |name| btf.tracepoint_arguments(name);
    let submission = arguments("io_uring_submit_req").or_else(|| arguments("io_uring_submit_sqe"));
    let (Some(submission), Some(wakeup), Some(completion)) =
        (submission, arguments("io_uring_task_add"), arguments("io_uring_complete"))
    else {
        return RingShape::Unknown;
    };
    // The first argument is the tracepoint's private data.
    match (&submission[1..], &wakeup[1..], &completion[1..]) {
        ([true, true, false, false, ..], [true, false, false, false], [true, false, false, false]) => {
            RingShape::Loose
        }
        ([true] | [true, false], [true, false], [true, true, false, false, false, ..]) => RingShape::Request,
        ([true] | [true, false], [true, false], [true, true, true]) => RingShape::Entry,
        _ => RingShape::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use observer_common::layout::ABSENT;

    use super::*;

    /// Offsets in the order of `KernelLayout::MEMBERS` and `OPTIONAL`, as printed by bpftool for each kernel (see
    /// `tests/btf`).
    #[rustfmt::skip]
    const KERNELS: [(&str, &[u8], [u32; 63]); 4] = [
        ("5.10", include_bytes!("../../tests/btf/5.10.btf"), [2232, 2236, 16, 24, 2808, 2832, 4, 32, 0, 8, 200, 32, 64, 0, 16, 24, 16, 14, 48, 540, 18, 4, 72, 538, 168, 224, 208, 24, 640, 576, 580, 144, 988, 1000, 980, 136, 200, 768, 856, 4, 12, 24, 16, 8, 120, 112, 104, 96, 32, 0, 72, 88, 80, 104, ABSENT, 28, 0, 8, 12, 5032, ABSENT, 1192, ABSENT]),
        ("6.1", include_bytes!("../../tests/btf/6.1.btf"), [2416, 2420, 24, 32, 3048, 3072, 4, 32, 0, 8, 200, 32, 64, 0, 16, 24, 16, 14, 48, 516, 18, 4, 72, 514, 184, 232, 216, 24, 624, 552, 556, 144, 1004, 1016, 996, 136, 200, 776, 864, 4, 8, 24, 16, 8, 120, 112, 104, 96, 32, 0, 64, 68, 88, 72, 84, 28, 0, 8, 12, 5352, 1736, 1256, 208]),
        ("6.12", include_bytes!("../../tests/btf/6.12.btf"), [2432, 2436, 24, 32, 3048, 3072, 4, 32, 0, 8, 32, 40, 64, 0, 16, 24, 16, 14, 48, 574, 18, 4, 72, 572, 136, 184, 168, 24, 288, 604, 608, 136, 1012, 1024, 1004, 136, 200, 776, 864, 4, 8, 24, 16, 8, 120, 112, 104, 96, 32, 0, 64, 72, 96, 80, 92, 32, 0, 8, 12, 5416, 1792, 1264, 224]),
        ("6.18", include_bytes!("../../tests/btf/6.18.btf"), [1264, 1268, 24, 32, 1824, 1848, 4, 32, 0, 8, 24, 32, 64, 0, 16, 24, 16, 14, 48, 532, 18, 4, 72, 534, 136, 184, 168, 24, 288, 600, 604, 176, 1024, 1032, 1020, 136, 200, 784, 872, 4, 8, 24, 16, 8, 120, 112, 104, 96, 32, 0, 64, 72, 96, 80, 92, 32, 0, 8, 12, 3128, 1712, 1232, 224]),
    ];

    #[test]
    fn member_offsets_match_bpftool() {
        for (series, btf, expected) in KERNELS {
            let mut layout = members(&Btf::parse(btf).unwrap()).unwrap();
            let all = KernelLayout::MEMBERS.iter().chain(KernelLayout::OPTIONAL);
            for ((structure, path, field), expected) in all.zip(expected) {
                assert_eq!(*field(&mut layout), expected, "{structure}.{path} of {series}");
            }
        }
    }

    #[test]
    fn the_running_kernel_has_every_member() {
        let data = std::fs::read(VMLINUX).unwrap();
        let btf = Btf::parse(&data).unwrap();
        members(&btf).unwrap();
        switch_has_state(&btf).unwrap();
        // Debian's kernels have io_uring, and observer supports all of their tracepoints.
        assert_ne!(ring_shape(&btf), RingShape::Unknown);
    }

    #[test]
    fn missing_types_and_members_are_not_found() {
        let btf = Btf::parse(KERNELS[0].1).unwrap();
        assert_eq!(btf.offset("task_struct", "no_such_member"), None);
        assert_eq!(btf.offset("no_such_struct", "pid"), None);
        assert_eq!(btf.offset("task_struct", "pid.deeper"), None);
        assert_eq!(btf.tracepoint_arguments("no_such_event"), None);
    }

    #[test]
    fn malformed_btf_is_an_error() {
        let whole = KERNELS[0].1;
        for length in 0..whole.len() {
            assert!(Btf::parse(&whole[..length]).is_err(), "cut at {length}");
        }
        let mut other_order = whole.to_vec();
        other_order.swap(0, 1);
        assert!(Btf::parse(&other_order).is_err());
    }
}
