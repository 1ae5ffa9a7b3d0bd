//! Finds the container of a process by its cgroup paths. No container runtime is queried, so this works with any
//! runtime and without one. Only certain matches count: a container id of 64 hexadecimal digits.

use procfs::ProcessCGroups;

/// Length in hexadecimal digits of the ids that Docker, containerd, CRI-O and podman assign.
const ID_DIGITS: usize = 64;

/// Id of the container of a process with these cgroups; `None` if it is in no recognised container.
pub(crate) fn id(cgroups: &ProcessCGroups) -> Option<String> {
    // cgroup v1 has one path per controller; hybrid systems add a v2 path, which may lack the id.
    cgroups.into_iter().find_map(|cgroup| id_in(&cgroup.pathname)).map(str::to_owned)
}

/// Id of the innermost container in a path: a container may have child cgroups below its own, and other containers
/// in them.
fn id_in(path: &str) -> Option<&str> {
    path.trim_end_matches(" (deleted)").rsplit('/').find_map(id_of_component)
}

/// Accepts `ID`, `RUNTIME-ID.scope` as created by systemd, and `SLICE:RUNTIME:ID`, which containerd creates if it is
/// configured for systemd but uses cgroupfs.
fn id_of_component(component: &str) -> Option<&str> {
    let component = component.strip_suffix(".scope").unwrap_or(component);
    let (runtime, id) = component.rsplit_once(['-', ':']).unwrap_or(("", component));
    // The monitor process (conmon) of podman and CRI-O has the container's id in its scope, but runs outside of it.
    (is_id(id) && !runtime.ends_with("conmon")).then_some(id)
}

/// Whether the text has the format of a container id.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == ID_DIGITS && text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use procfs::FromRead as _;

    use super::*;

    const OUTER: &str = "3f4e9d0c6b7a8f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796";
    const INNER: &str = "a0b1c2d3e4f5061728394a5b6c7d8e9fa0b1c2d3e4f5061728394a5b6c7d8e9f";

    /// The container id found in these lines of `/proc/PID/cgroup`.
    fn found_in(lines: &str) -> Option<String> {
        let lines = lines.replace("OUTER", OUTER).replace("INNER", INNER);
        id(&ProcessCGroups::from_read(lines.as_bytes()).unwrap())
    }

    #[test]
    fn each_runtime_is_recognised() {
        let lines = [
            // Docker: cgroup v2 with systemd, v1 without, and inside another container.
            "0::/system.slice/docker-INNER.scope",
            "12:memory:/docker/INNER\n11:cpu,cpuacct:/docker/INNER\n1:name=systemd:/docker/INNER",
            "0::/docker/OUTER/docker/INNER",
            // A container that runs systemd has child cgroups.
            "0::/system.slice/docker-INNER.scope/system.slice/nginx.service",
            // containerd in Kubernetes: with systemd, with cgroupfs, and with a systemd path under cgroupfs.
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod8f2d0c1a_5b1e_4d0c_9a6f_0e1d2c3b4a59.slice/cri-containerd-INNER.scope",
            "5:cpuset:/kubepods/besteffort/pod8f2d0c1a-5b1e-4d0c-9a6f-0e1d2c3b4a59/INNER",
            "0::/system.slice/containerd.service/kubepods-besteffort-pod8f2d0c1a_5b1e_4d0c_9a6f_0e1d2c3b4a59.slice:cri-containerd:INNER",
            // Kubernetes inside a container (kind).
            "0::/docker/OUTER/kubelet/kubepods/pod8f2d0c1a-5b1e-4d0c-9a6f-0e1d2c3b4a59/INNER",
            // CRI-O.
            "0::/kubepods.slice/kubepods-pod8f2d0c1a_5b1e_4d0c_9a6f_0e1d2c3b4a59.slice/crio-INNER.scope",
            "0::/kubepods.slice/kubepods-pod8f2d0c1a_5b1e_4d0c_9a6f_0e1d2c3b4a59.slice/crio-INNER.scope/container",
            // podman: of root, of a user, and without systemd.
            "0::/machine.slice/libpod-INNER.scope",
            "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-INNER.scope/container",
            "0::/libpod_parent/libpod-INNER",
            // nerdctl, and the Amazon ECS agent.
            "0::/system.slice/nerdctl-INNER.scope",
            "9:memory:/ecs/0123456789abcdef0123456789abcdef/INNER",
            // Hybrid: the id in v1 paths only, and in the v2 path only.
            "4:memory:/docker/INNER\n1:name=systemd:/docker/INNER\n0::/",
            "1:name=systemd:/\n0::/system.slice/docker-INNER.scope",
            // From inside another cgroup namespace, and of a container that is gone.
            "0::/../cri-containerd-INNER.scope",
            "0::/system.slice/docker-INNER.scope (deleted)",
        ];
        for line in lines {
            assert_eq!(found_in(line).as_deref(), Some(INNER), "{line}");
        }
    }

    #[test]
    fn other_cgroups_have_no_container_id() {
        let lines = [
            "",
            "0::/",
            "0::/init.scope",
            "0::/system.slice/nginx.service",
            "0::/user.slice/user-1000.slice/session-3.scope",
            "12:memory:/user.slice\n0::/user.slice/user-1000.slice/session-3.scope",
            // Container runtimes and monitors.
            "0::/system.slice/docker.service",
            "0::/machine.slice/libpod-conmon-INNER.scope",
            "0::/kubepods.slice/kubepods-pod8f2d0c1a_5b1e_4d0c_9a6f_0e1d2c3b4a59.slice/crio-conmon-INNER.scope",
            // A name of the user's choice, and hexadecimal numbers of other lengths.
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
