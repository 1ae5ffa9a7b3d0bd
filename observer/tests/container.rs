//! A server in a real container, with another root, network and cgroup. Container runtimes and service managers are
//! recognised by the names of cgroups and logs, so the containers and folders here have such names.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    otlp::url,
    support::{
        LIMIT, Process, exit_within, is_emulated,
        observer::{BINARY, Observer},
        otlp::{Receiver, for_each_point},
        servers::Server,
        wait_for,
    },
};

/// Number of connections of a test.
pub(crate) const CONNECTIONS: u32 = 23;

pub(crate) const ADDRESS: &str = "127.0.0.1:8080";

/// A container created by `runc`.
pub(crate) struct Container {
    /// `runc`, which exits with its container.
    process: Process,
    pub(crate) id: String,
    /// The bundle, and the file that `runc` writes the pid of the first process to.
    files: TempDir,
}

/// Id of the container, unique to this process: each test is a process of its own.
fn id() -> String {
    format!("{:064x}", u128::from(std::process::id()) << 64 | 0x0b5e)
}

impl Container {
    /// Starts a container with a root of its own that has the programs of this machine, a folder of the host at
    /// `/data`, and a server that a shell starts once the network is up.
    pub(crate) fn running(serve: &str, data: &Path) -> Self {
        let mut mounts = vec![(data.to_owned(), "/data".to_owned(), "rw")];
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers");
        mounts.push((scripts, "/scripts".into(), "ro"));
        let folders = ["/usr", "/bin", "/sbin", "/lib", "/lib64"].map(Path::new).into_iter();
        let real = folders.clone().filter(|folder| folder.is_dir() && !folder.is_symlink());
        mounts.extend(real.map(|folder| (folder.to_owned(), folder.display().to_string(), "ro")));
        let files = tempfile::tempdir().unwrap();
        let root = files.path().join("rootfs");
        fs::create_dir(&root).unwrap();
        for link in folders.filter(|folder| folder.is_symlink()) {
            symlink(fs::read_link(link).unwrap(), root.join(link.strip_prefix("/").unwrap())).unwrap();
        }
        fs::create_dir(root.join("own")).unwrap();
        fs::copy("/bin/busybox", root.join("own/busybox")).expect("busybox is installed");
        let serve = format!("/own/busybox ip link set lo up; exec {serve}");
        let cgroup = format!("/cri-containerd-{}.scope", id());
        configure(files.path(), &cgroup, &["/own/busybox", "sh", "-c", &serve], &mounts);
        let container = Self::run(files, Command::new("runc"));
        wait_for("the container's first process", || container.pid());
        container
    }

    /// Output of a command in the network namespace of the container.
    pub(crate) fn tool(&self, arguments: &[&str], input: &str) -> String {
        let pid = self.pid().unwrap().to_string();
        let mut command = Command::new("nsenter");
        command.args(["-t", &pid, "-n"]).args(arguments);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
    }

    /// Starts a container in a cgroup that is named as by containerd. The cgroup has no parent folder, which would be
    /// left behind.
    fn new() -> Self {
        Self::in_cgroup(&format!("/cri-containerd-{}.scope", id()), Command::new("runc"))
    }

    /// Starts a container in this cgroup, with only busybox in its root, where busybox serves the root folder. `runc`
    /// is a command that executes runc.
    pub(crate) fn in_cgroup(cgroup: &str, runc: Command) -> Self {
        let files = tempfile::tempdir().unwrap();
        let bin = files.path().join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).expect("busybox is installed");
        fs::write(files.path().join("rootfs/index.html"), "here").unwrap();
        let serve = format!("busybox ip link set lo up; exec busybox httpd -f -p {ADDRESS} -h /");
        configure(files.path(), cgroup, &["/bin/busybox", "sh", "-c", &serve], &[]);
        let container = Self::run(files, runc);
        wait_for("the server in the container", || container.get().then_some(()));
        container
    }

    /// Runs a container from a bundle. `runc` is a command that executes runc.
    fn run(files: TempDir, mut runc: Command) -> Self {
        let id = id();
        let child = runc
            // The root of a guest is an initramfs, which does not support pivot_root.
            .args(["run", "--no-pivot", "--pid-file", "pid", &id])
            .current_dir(files.path())
            .stdin(Stdio::null())
            .spawn()
            .expect("runc is installed");
        Self { process: Process(child), id, files }
    }

    /// Pid of the first process, once it has started.
    pub(crate) fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.files.path().join("pid")).ok()?.parse().ok()
    }

    /// Sends a request in the network namespace of the container; returns whether it succeeds.
    pub(crate) fn get(&self) -> bool {
        let Some(pid) = self.pid().map(|pid| pid.to_string()) else { return false };
        let url = format!("http://{ADDRESS}/");
        let arguments = ["-t", &pid, "-n", "busybox", "wget", "-q", "-O", "-", &url];
        let output = Command::new("nsenter").args(arguments).stderr(Stdio::null()).output().unwrap();
        output.status.success() && output.stdout == b"here"
    }
}

