//! Finds the Kubernetes pod of a process by its cgroup paths, and the pod's names by the folders and links that its
//! kubelet creates for logs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use procfs::ProcessCGroups;

use super::container::is_id;
use crate::model::workload::Pod;

/// UID of the pod of a process with these cgroups; `None` if it is in no recognised pod.
pub(crate) fn uid(cgroups: &ProcessCGroups) -> Option<String> {
    cgroups.into_iter().find_map(|cgroup| uid_in(&cgroup.pathname))
}

fn uid_in(path: &str) -> Option<String> {
    path.trim_end_matches(" (deleted)").rsplit('/').find_map(uid_of_component)
}

/// Accepts `podUID` as created with cgroupfs, `kubepods-CLASS-podUID.slice` with systemd, where the UID's dashes are
/// replaced, and `SLICE:RUNTIME:ID`, which containerd creates if it is configured for systemd but uses cgroupfs.
fn uid_of_component(component: &str) -> Option<String> {
    let component = component.split(':').next()?;
    let uid = match component.strip_suffix(".slice") {
        Some(slice) => slice.rsplit('-').next()?.strip_prefix("pod")?.replace('_', "-"),
        None => component.strip_prefix("pod")?.to_owned(),
    };
    is_uid(&uid).then_some(uid)
}

/// Whether the text has the format of a UID, or of the hash of a static pod's configuration, which is its UID on its
/// node.
pub(crate) fn is_uid(text: &str) -> bool {
    let groups: Vec<_> = text.split('-').map(str::len).collect();
    let is_hex = |digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f' | b'-');
    matches!(groups[..], [8, 4, 4, 4, 12] | [32]) && text.bytes().all(is_hex)
}

/// Adds the names that a node's `/var/log` has for a pod: its own, and that of its container with this id.
///
/// The links of containers contain their ids. If the pod has no link, its folder has the name of its container,
/// provided that it has only one. If other containers of the pod have links, a container without a link is the pause
/// container, or its link is not created yet.
pub(crate) fn look_up(pod: &mut Pod, container: Option<&str>, log: &Path) {
    let (pods, containers) = (log.join("pods"), log.join("containers"));
    let folders = names_in(&pods).into_iter().filter_map(|folder| Some((of_folder(&folder)?, folder)));
    let found = folders.into_iter().find(|(found, _)| found.uid == pod.uid);
    // There can be many links, and reading one costs more than comparing its name.
    let end = container.map(|id| format!("-{id}.log"));
    let start = found
        .as_ref()
        .and_then(|(found, _)| Some(format!("{}_{}_", found.name.as_deref()?, found.namespace.as_deref()?)));
    let may_be_of_pod = |name: &String| {
        end.as_ref().is_some_and(|end| name.ends_with(end))
            || start.as_ref().is_some_and(|start| name.starts_with(start))
    };
    let links = names_in(&containers).into_iter().filter(may_be_of_pod);
    let links = links.filter_map(|name| Link::read(&containers, &name));
    let links: Vec<_> = links.filter(|link| link.pod.uid == pod.uid).collect();
    let is_linked = !links.is_empty();
    if let Some(link) = links.into_iter().find(|link| Some(link.id.as_str()) == container) {
        *pod = link.pod;
    } else if let Some((found, folder)) = found {
        *pod = found;
        let mut containers = names_in(&pods.join(folder));
        if container.is_some() && !is_linked && containers.len() == 1 {
            pod.container = containers.pop();
        }
    }
}

/// A link of a container in `/var/log/containers`.
pub(crate) struct Link {
    pub(crate) id: String,
    /// The pod, with the container's name, from the link's target.
    pub(crate) pod: Pod,
}

impl Link {
    /// Reads a link `POD_NAMESPACE_CONTAINER-ID.log` -> `…/NAMESPACE_POD_UID/CONTAINER/COUNT.log`. A very long name is
    /// cut off at its end, and lacks the id.
    fn read(folder: &Path, name: &str) -> Option<Self> {
        Self::parse(name, || fs::read_link(folder.join(name)).ok())
    }

    /// Parses a link by its name. `target` reads its target, and is called only if the name ends with a container id.
    pub(crate) fn parse(name: &str, target: impl FnOnce() -> Option<PathBuf>) -> Option<Self> {
        let (_, id) = name.strip_suffix(".log")?.rsplit_once('-')?;
        let target = is_id(id).then(target)??;
        let container = target.parent()?;
        let mut pod = of_folder(container.parent()?.file_name()?.to_str()?)?;
        pod.container = Some(container.file_name()?.to_str()?.to_owned());
        Some(Self { id: id.to_owned(), pod })
    }
}

