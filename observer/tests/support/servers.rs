//! Real servers on free loopback ports, each with its own count of connections. Their programs are in `tests/servers`;
//! those of deferred work, accept queues and OTLP are started by the modules of these names beside this one.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    iter, mem,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use super::{Process, example, http, is_asleep, wait_for};

/// A port that is currently free. The kernel assigns none of these to other sockets, and other tests are given others.
pub(crate) fn free_port() -> u16 {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 10_000;
    const OF_EACH_TEST: u32 = 10;
    let of_this_test = FIRST + process::id() % 2_000 * OF_EACH_TEST;
    let mut ports = iter::repeat_with(|| of_this_test + TAKEN.fetch_add(1, Ordering::Relaxed));
    let mut ports = ports.by_ref().take(1_000).filter_map(|port| u16::try_from(port).ok());
    ports.find(|&port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()).expect("a free port")
}

/// Name of the file in which an asyncio server counts its waits.
const WAITS: &str = "waits";

/// Name of the file in which a server of several processes counts its connections.
const ACCEPTED: &str = "accepted";

/// A count of connections that no longer changes, apart from what reading it adds: several processes do not accept in
/// the order of arrival.
fn stable_count(who: &str, added_by_reading: u64, count: impl Fn() -> u64) -> u64 {
    wait_for(&format!("{who} to finish"), || {
        let mut last = count();
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(100));
            let before = mem::replace(&mut last, count());
            if last != before + added_by_reading {
                return None;
            }
        }
        Some(last)
    })
}

/// Runtime of a server that blocks its event loop for given causes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Runtime {
    Native,
    Python,
    Ruby,
}

/// A server and its port.
pub(crate) struct Server {
    pub(crate) process: Process,
    pub(crate) port: u16,
    files: Option<TempDir>,
}

impl Server {
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// nginx: a master and workers that share one listener.
    pub(crate) fn nginx(workers: usize) -> Self {
        Self::nginx_listening(workers, "")
    }

    /// nginx with a listener for each worker.
    pub(crate) fn nginx_reuseport(workers: usize) -> Self {
        Self::nginx_listening(workers, "reuseport")
    }

    fn nginx_listening(workers: usize, how: &str) -> Self {
        let files = tempfile::tempdir().unwrap();
        let port = free_port();
        let dir = files.path().display();
        let config = format!(
            "daemon off; user root; worker_processes {workers}; pid {dir}/pid; error_log {dir}/error.log;
             events {{ worker_connections 4096; }}
             http {{
               access_log off; client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy;
               fastcgi_temp_path {dir}/fastcgi; uwsgi_temp_path {dir}/uwsgi; scgi_temp_path {dir}/scgi;
               server {{
                 listen 127.0.0.1:{port} {how};
                 location / {{ return 200 'ok'; }}
                 location /status {{ stub_status; }}
               }}
             }}"
        );
        fs::write(files.path().join("nginx.conf"), config).unwrap();
        let child = Command::new("nginx")
            .arg("-p")
            .arg(files.path())
            .args(["-e", "error.log", "-c", "nginx.conf"])
            .stdin(Stdio::null())
            .spawn()
            .expect("nginx is installed");
        let server = Self { process: Process(child), port, files: Some(files) };
        wait_for("nginx", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok());
        // Workers accept in the order of arrival, so the queue is empty when this returns.
        http::get(port, "/");
        wait_for("nginx's workers", || (children(server.pid()).len() >= workers).then_some(()));
        server
    }

    /// nginx's own count of accepted connections, including the one of this request.
    pub(crate) fn nginx_accepts(&self) -> u64 {
        let status = http::get(self.port, "/status");
        status.lines().nth(2).unwrap().split_whitespace().next().unwrap().parse().unwrap()
    }

    /// The same with a listener for each worker: another worker may not have accepted its connections yet.
    pub(crate) fn nginx_accepts_of_all(&self) -> u64 {
        stable_count("nginx", 1, || self.nginx_accepts())
    }

    /// haproxy, which responds without a backend.
    pub(crate) fn haproxy() -> Self {
        let files = tempfile::tempdir().unwrap();
        let port = free_port();
        let config = format!(
            "global\n stats socket {}/stats\n maxconn 1000\n
             defaults\n mode http\n timeout connect 10s\n timeout client 60s\n timeout server 60s\n
             frontend here\n bind 127.0.0.1:{port}\n http-request return content-type text/plain string ok\n",
            files.path().display()
        );
        fs::write(files.path().join("haproxy.cfg"), config).unwrap();
        let child = Command::new("haproxy")
            .args(["-db", "-f", "haproxy.cfg"])
            .current_dir(files.path())
            .stdin(Stdio::null())
            .spawn()
            .expect("haproxy is installed");
        let server = Self { process: Process(child), port, files: Some(files) };
        // The socket for statistics appears last.
        wait_for("haproxy", || server.haproxy_statistics());
        server
    }

