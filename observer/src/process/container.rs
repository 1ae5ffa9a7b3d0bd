//! Which container a process is in, told by its cgroup paths: no runtime is asked, so that it works with any of
//! them and without any of them. Only what is certain counts: a runtime's id of 64 hexadecimal digits.

use procfs::ProcessCGroups;

/// Length of the ids that Docker, containerd, CRI-O and podman give their containers, in digits.
const ID: usize = 64;

/// Id of the container a process with these cgroups is in; `None` if it is in none that can be recognised.
pub(crate) fn id(cgroups: &ProcessCGroups) -> Option<String> {
    // Version 1 has one path for each controller, and a mixed system one more of version 2 that may say nothing.
    cgroups.into_iter().find_map(|cgroup| id_in(&cgroup.pathname)).map(str::to_owned)
}

/// The innermost container's id in a path: a container may have cgroups of its own below its runtime's, and
/// other containers in them.
fn id_in(path: &str) -> Option<&str> {
    path.trim_end_matches(" (deleted)").rsplit('/').find_map(id_of_component)
}

/// `ID`, `RUNTIME-ID.scope` as made by systemd, or `SLICE:RUNTIME:ID` as containerd writes it where systemd was
/// meant to make it.
fn id_of_component(component: &str) -> Option<&str> {
    let component = component.strip_suffix(".scope").unwrap_or(component);
    let (runtime, id) = component.rsplit_once(['-', ':']).unwrap_or(("", component));
    // podman's and CRI-O's monitor is called after its container, but is not in it.
    (is_id(id) && !runtime.ends_with("conmon")).then_some(id)
}

/// Whether it has the form of a container's id.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == ID && text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use procfs::FromRead as _;

    use super::*;

    const OUTER: &str = "3f4e9d0c6b7a8f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796";
    const INNER: &str = "a0b1c2d3e4f5061728394a5b6c7d8e9fa0b1c2d3e4f5061728394a5b6c7d8e9f";

    /// What `/proc/PID/cgroup` says, and whose container that is.
    fn found_in(lines: &str) -> Option<String> {
        let lines = lines.replace("OUTER", OUTER).replace("INNER", INNER);
        id(&ProcessCGroups::from_read(lines.as_bytes()).unwrap())
    }

    #[test]
    fn each_runtime_is_recognised() {
        let lines = [
            // Docker: version 2 with systemd, version 1 without, and inside another container.
            "0::/system.slice/docker-INNER.scope",
            "12:memory:/docker/INNER\n11:cpu,cpuacct:/docker/INNER\n1:name=systemd:/docker/INNER",
            "0::/docker/OUTER/docker/INNER",
            // A container that runs systemd has cgroups of its own.
            "0::/system.slice/docker-INNER.scope/system.slice/nginx.service",
            // containerd in Kubernetes: with systemd, without, and with one that only thinks so.
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod8f2d0c1a_5b1e_4d0c_9a6f_0e1d2c3b4a59.slice/cri-containerd-INNER.scope",
            "5:cpuset:/kubepods/besteffort/pod8f2d0c1a-5b1e-4d0c-9a6f-0e1d2c3b4a59/INNER",
            "0::/system.slice/containerd.service/kubepods-besteffort-pod8f2d0c1a_5b1e_4d0c_9a6f_0e1d2c3b4a59.slice:cri-containerd:INNER",
            // Kubernetes inside a container (kind).
            "0::/docker/OUTER/kubelet/kubepods/pod8f2d0c1a-5b1e-4d0c-9a6f-0e1d2c3b4a59/INNER",
            // CRI-O.
            "0::/kubepods.slice/kubepods-pod8f2d0c1a_5b1e_4d0c_9a6f_0e1d2c3b4a59.slice/crio-INNER.scope",
            "0::/kubepods.slice/kubepods-pod8f2d0c1a_5b1e_4d0c_9a6f_0e1d2c3b4a59.slice/crio-INNER.scope/container",
            // podman: root's, a user's, and without systemd.
            "0::/machine.slice/libpod-INNER.scope",
            "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-INNER.scope/container",
            "0::/libpod_parent/libpod-INNER",
            // nerdctl, and Amazon's agent.
            "0::/system.slice/nerdctl-INNER.scope",
            "9:memory:/ecs/0123456789abcdef0123456789abcdef/INNER",
            // Both versions, of which only the first knows; the other way round.
            "4:memory:/docker/INNER\n1:name=systemd:/docker/INNER\n0::/",
            "1:name=systemd:/\n0::/system.slice/docker-INNER.scope",
            // As seen from inside another cgroup namespace, and when the container is gone.
            "0::/../cri-containerd-INNER.scope",
            "0::/system.slice/docker-INNER.scope (deleted)",
        ];
        for line in lines {
            assert_eq!(found_in(line).as_deref(), Some(INNER), "{line}");
        }
    }

    #[test]
    fn what_is_no_container_has_no_id() {
        let lines = [
            "",
            "0::/",
            "0::/init.scope",
            "0::/system.slice/nginx.service",
            "0::/user.slice/user-1000.slice/session-3.scope",
            "12:memory:/user.slice\n0::/user.slice/user-1000.slice/session-3.scope",
            // Their runtimes and monitors.
            "0::/system.slice/docker.service",
            "0::/machine.slice/libpod-conmon-INNER.scope",
            "0::/kubepods.slice/kubepods-pod8f2d0c1a_5b1e_4d0c_9a6f_0e1d2c3b4a59.slice/crio-conmon-INNER.scope",
            // A name that anybody may have given, and numbers of other lengths.
            "0::/runc/web",
            "0::/system.slice/run-r0123456789abcdef0123456789abcdef.scope",
            "4:memory:/jobs/0123456789abcdef0123456789abcdef",
            "0::/jobs/INNER00",
        ];
        for line in lines {
            assert_eq!(found_in(line), None, "{line}");
        }
    }
}
