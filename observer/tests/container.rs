//! A server in a real container: another root, another network, its own cgroup, and no idea of observer.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    LIMIT, Process, exit_within, http,
    observer::{BINARY, Observer},
    servers::Server,
    wait_for,
};

/// Known operations.
const CONNECTIONS: u32 = 23;

const ADDRESS: &str = "127.0.0.1:8080";

/// A container made by `runc` with a root of busybox alone, where busybox serves its root folder.
struct Container {
    /// `runc`, which ends with its container.
    process: Process,
    id: String,
    /// The bundle, and the file that `runc` writes the process id of the first process to.
    files: TempDir,
}

impl Container {
    fn new() -> Self {
        let files = tempfile::tempdir().unwrap();
        let bin = files.path().join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        fs::copy("/bin/busybox", bin.join("busybox")).expect("busybox is installed");
        fs::write(files.path().join("rootfs/index.html"), "here").unwrap();
        let id = format!("{:064x}", u128::from(std::process::id()) << 64 | 0x0b5e);
        configure(files.path(), &id);
        let child = Command::new("runc")
            // A guest's root is an initramfs, which cannot be pivoted away from.
            .args(["run", "--no-pivot", "--pid-file", "pid", &id])
            .current_dir(files.path())
            .stdin(Stdio::null())
            .spawn()
            .expect("runc is installed");
        let container = Self { process: Process(child), id, files };
        wait_for("the server in the container", || container.get().then_some(()));
        container
    }

    /// Process id of its first process, once it has one.
    fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.files.path().join("pid")).ok()?.parse().ok()
    }

    /// One request in the container's network; whether it is answered.
    fn get(&self) -> bool {
        let Some(pid) = self.pid().map(|pid| pid.to_string()) else { return false };
        let url = format!("http://{ADDRESS}/");
        let arguments = ["-t", &pid, "-n", "busybox", "wget", "-q", "-O", "-", &url];
        let output = Command::new("nsenter").args(arguments).stderr(Stdio::null()).output().unwrap();
        output.status.success() && output.stdout == b"here"
    }
}

/// `runc` takes what it made away when its container ends.
impl Drop for Container {
    fn drop(&mut self) {
        let _gone_already = Command::new("runc").args(["delete", "--force", &self.id]).status();
        let _ended = exit_within(&mut self.process.0, LIMIT);
    }
}

/// Writes the configuration that `runc spec` proposes, with a server, the right to turn its network on, and a cgroup
/// named as containerd would.
fn configure(bundle: &Path, id: &str) {
    let spec =
        Command::new("runc").args(["spec", "--bundle"]).arg(bundle).status().expect("runc is installed");
    assert!(spec.success());
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let serve = format!("busybox ip link set lo up; exec busybox httpd -f -p {ADDRESS} -h /");
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(["/bin/busybox", "sh", "-c", serve]);
    for set in ["bounding", "effective", "permitted"] {
        config["process"]["capabilities"][set].as_array_mut().unwrap().push(json!("CAP_NET_ADMIN"));
    }
    // Without a folder above it, which would stay behind.
    config["linux"]["cgroupsPath"] = json!(format!("/cri-containerd-{id}.scope"));
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn a_server_in_a_container_is_found_with_its_container() {
    let container = Container::new();
    let pid = container.pid().unwrap();
    let observer = Observer::start(&["--pid", &pid.to_string(), "--listen", "127.0.0.1:0"]);
    for _ in 0..CONNECTIONS {
        assert!(container.get());
    }
    let scrape = http::get(observer.port(), "/metrics");
    let labels = format!("container=\"{}\",listener=\"{ADDRESS}\"}} {CONNECTIONS}", container.id);
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
    let name = format!("busybox, process {pid}, container {}  /bin/busybox", &container.id[..12]);
    assert!(text.lines().any(|line| line == name), "{name} in {text}");
}

#[test]
fn a_server_in_no_container_has_none() {
    let server = Server::asyncio();
    let report = Observer::of(server.pid()).finish();
    assert_eq!(report.target(server.pid())["container"], Value::Null);
}
