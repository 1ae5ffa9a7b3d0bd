//! Runs what deploy/ describes: the image is built from its Containerfile, runs as the DaemonSet specifies, and
//! observes what root observes. There is no kubelet and no image builder; their input for `runc` is derived from the
//! same files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use caps::CapSet;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    container::{ADDRESS, CONNECTIONS, Container, Logs, UID, pod_cgroup},
    support::{LIMIT, Process, exit_within, http, observer::BINARY, servers::Server, wait_for},
};

const MANIFEST: &str = "deploy/kubernetes/daemonset.yaml";
const KUSTOMIZATION: &str = "deploy/kubernetes/kustomization.yaml";
const UNIT: &str = "deploy/systemd/observer.service";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap()
}

/// Pod of the DaemonSet.
fn pod() -> Value {
    let manifest: Value = serde_saphyr::from_str(&read(MANIFEST)).unwrap();
    manifest["spec"]["template"]["spec"].clone()
}

/// Names of the pod's capabilities, as the kernel has them.
fn capabilities(pod: &Value) -> Vec<String> {
    let added = pod["containers"][0]["securityContext"]["capabilities"]["add"].as_array().unwrap();
    added.iter().map(|name| format!("CAP_{}", name.as_str().unwrap())).collect()
}

#[real_test(userspace)]
fn manifest_and_systemd_unit_grant_the_same_capabilities() {
    let unit = read(UNIT);
    let in_unit = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let in_manifest = capabilities(&pod());
    assert_eq!(in_unit.split(' ').collect::<Vec<_>>(), in_manifest);
    let check = Command::new(BINARY).arg("check").output().unwrap();
    let check = String::from_utf8(check.stdout).unwrap();
    // One line each: result, name, purpose.
    let names = check.lines().filter_map(|line| line.split_whitespace().nth(1));
    let required: Vec<_> = names.filter(|name| name.starts_with("CAP_")).collect();
    assert_eq!(required, in_manifest, "{check}");
}

#[real_test(userspace)]
fn component_without_sys_admin_removes_that_capability() {
    let place = capabilities(&pod()).iter().position(|name| name == "CAP_SYS_ADMIN").unwrap();
    let component: Value =
        serde_saphyr::from_str(&read("deploy/kubernetes/without-sys-admin/kustomization.yaml")).unwrap();
    let patch = component["patches"][0]["patch"].as_str().unwrap();
    let patch: Value = serde_saphyr::from_str(patch).unwrap();
    let path = format!("/spec/template/spec/containers/0/securityContext/capabilities/add/{place}");
    assert_eq!(patch[1], json!({ "op": "remove", "path": path }));
}

/// A container of the image, in a pod of the DaemonSet.
struct Deployed {
    runc: Process,
    id: String,
    files: TempDir,
}

impl Deployed {
    fn new(pod: &Value) -> Self {
        let files = tempfile::tempdir().unwrap();
        let entrypoint = build(&files.path().join("rootfs"));
        configure(files.path(), pod, &entrypoint);
        let id = format!("observer-test-{}", std::process::id());
        // On a node, systemd has mounted the tracefs that the pod mounts.
        let script =
            "mount -t tracefs nodev /sys/kernel/tracing && exec runc run --no-pivot --pid-file pid \"$0\"";
        let runc = Command::new("unshare")
            .args(["--mount", "sh", "-c", script, &id])
            .current_dir(files.path())
            .stdin(Stdio::null())
            .stdout(fs::File::create(files.path().join("log")).unwrap())
            .spawn()
            .unwrap();
        let mut deployed = Self { runc: Process(runc), id, files };
        wait_for("a pod that is ready", || {
            assert_eq!(
                exit_within(&mut deployed.runc.0, std::time::Duration::ZERO),
                None,
                "{}",
                deployed.log()
            );
            (deployed.get("/readyz")? == "ready\n").then_some(())
        });
        deployed
    }

    /// The pod's log.
    fn log(&self) -> String {
        fs::read_to_string(self.files.path().join("log")).unwrap()
    }