    /// haproxy's own count of accepted connections, read from its socket for statistics.
    pub(crate) fn haproxy_accepts(&self) -> u64 {
        stable_count("haproxy", 0, || {
            let mut connection = self.haproxy_statistics().unwrap();
            connection.write_all(b"show stat here 1 -1\n").unwrap();
            let mut answer = String::new();
            connection.read_to_string(&mut answer).unwrap();
            let mut lines = answer.lines().map(|line| line.split(','));
            let mut both = lines.next().unwrap().zip(lines.next().unwrap());
            both.find(|(name, _)| *name == "conn_tot").unwrap().1.parse().unwrap()
        })
    }

    fn haproxy_statistics(&self) -> Option<UnixStream> {
        UnixStream::connect(self.files.as_ref().unwrap().path().join("stats")).ok()
    }

    /// redis, without persistence.
    pub(crate) fn redis() -> Self {
        let port = free_port();
        let child = Command::new("redis-server")
            .args([
                "--port",
                &port.to_string(),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
                "--enable-debug-command",
                "yes",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis is installed");
        let server = Self { process: Process(child), port, files: None };
        wait_for("redis", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok());
        server
    }

    /// redis' own count of accepted connections, including the one of this request.
    pub(crate) fn redis_accepts(&self) -> u64 {
        let mut connection = http::connect(self.port);
        connection.write_all(b"INFO stats\r\nQUIT\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        let line = answer.lines().find_map(|line| line.strip_prefix("total_connections_received:")).unwrap();
        line.trim().parse().unwrap()
    }

    /// An asyncio server; see `servers/asyncio_server.py`.
    pub(crate) fn asyncio() -> Self {
        // Debian's Python, not one that a version manager installed.
        Self::asyncio_command(Command::new("/usr/bin/python3"))
    }

    /// An asyncio server with these environment variables.
    pub(crate) fn asyncio_with(variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new("/usr/bin/python3");
        command.envs(variables.iter().copied());
        Self::asyncio_command(command)
    }

    /// An asyncio server that is pinned to one CPU.
    pub(crate) fn asyncio_on_cpu(cpu: usize) -> Self {
        let mut command = Command::new("taskset");
        command.args(["-c", &cpu.to_string(), "/usr/bin/python3"]);
        Self::asyncio_command(command)
    }

    fn asyncio_command(command: Command) -> Self {
        let files = tempfile::tempdir().unwrap();
        let mut server = Self::script(command, "asyncio_server.py", &[&files.path().join(WAITS)]);
        server.files = Some(files);
        server
    }

    /// How often the wait of the asyncio loop has returned, by its own count.
    pub(crate) fn waits(&self) -> u64 {
        let counter = fs::read(self.files.as_ref().unwrap().path().join(WAITS)).unwrap();
        u64::from_ne_bytes(counter.try_into().unwrap())
    }

    /// Waits until the asyncio loop has nothing to do.
    pub(crate) fn wait_until_idle(&self) {
        wait_for("the loop to be idle", || {
            let before = self.waits();
            thread::sleep(Duration::from_millis(100));
            (self.waits() == before).then_some(())
        });
    }

    /// A Node.js server; see `servers/node_server.js`.
    pub(crate) fn node() -> Self {
        Self::script(Command::new("node"), "node_server.js", &[])
    }

    /// Node.js processes that share a port; see `servers/cluster_server.js`.
    pub(crate) fn node_cluster(policy: &str) -> Self {
        let files = tempfile::tempdir().unwrap();
        let accepted = files.path().join(ACCEPTED);
        let mut server =
            Self::script(Command::new("node"), "cluster_server.js", &[Path::new(policy), &accepted]);
        server.files = Some(files);
        server
    }

    /// gunicorn; see `servers/gunicorn_server.py`.
    pub(crate) fn gunicorn() -> Self {
        let files = tempfile::tempdir().unwrap();
        let accepted = files.path().join(ACCEPTED);
        let mut server = Self::script(Command::new("/usr/bin/python3"), "gunicorn_server.py", &[&accepted]);
        server.files = Some(files);
        wait_for("gunicorn's workers", || (children(server.pid()).len() == 4).then_some(()));
        http::get(server.port, "/");
        server
    }

    /// Connections that workers of gunicorn or of a Node.js cluster accepted, by their own count.
    pub(crate) fn connections(&self) -> u64 {
        stable_count("the workers", 0, || self.length_of(ACCEPTED))
    }

    /// How often a worker of gunicorn woke up for a connection that another worker accepted, by their own count.
    pub(crate) fn races_lost(&self) -> u64 {
        self.length_of(&format!("{ACCEPTED}.lost"))
    }

    fn length_of(&self, file: &str) -> u64 {
        fs::metadata(self.files.as_ref().unwrap().path().join(file)).unwrap().len()
    }

    /// A server that blocks its event loop for the requested cause; see `servers/causes_server.py`.
    pub(crate) fn causes(runtime: Runtime) -> Self {
        Self::causes_with_launcher(runtime, &[])
    }

    /// A server of causes that is pinned to one CPU.
    pub(crate) fn causes_on_cpu(runtime: Runtime, cpu: usize) -> Self {
        Self::causes_with_launcher(runtime, &["taskset", "-c", &cpu.to_string()])
    }

    fn causes_with_launcher(runtime: Runtime, launcher: &[&str]) -> Self {
        let program = match runtime {
            Runtime::Native => vec![example("causes_server")],
            Runtime::Python => vec!["/usr/bin/python3".into(), script_path("causes_server.py")],
            Runtime::Ruby => vec!["/usr/bin/ruby".into(), script_path("causes_server.rb")],
        };
        let mut words = launcher.iter().map(PathBuf::from).chain(program);
        let files = tempfile::tempdir().unwrap();
        let mut command = Command::new(words.next().unwrap());
        command.args(words).env("TMPDIR", files.path());
        let mut server = Self::spawn_server(command);
        server.files = Some(files);
        server
    }

    /// The Python server of causes with uvloop instead of asyncio's loop.
    pub(crate) fn uvloop() -> Self {
        let run =
            "import runpy, sys, uvloop; uvloop.install(); runpy.run_path(sys.argv[1], run_name='__main__')";
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", run]);
        Self::script(command, "causes_server.py", &[])
    }

    /// A tokio server with so many workers; see `servers/tokio_server.rs`.
    pub(crate) fn tokio(workers: u32) -> Self {
        let mut command = Command::new(example("tokio_server"));
        command.arg(workers.to_string());
        Self::spawn_server(command)
    }

    /// Starts a script of this repository.
    fn script(mut command: Command, name: &str, arguments: &[&Path]) -> Self {
        command.arg(script_path(name)).args(arguments);
        Self::spawn_server(command)
    }

    /// Starts a server that prints its port.
    fn spawn_server(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().parse().unwrap_or_else(|_| panic!("{command:?} prints {line:?} for its port"));
        Self { process: Process(child), port, files: None }
    }

    /// Makes a scripted server block; returns the server's own measurements.
    pub(crate) fn block(&self, kind: &str, milliseconds: u32) -> Value {
        serde_json::from_str(&http::get(self.port, &format!("/{kind}/{milliseconds}"))).unwrap()
    }

    /// Makes a scripted server sleep while another client waits for a response. The sleep must be long enough to be seen
    /// in `/proc`.
    pub(crate) fn sleep_while_asked(&self, milliseconds: u32) {
        thread::scope(|scope| {
            scope.spawn(|| self.block("sleep", milliseconds));
            wait_for("the server to sleep", || is_asleep(self.pid(), self.pid()).then_some(()));
            http::get(self.port, "/none/0");
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        end(&mut self.process);
    }
}

/// Ends a server and its workers. SIGTERM comes first, because some workers outlive a parent that is killed.
pub(crate) fn end(server: &mut Process) {
    if matches!(server.0.try_wait(), Ok(None)) {
        for pid in children(server.pid()) {
            super::send(pid, nix::sys::signal::Signal::SIGCONT);
        }
        server.signal(nix::sys::signal::Signal::SIGTERM);
        if super::exit_within(&mut server.0, Duration::from_secs(10)).is_none() {
            eprintln!("process {} does not end when asked and is killed", server.pid());
            children(server.pid())
                .into_iter()
                .for_each(|pid| super::send(pid, nix::sys::signal::Signal::SIGKILL));
        }
    }
}

/// Path of a script in `tests/servers`.
fn script_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers").join(name)
}

/// Children of a process, as the kernel lists them for each of its threads.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}