/// Parses a folder name `NAMESPACE_POD_UID`; the names contain no underscores.
pub(crate) fn of_folder(name: &str) -> Option<Pod> {
    let parts: Vec<_> = name.split('_').collect();
    let [namespace, name, uid] = parts[..] else { return None };
    let is_one = !namespace.is_empty() && !name.is_empty() && is_uid(uid);
    is_one.then(|| Pod {
        namespace: Some(namespace.to_owned()),
        name: Some(name.to_owned()),
        container: None,
        uid: uid.to_owned(),
    })
}

/// Names of the entries of a folder; empty if it cannot be read.
fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use procfs::FromRead as _;
    use tempfile::TempDir;

    use super::*;

    const UID: &str = "8f2d0c1a-5b1e-4d0c-9a6f-0e1d2c3b4a59";
    const HASH: &str = "4e1e0a6e2ac1a05e8c5ae9f3ba0c3d0d";
    const APP: &str = "3f4e9d0c6b7a8f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796";
    const PAUSE: &str = "a0b1c2d3e4f5061728394a5b6c7d8e9fa0b1c2d3e4f5061728394a5b6c7d8e9f";

    fn found_in(lines: &str) -> Option<String> {
        uid(&ProcessCGroups::from_read(lines.replace("ID", APP).as_bytes()).unwrap())
    }

    #[test]
    fn each_way_to_write_a_uid_is_recognised() {
        let lines = [
            // With systemd: containerd, CRI-O with and without a child cgroup of the container, Docker.
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podSLICE.slice/cri-containerd-ID.scope",
            "0::/kubepods.slice/kubepods-podSLICE.slice/crio-ID.scope/container",
            "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podSLICE.slice/docker-ID.scope",
            "0::/kubepods.slice/kubepods-podSLICE.slice/crio-ID.scope (deleted)",
            // With cgroupfs, in v1, v2 and hybrid.
            "11:cpu,cpuacct:/kubepods/besteffort/podUID/ID\n1:name=systemd:/kubepods/besteffort/podUID/ID",
            "0::/kubepods/podUID/ID",
            "4:memory:/kubepods/burstable/podUID/ID\n0::/",
            "0::/system.slice/containerd.service/kubepods-besteffort-podSLICE.slice:cri-containerd:ID",
            // Kubernetes inside a container (kind), and below a root cgroup of the kubelet.
            "0::/docker/ID/kubelet/kubepods/podUID/ID",
            "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podSLICE.slice/cri-containerd-ID.scope",
            // From inside the cgroup namespace of another pod.
            "0::/../../podUID/ID",
            "0::/../../kubepods-besteffort-podSLICE.slice/cri-containerd-ID.scope",
            // The cgroup of the pod itself.
            "0::/kubepods.slice/kubepods-podSLICE.slice",
        ];
        for line in lines {
            for uid in [UID, HASH] {
                let line = line.replace("SLICE", &uid.replace('-', "_")).replace("UID", uid);
                assert_eq!(found_in(&line).as_deref(), Some(uid), "{line}");
            }
        }
    }

    #[test]
    fn other_cgroups_have_no_pod_uid() {
        let lines = [
            "0::/",
            "0::/system.slice/docker-ID.scope",
            "0::/kubepods.slice/kubepods-burstable.slice",
            // podman.
            "0::/machine.slice/machine-libpod_pod_ID.slice/libpod-ID.scope",
            "0::/jobs/pod1",
            "0::/system.slice/podman.service",
            "0::/kubepods/pod8F2D0C1A-5b1e-4d0c-9a6f-0e1d2c3b4a59",
            "0::/kubepods/pod8f2d0c1a-5b1e-4d0c-9a6f",
        ];
        for line in lines {
            assert_eq!(found_in(line), None, "{line}");
        }
    }

    /// The `/var/log` of a node.
    struct Node(TempDir);

    impl Node {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        /// Creates the log folder of a container. Docker keeps the logs elsewhere and links to them.
        fn container(&self, pod: &str, container: &str, is_docker: bool) {
            let folder = self.0.path().join("pods").join(pod).join(container);
            fs::create_dir_all(&folder).unwrap();
            if is_docker {
                let log = format!("/var/lib/docker/containers/{APP}/{APP}-json.log");
                symlink(log, folder.join("0.log")).unwrap();
            } else {
                fs::write(folder.join("0.log"), "").unwrap();
            }
        }

        /// Creates the link of a container, named as by a kubelet.
        fn link(&self, pod: &str, container: &str, id: &str) {
            let [namespace, name, _] = pod.split('_').collect::<Vec<_>>()[..] else { panic!("{pod}") };
            let mut link = format!("{name}_{namespace}_{container}-{id}");
            link.truncate(251);
            let folder = self.0.path().join("containers");
            fs::create_dir_all(&folder).unwrap();
            symlink(format!("/var/log/pods/{pod}/{container}/0.log"), folder.join(link + ".log")).unwrap();
        }

        /// Namespace, pod and container name of a container.
        fn names(&self, uid: &str, container: &str) -> [Option<String>; 3] {
            let mut pod = Pod { uid: uid.into(), ..Pod::default() };
            look_up(&mut pod, Some(container), self.0.path());
            [pod.namespace, pod.name, pod.container]
        }
    }

    fn known(namespace: &str, pod: &str, container: &str) -> [Option<String>; 3] {
        [namespace, pod, container].map(|name| Some(name).filter(|name| !name.is_empty()).map(str::to_owned))
    }

    #[test]
    fn names_are_found_for_each_container_runtime() {
        let (web, twin) = (format!("shop_web-7d9f-x2x4z_{UID}"), format!("shop_web-7d9f-q8q8q_{HASH}"));
        for is_docker in [false, true] {
            let node = Node::new();
            for pod in [&web, &twin] {
                for container in ["migrate", "web", "istio-proxy"] {
                    node.container(pod, container, is_docker);
                }
                node.link(pod, "istio-proxy", &APP.replace('3', "4"));
            }
            node.link(&web, "web", APP);
            assert_eq!(node.names(UID, APP), known("shop", "web-7d9f-x2x4z", "web"));
            // The pause container has no link, and the container of the other pod has none yet.
            assert_eq!(node.names(UID, PAUSE), known("shop", "web-7d9f-x2x4z", ""));
            assert_eq!(node.names(HASH, PAUSE), known("shop", "web-7d9f-q8q8q", ""));
        }
    }

    #[test]
    fn the_only_container_of_a_pod_needs_no_link() {
        let node = Node::new();
        let pod = format!("kube-system_etcd-node_{HASH}");
        node.container(&pod, "etcd", false);
        assert_eq!(node.names(HASH, APP), known("kube-system", "etcd-node", "etcd"));
        // A process in the pod's cgroup but in none of its containers.
        let mut beside = Pod { uid: HASH.into(), ..Pod::default() };
        look_up(&mut beside, None, node.0.path());
        assert_eq!(beside.container, None);
        // Another container has the link: this is the pause container, or was just restarted.
        node.link(&pod, "etcd", APP);
        assert_eq!(node.names(HASH, PAUSE), known("kube-system", "etcd-node", ""));
    }

    #[test]
    fn links_alone_are_enough() {
        let node = Node::new();
        node.link(&format!("shop_web-0_{UID}"), "web", APP);
        assert_eq!(node.names(UID, APP), known("shop", "web-0", "web"));
    }

    #[test]
    fn truncated_links_are_ignored() {
        let node = Node::new();
        let name = "n".repeat(200);
        let pod = format!("shop_{name}_{UID}");
        node.link(&pod, "web", APP);
        assert_eq!(node.names(UID, APP), known("", "", ""));
        node.container(&pod, "web", false);
        assert_eq!(node.names(UID, APP), known("shop", &name, "web"));
    }

    #[test]
    fn uncertain_names_are_not_used() {
        let nothing = known("", "", "");
        assert_eq!(Node::new().names(UID, APP), nothing);
        let node = Node::new();
        for folder in [
            // Another pod of the same name, as a stateful set recreates it.
            format!("shop_web-0_{}", UID.replace('8', "9")),
            // A kubelet older than 1.14, and folders that other programs create.
            UID.to_owned(),
            format!("_web-0_{UID}"),
            format!("shop__{UID}"),
            format!("shop_web_0_{UID}"),
            format!("tenant_shop_web-0_{UID}"),
        ] {
            node.container(&folder, "web", false);
        }
        // A link with names whose target has none, and a file that is not a link.
        fs::create_dir_all(node.0.path().join("containers")).unwrap();
        let link = node.0.path().join(format!("containers/web-0_shop_web-{APP}.log"));
        symlink(format!("/var/lib/docker/containers/{APP}/{APP}-json.log"), link).unwrap();
        fs::write(node.0.path().join(format!("containers/web-0_shop_web-{PAUSE}.log")), "").unwrap();
        assert_eq!(node.names(UID, APP), nothing);
        assert_eq!(node.names(UID, PAUSE), nothing);
    }
}