    /// Pid of the first process.
    fn pid(&self) -> Option<String> {
        fs::read_to_string(self.files.path().join("pid")).ok()
    }

    /// Sends a request in the pod's network namespace, to another address than 127.0.0.1.
    fn get(&self, path: &str) -> Option<String> {
        let url = format!("http://127.1.2.3:9464{path}");
        let arguments = ["-t", &self.pid()?, "-n", "busybox", "wget", "-q", "-O", "-", &url];
        let output = Command::new("nsenter").args(arguments).stderr(Stdio::null()).output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    /// Ends the pod as a kubelet does; returns its log.
    fn finish(mut self) -> String {
        assert!(Command::new("runc").args(["kill", &self.id, "TERM"]).status().unwrap().success());
        let status = exit_within(&mut self.runc.0, LIMIT).expect("observer does not end");
        assert!(status.success(), "{status}: {}", self.log());
        self.log()
    }
}

impl Drop for Deployed {
    fn drop(&mut self) {
        let _gone_already =
            Command::new("runc").args(["delete", "--force", &self.id]).stderr(Stdio::null()).status();
        let _ended = exit_within(&mut self.runc.0, LIMIT);
    }
}

/// Builds a root file system as the Containerfile says; returns the entry point.
fn build(rootfs: &Path) -> Value {
    let containerfile = read("deploy/Containerfile").replace("\\\n", "");
    let mut entrypoint = Value::Null;
    let mut lines = containerfile.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    assert_eq!(lines.next(), Some("FROM scratch"));
    for line in lines {
        match line.split_once(' ').unwrap() {
            ("COPY", files) => {
                let (from, to) = files.rsplit_once(' ').unwrap();
                for file in from.split(' ') {
                    let source = if file == "observer" { BINARY.into() } else { root().join(file) };
                    let place = rootfs.join(to.trim_start_matches('/'));
                    let place = if to.ends_with('/') { place.join(file) } else { place };
                    fs::create_dir_all(place.parent().unwrap()).unwrap();
                    fs::copy(source, place).unwrap();
                }
            }
            ("ENTRYPOINT", words) => entrypoint = serde_json::from_str(words).unwrap(),
            ("LABEL" | "EXPOSE", _) | ("USER", "0:0") => {}
            _ => panic!("unsupported instruction: {line}"),
        }
    }
    entrypoint
}

/// Creates the folder of a ConfigMap, as a kubelet does, from the files that the kustomization lists.
fn config_map(name: &str, bundle: &Path) -> Value {
    let kustomization: Value = serde_saphyr::from_str(&read(KUSTOMIZATION)).unwrap();
    let mut generators = kustomization["configMapGenerator"].as_array().unwrap().iter();
    let generator = generators.find(|generator| generator["name"] == name).unwrap();
    let folder = bundle.join("config-map");
    fs::create_dir(&folder).unwrap();
    for file in generator["files"].as_array().unwrap() {
        let file = file.as_str().unwrap();
        fs::write(folder.join(file), read(&format!("deploy/kubernetes/{file}"))).unwrap();
    }
    json!(folder)
}

/// Writes the configuration that a container runtime would generate for this pod.
fn configure(bundle: &Path, pod: &Value, entrypoint: &Value) {
    let spec = Command::new("runc").args(["spec", "--bundle"]).arg(bundle).status();
    assert!(spec.expect("runc is installed").success());
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let container = &pod["containers"][0];
    let rights = &container["securityContext"];

    let process = &mut config["process"];
    process["terminal"] = json!(false);
    let words = [entrypoint, &container["args"]].into_iter().flat_map(|words| words.as_array().unwrap());
    process["args"] = words.cloned().collect();
    process["noNewPrivileges"] = json!(rights["allowPrivilegeEscalation"] == false);
    process["user"] = json!({ "uid": rights["runAsUser"], "gid": 0 });
    assert_eq!(rights["privileged"], false);
    assert_eq!(rights["capabilities"]["drop"], json!(["ALL"]));
    // Root may lack some capabilities if this machine is a container.
    let held = caps::read(None, CapSet::Permitted).unwrap();
    let mut granted = capabilities(pod);
    granted.retain(|name| held.contains(&name.parse().unwrap()));
    process["capabilities"] = json!({ "bounding": granted, "effective": granted, "permitted": granted });
    config["root"]["readonly"] = rights["readOnlyRootFilesystem"].clone();

    let host_namespaces = [("pid", "hostPID"), ("network", "hostNetwork"), ("ipc", "hostIPC")];
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|kind| {
        !host_namespaces.iter().any(|(name, field)| kind["type"] == *name && pod[field] == true)
    });
    for mount in container["volumeMounts"].as_array().unwrap() {
        let mut volumes = pod["volumes"].as_array().unwrap().iter();
        let volume = volumes.find(|volume| volume["name"] == mount["name"]).unwrap();
        assert_eq!(mount["readOnly"], true, "{mount}");
        let source = match volume["configMap"]["name"].as_str() {
            Some(name) => config_map(name, bundle),
            None => volume["hostPath"]["path"].clone(),
        };
        config["mounts"].as_array_mut().unwrap().push(json!({
            "destination": mount["mountPath"], "source": source, "type": "bind",
            "options": ["rbind", "rprivate", "ro"],
        }));
    }
    let memory = container["resources"]["limits"]["memory"].as_str().unwrap();
    let mebibytes: u64 = memory.strip_suffix("Mi").unwrap().parse().unwrap();
    config["linux"]["resources"]["memory"] = json!({ "limit": mebibytes << 20 });
    config["linux"]["cgroupsPath"] = json!(format!("/observer-test-{}", std::process::id()));
    fs::write(path, config.to_string()).unwrap();
}

