//! Puts together the `KernelLayout` that is injected into the programs: members from BTF, records from tracefs.

use anyhow::{Context as _, Result, bail, ensure};
use observer_common::layout::KernelLayout;

use super::{btf::Btf, tracefs};

/// Types of the running kernel.
pub(crate) const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

/// Everything the programs need to know of the running kernel. Fails with the name of the first thing missing.
pub(crate) fn of_running_kernel() -> Result<KernelLayout> {
    let data = std::fs::read(VMLINUX).with_context(|| format!("cannot read {VMLINUX}"))?;
    let btf = Btf::parse(&data)?;
    let mut layout = members(&btf)?;
    layout.switch_has_state = u32::from(switch_has_state(&btf)?);
    layout.enter_fd = tracefs::offset("syscalls/sys_enter_accept4", "fd")?;
    for call in ["accept", "listen"] {
        let fd = tracefs::offset(&format!("syscalls/sys_enter_{call}"), "fd")?;
        ensure!(fd == layout.enter_fd, "the entries of accept4 and {call} differ in their records");
    }
    layout.exit_ret = tracefs::offset("syscalls/sys_exit_accept4", "ret")?;
    // One program serves the exits of several calls, so their records have to agree.
    for call in ["accept", "epoll_wait", "epoll_pwait"] {
        let ret = tracefs::offset(&format!("syscalls/sys_exit_{call}"), "ret")?;
        ensure!(ret == layout.exit_ret, "the exits of accept4 and {call} differ in their records");
    }
    Ok(layout)
}

/// The members, from BTF.
fn members(btf: &Btf) -> Result<KernelLayout> {
    let mut layout = KernelLayout::ZERO;
    for (structure, alternatives, field) in KernelLayout::MEMBERS {
        *field(&mut layout) = alternatives
            .split('|')
            .find_map(|path| btf.offset(structure, path))
            .with_context(|| format!("this kernel's BTF has no {structure}.{alternatives}"))?;
    }
    Ok(layout)
}

/// Whether `sched_switch` passes the previous state: (data, preempt, prev, next[, prev_state]).
/// Early 5.18 had it in front of `prev`; such a kernel is refused rather than misread.
fn switch_has_state(btf: &Btf) -> Result<bool> {
    let arguments =
        btf.tracepoint_arguments("sched_switch").context("this kernel's BTF has no sched_switch")?;
    match arguments[..] {
        [true, false, true, true] => Ok(false),
        [true, false, true, true, false] => Ok(true),
        _ => bail!("this kernel's sched_switch passes its arguments in an unknown order"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets in the order of `KernelLayout::MEMBERS`, as bpftool shows them for each kernel (see `tests/btf`).
    #[rustfmt::skip]
    const KERNELS: [(&str, &[u8], [u32; 37]); 4] = [
        ("5.10", include_bytes!("../../tests/btf/5.10.btf"), [2232, 2236, 16, 2808, 2832, 4, 32, 0, 8, 200, 32, 64, 16, 24, 16, 14, 48, 540, 18, 4, 72, 538, 168, 224, 640, 576, 580, 144, 988, 1000, 136, 200, 768, 4, 12, 24, 8]),
        ("6.1", include_bytes!("../../tests/btf/6.1.btf"), [2416, 2420, 24, 3048, 3072, 4, 32, 0, 8, 200, 32, 64, 16, 24, 16, 14, 48, 516, 18, 4, 72, 514, 184, 232, 624, 552, 556, 144, 1004, 1016, 136, 200, 776, 4, 8, 24, 8]),
        ("6.12", include_bytes!("../../tests/btf/6.12.btf"), [2432, 2436, 24, 3048, 3072, 4, 32, 0, 8, 32, 40, 64, 16, 24, 16, 14, 48, 574, 18, 4, 72, 572, 136, 184, 288, 604, 608, 136, 1012, 1024, 136, 200, 776, 4, 8, 24, 8]),
        ("6.18", include_bytes!("../../tests/btf/6.18.btf"), [1264, 1268, 24, 1824, 1848, 4, 32, 0, 8, 24, 32, 64, 16, 24, 16, 14, 48, 532, 18, 4, 72, 534, 136, 184, 288, 600, 604, 176, 1024, 1032, 136, 200, 784, 4, 8, 24, 8]),
    ];

    #[test]
    fn members_are_where_bpftool_shows_them() {
        for (series, btf, expected) in KERNELS {
            let mut layout = members(&Btf::parse(btf).unwrap()).unwrap();
            for ((structure, path, field), expected) in KernelLayout::MEMBERS.iter().zip(expected) {
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
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        let btf = Btf::parse(KERNELS[0].1).unwrap();
        assert_eq!(btf.offset("task_struct", "no_such_member"), None);
        assert_eq!(btf.offset("no_such_struct", "pid"), None);
        assert_eq!(btf.offset("task_struct", "pid.deeper"), None);
        assert_eq!(btf.tracepoint_arguments("no_such_event"), None);
    }

    #[test]
    fn broken_btf_is_an_error() {
        let whole = KERNELS[0].1;
        for length in 0..whole.len() {
            assert!(Btf::parse(&whole[..length]).is_err(), "cut at {length}");
        }
        let mut other_order = whole.to_vec();
        other_order.swap(0, 1);
        assert!(Btf::parse(&other_order).is_err());
    }
}
