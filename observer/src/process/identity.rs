//! Container, pod and service of a process, from its cgroups and the node's log folders. Neither a container runtime
//! nor an API server is queried: that would need permissions and could block.

use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use procfs::{ProcessCGroups, process::Process as Proc};

use super::{container, pod};
use crate::{
    kernel::clock,
    model::workload::{Pod, Workload},
};

/// Age of a process after which its pod's names are no longer looked up: its kubelet has created the links, or never
/// will.
const LOOKUP_PERIOD: Duration = Duration::from_secs(30);

/// Maximum number of ancestors searched.
const MAX_ANCESTORS: usize = 64;

/// Updates the workload of a process. The log folders are searched when the process has changed its cgroup, and again
/// while it is younger than `LOOKUP_PERIOD`, as its kubelet may still create the links.
pub(crate) fn refresh(workload: &mut Workload, proc: &Proc) {
    let Ok(cgroups) = proc.cgroups() else { return };
    let now = in_cgroups(&cgroups);
    let is_same =
        (&workload.container, &workload.unit, uid(workload)) == (&now.container, &now.unit, uid(&now));
    if !is_same {
        *workload = now;
    }
    let Workload { container, kubernetes: Some(pod), .. } = workload else { return };
    if pod.container.is_none() && !(is_same && is_settled(proc)) {
        for log in logs(proc, container.as_deref()) {
            pod::look_up(pod, container.as_deref(), &log);
            if pod.container.is_some() {
                break;
            }
        }
    }
}

fn uid(workload: &Workload) -> Option<&str> {
    workload.kubernetes.as_ref().map(|pod| pod.uid.as_str())
}

/// The workload of a process with these cgroups, without names.
pub(crate) fn in_cgroups(cgroups: &ProcessCGroups) -> Workload {
    let container = container::id(cgroups);
    let uid = pod::uid(cgroups);
    let unit = if container.is_none() && uid.is_none() { unit(cgroups) } else { None };
    Workload { container, kubernetes: uid.map(|uid| Pod { uid, ..Pod::default() }), unit }
}

/// The systemd service of a process with these cgroups.
fn unit(cgroups: &ProcessCGroups) -> Option<String> {
    cgroups.into_iter().find_map(|cgroup| unit_in(&cgroup.pathname)).map(str::to_owned)
}

/// Name of the innermost unit in a path if that is a service. A session's scope is below a user's service, but does not
/// belong to it.
fn unit_in(path: &str) -> Option<&str> {
    let components = path.trim_end_matches(" (deleted)").rsplit('/');
    let unit = components.into_iter().find(|name| name.ends_with(".service") || name.ends_with(".scope"))?;
    // systemd prepends an underscore to names that collide with files of the cgroup file system.
    let unit = unit.strip_prefix('_').unwrap_or(unit);
    unit.ends_with(".service").then_some(unit)
}

fn is_settled(proc: &Proc) -> bool {
    let Ok(stat) = proc.stat() else { return true };
    let age = SystemTime::now().duration_since(clock::wall_time_of_ticks(stat.starttime));
    age.is_ok_and(|age| age >= LOOKUP_PERIOD)
}

/// Log folders of the process's node: observer's `/var/log`, and that of the process that runs the container. They
/// differ if observer is in a container or the node is a container itself (kind).
fn logs(proc: &Proc, container: Option<&str>) -> impl Iterator<Item = PathBuf> {
    let runner = runner(proc, container).map(|pid| format!("/proc/{pid}/root/var/log"));
    [Some("/var/log".into()), runner].into_iter().flatten().map(|log| Path::new(&log).into())
}

/// The nearest ancestor outside of the container.
fn runner(proc: &Proc, container: Option<&str>) -> Option<i32> {
    let mut pid = proc.stat().ok()?.ppid;
    for _ in 0..MAX_ANCESTORS {
        let parent = Proc::new(pid).ok()?;
        if container::id(&parent.cgroups().ok()?).as_deref() != container {
            return Some(pid);
        }
        pid = parent.stat().ok()?.ppid;
    }
    None
}

#[cfg(test)]
mod tests {
    use procfs::FromRead as _;

    use super::*;

    const ID: &str = "3f4e9d0c6b7a8f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796";

    fn found_in(lines: &str) -> Workload {
        in_cgroups(&ProcessCGroups::from_read(lines.replace("ID", ID).as_bytes()).unwrap())
    }

    #[test]
    fn services_are_recognised() {
        let lines = [
            "0::/system.slice/nginx.service",
            "0::/system.slice/nginx.service/workers",
            "0::/system.slice/nginx.service (deleted)",
            "0::/system.slice/system-web.slice/nginx.service",
            "0::/system.slice/_nginx.service",
            // A user service.
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service",
            // From inside another cgroup namespace.
            "0::/../../../system.slice/nginx.service",
            // cgroup v1, where not every controller has the service, and hybrid.
            "4:memory:/system.slice\n1:name=systemd:/system.slice/nginx.service",
            "4:memory:/\n1:name=systemd:/system.slice/nginx.service\n0::/system.slice/nginx.service",
            // In a machine whose id is not recognised.
            "0::/lxc.payload.web/system.slice/nginx.service",
        ];
        for line in lines {
            let workload = found_in(line);
            assert_eq!(
                workload,
                Workload { unit: Some("nginx.service".into()), ..Workload::default() },
                "{line}"
            );
        }
    }

    #[test]
    fn other_cgroups_have_no_service() {
        let lines = [
            "",
            "0::/",
            "0::/init.scope",
            "0::/user.slice/user-1000.slice/session-3.scope",
            "0::/user.slice/user-1000.slice/user@1000.service/init.scope",
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/app-editor-7.scope",
        ];
        for line in lines {
            assert_eq!(found_in(line), Workload::default(), "{line}");
        }
    }

    #[test]
    fn containers_and_pods_belong_to_no_service() {
        let in_container = found_in("0::/system.slice/docker-ID.scope/system.slice/nginx.service");
        assert_eq!(in_container, Workload { container: Some(ID.into()), ..Workload::default() });
        let uid = "8f2d0c1a-5b1e-4d0c-9a6f-0e1d2c3b4a59";
        let pod = Some(Pod { uid: uid.into(), ..Pod::default() });
        let in_pod = found_in(&format!("0::/system.slice/kubelet.service/kubepods/pod{uid}/ID"));
        assert_eq!(in_pod, Workload { container: Some(ID.into()), kubernetes: pod.clone(), unit: None });
        let beside = found_in(&format!("0::/system.slice/kubelet.service/kubepods/pod{uid}"));
        assert_eq!(beside, Workload { container: None, kubernetes: pod, unit: None });
    }

    #[test]
    fn a_container_is_run_by_its_nearest_ancestor_outside() {
        let me = Proc::myself().unwrap();
        assert_eq!(runner(&me, Some(ID)), Some(me.stat().unwrap().ppid));
    }
}