#[real_test(alone, userspace)]
fn daemonset_pod_observes_all_connections_and_names_of_a_node() {
    let logs = Logs::new();
    logs.link();
    let container = Container::in_cgroup(&pod_cgroup(), logs.seen_by("runc"));
    let server = Server::asyncio();
    let pod = pod();
    let deployed = Deployed::new(&pod);

    let status = fs::read_to_string(format!("/proc/{}/status", deployed.pid().unwrap())).unwrap();
    let value = |field: &str| status.lines().find_map(|line| line.strip_prefix(field)).unwrap().trim();
    let bounding = u64::from_str_radix(value("CapBnd:"), 16).unwrap();
    assert!(bounding.count_ones() as usize <= capabilities(&pod).len(), "{status}");
    assert_eq!(value("NoNewPrivs:"), "1");

    for _ in 0..CONNECTIONS {
        assert!(container.get());
        http::get(server.port, "/");
    }
    server.block("sleep", 150);
    let series = |name: &str, of: &str| {
        let scrape = deployed.get("/metrics").unwrap();
        let mut lines = scrape.lines().filter(|line| line.starts_with(name) && line.contains(of));
        lines.next()?.rsplit(' ').next().map(str::to_owned)
    };
    // A scrape may be out of date.
    let wait_for_accepts = |of: &str, accepts: u32| {
        let accepts = Some(accepts.to_string());
        wait_for(of, || (series("observer_accept_queue_accepts_total", of) == accepts).then_some(()));
    };
    let in_container = format!("container=\"{}\",pod=\"web-0\",listener=\"{ADDRESS}\"", container.id);
    wait_for_accepts(&in_container, CONNECTIONS);
    wait_for_accepts(&format!("listener=\"127.0.0.1:{}\"", server.port), CONNECTIONS + 1);
    let names = format!("namespace=\"shop\",container_name=\"web\",pod_uid=\"{UID}\"");
    assert!(series("observer_target_info", &names).is_some(), "no target of these names");

    let log = deployed.finish();
    assert!(log.contains("container web (") && log.contains("of pod shop/web-0"), "{log}");
    // Functions of the server's language, which are read from the process's memory and files.
    assert!(log.contains("in  block (servers/asyncio_server.py"), "{log}");
    let mut unseen = log.lines().filter(|line| line.starts_with("Not observed: "));
    assert!(unseen.all(|line| line.ends_with("(this kernel has no such tracepoint)")), "{log}");
}