/// `runc` removes what it created when its container ends.
impl Drop for Container {
    fn drop(&mut self) {
        let _gone_already = Command::new("runc").args(["delete", "--force", &self.id]).status();
        let _ended = exit_within(&mut self.process.0, LIMIT);
    }
}

/// Writes the configuration of `runc spec`, changed to run a server with the capability to configure its network, in
/// this cgroup and with these mounts.
fn configure(bundle: &Path, cgroup: &str, arguments: &[&str], mounts: &[(PathBuf, String, &str)]) {
    let spec =
        Command::new("runc").args(["spec", "--bundle"]).arg(bundle).status().expect("runc is installed");
    assert!(spec.success());
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(arguments);
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_NET_ADMIN"));
    }
    config["linux"]["cgroupsPath"] = json!(cgroup);
    for (source, destination, access) in mounts {
        let mount = json!({"source": source, "destination": destination, "type": "bind", "options": ["rbind", access]});
        config["mounts"].as_array_mut().unwrap().push(mount);
    }
    fs::write(path, config.to_string()).unwrap();
}

#[real_test]
fn container_id_is_reported() {
    let container = Container::new();
    let pid = container.pid().unwrap();
    let observer = Observer::start(&["--pid", &pid.to_string(), "--listen", "127.0.0.1:0"]);
    for _ in 0..CONNECTIONS {
        assert!(container.get());
    }
    let scrape = observer.scrape();
    let labels = format!("container=\"{}\",pod=\"\",listener=\"{ADDRESS}\"}} {CONNECTIONS}", container.id);
    let mut accepts = scrape.lines().filter(|l| l.starts_with("observer_accept_queue_accepts_total{"));
    assert!(accepts.next().is_some_and(|line| line.ends_with(&labels)), "{labels} in {scrape}");

    let report = observer.finish();
    report.assert_complete();
    let target = report.target(pid);
    assert_eq!(target["container"], container.id, "{target:#}");
    let listeners = report.listeners(ADDRESS);
    assert_eq!(listeners.len(), 1, "{:#}", report.0);
    assert_eq!(listeners[0]["accepts"], CONNECTIONS, "{target:#}");
    assert_eq!(listeners[0]["wait"]["count"], CONNECTIONS, "{target:#}");

    let arguments = ["--pid", &pid.to_string(), "--no-listen", "--duration", "1s", "--format", "text"];
    let output = Command::new(BINARY).args(arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let name = format!("process busybox ({pid}), container {}  /bin/busybox", &container.id[..12]);
    assert!(text.lines().any(|line| line == name), "{name} in {text}");
}

#[real_test]
fn server_outside_of_containers_has_no_container_id() {
    let server = Server::asyncio();
    let report = Observer::attach(server.pid()).finish();
    assert_eq!(report.target(server.pid())["container"], Value::Null);
    assert_eq!(report.target(server.pid())["kubernetes"], Value::Null);
}

#[real_test]
fn systemd_unit_is_reported() {
    let container = Container::in_cgroup("/observer-test.service", Command::new("runc"));
    let pid = container.pid().unwrap();
    let observer = Observer::start(&["--pid", &pid.to_string(), "--listen", "127.0.0.1:0"]);
    let scrape = observer.scrape();
    assert!(scrape.contains(",unit=\"observer-test.service\"} 1"), "{scrape}");
    let report = observer.finish();
    let target = report.target(pid);
    assert_eq!(target["unit"], "observer-test.service", "{target:#}");
    assert_eq!((&target["container"], &target["kubernetes"]), (&Value::Null, &Value::Null), "{target:#}");
}

pub(crate) const UID: &str = "8f2d0c1a-5b1e-4d0c-9a6f-0e1d2c3b4a59";

/// Cgroup of a container in a pod, as containerd names it without systemd.
pub(crate) fn pod_cgroup() -> String {
    format!("/kubepods-besteffort-pod{}.slice:cri-containerd:{}", UID.replace('-', "_"), id())
}

/// The log folder of a node, with a pod of two containers.
pub(crate) struct Logs(TempDir);

impl Logs {
    pub(crate) fn new() -> Self {
        let logs = Self(tempfile::tempdir().unwrap());
        for container in ["web", "istio-proxy"] {
            fs::create_dir_all(logs.0.path().join(format!("pods/shop_web-0_{UID}")).join(container)).unwrap();
        }
        fs::create_dir(logs.0.path().join("containers")).unwrap();
        logs
    }

    /// Creates the container's link, as a kubelet does once the container runs.
    pub(crate) fn link(&self) {
        let link = self.0.path().join(format!("containers/web-0_shop_web-{}.log", id()));
        symlink(format!("/var/log/pods/shop_web-0_{UID}/web/0.log"), link).unwrap();
    }

    /// Runs a program that sees this folder at `/var/log`.
    pub(crate) fn seen_by(&self, program: &str) -> Command {
        let mut command = Command::new("unshare");
        let script = "mkdir -p /var/log && mount --bind \"$0\" /var/log && exec \"$@\"";
        command.args(["--mount", "sh", "-c", script]).arg(self.0.path()).arg(program);
        command
    }
}

fn names() -> Value {
    json!({ "namespace": "shop", "pod": "web-0", "container": "web", "uid": UID })
}

#[real_test]
fn kubernetes_names_are_reported() {
    let logs = Logs::new();
    let container = Container::in_cgroup(&pod_cgroup(), Command::new("runc"));
    let pid = container.pid().unwrap();
    let flags = ["--pid", &pid.to_string(), "--listen", "127.0.0.1:0"];
    let observer = Observer::start_command(logs.seen_by(BINARY), &flags, &[]);
    let labels =
        |container: &str| format!("namespace=\"shop\",container_name=\"{container}\",pod_uid=\"{UID}\"");
    let scrape = || observer.scrape();
    let first = scrape();
    assert!(first.contains(&labels("")), "{first}");
    let of_listener = format!("container=\"{}\",pod=\"web-0\",listener=\"{ADDRESS}\"}}", container.id);
    assert!(first.contains(&of_listener), "{first}");
    logs.link();
    // Names are looked up only while a process is young, which may be over on a slow machine.
    if !is_emulated() {
        wait_for("the container's name", || scrape().contains(&labels("web")).then_some(()));
        let report = observer.finish();
        let target = report.target(pid);
        assert_eq!((&target["container"], &target["unit"]), (&json!(container.id), &Value::Null));
        assert_eq!(target["kubernetes"], names(), "{target:#}");
    }

    let arguments = ["--pid", &pid.to_string(), "--no-listen", "--duration", "1s", "--format", "text"];
    let output = logs.seen_by(BINARY).args(arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let name = format!("process busybox ({pid}), container web ({}) of pod shop/web-0", &container.id[..12]);
    assert!(text.contains(&name), "{name} in {text}");
}

/// As on a node that is a container itself, or with observer in a container.
#[real_test]
fn kubernetes_names_are_found_in_the_mount_namespace_of_the_runtime() {
    let logs = Logs::new();
    logs.link();
    let container = Container::in_cgroup(&pod_cgroup(), logs.seen_by("runc"));
    let pid = container.pid().unwrap();
    let report = Observer::attach(pid).finish();
    assert_eq!(report.target(pid)["kubernetes"], names(), "{:#}", report.target(pid));
}

#[real_test(host_only("guests have no OTLP collector"))]
fn kubernetes_names_are_exported_as_resource_attributes() {
    let logs = Logs::new();
    logs.link();
    let container = Container::in_cgroup(&pod_cgroup(), Command::new("runc"));
    let pid = container.pid().unwrap().to_string();
    let receiver = Receiver::start("http", &[]);
    let collector = url(receiver.port);
    let flags =
        ["--pid", &pid, "--no-listen", "--otlp-endpoint", &collector, "--otlp-protocol", "http/protobuf"];
    Observer::start_command(logs.seen_by(BINARY), &flags, &[("OTEL_TRACES_EXPORTER", "none")]).finish();
    let mut points = 0;
    for_each_point(&receiver.stop(), |resource, _, _, _| {
        if resource.get("process.pid") != Some(&pid) {
            return;
        }
        points += 1;
        for (attribute, value) in [
            ("service.name", "web-0"),
            ("service.namespace", "shop"),
            ("container.id", &container.id),
            ("k8s.namespace.name", "shop"),
            ("k8s.pod.name", "web-0"),
            ("k8s.pod.uid", UID),
            ("k8s.container.name", "web"),
        ] {
            assert_eq!(resource[attribute], value, "{attribute}");
        }
    });
    assert!(points > 0);
}
