//! The servers that are measured. Each listens on a loopback port and keeps its files in a temporary folder.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::process::{Process, family, program, wait_for_start};

/// A minimal HTTP server for Node.js.
const NODE: &str = "require('node:http').createServer((_, response) => response.end('ok'))\
.listen(Number(process.argv[1]), '127.0.0.1')";

/// A minimal HTTP server for CPython's asyncio that enqueues one task per request.
const ASYNCIO: &str = r"
import asyncio, sys

async def task():
    pass

async def serve(reader, writer):
    while await reader.readuntil(b'\r\n\r\n'):
        asyncio.create_task(task())
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok')

async def main():
    server = await asyncio.start_server(serve, '127.0.0.1', int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
";

/// A minimal HTTP server for Ruby's async.
const RUBY: &str = r#"
require "async"
require "socket"

Async do |task|
  server = TCPServer.new("127.0.0.1", ARGV[0].to_i)
  loop do
    client = server.accept
    task.async do
      client.write("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") while client.gets("\r\n\r\n")
    rescue Errno::ECONNRESET, Errno::EPIPE
    ensure
      client.close
    end
  end
end
"#;

/// A server that accepts connections.
pub(crate) struct Server {
    process: Process,
    pub(crate) port: u16,
    /// The unix socket of nginx, if it listens on one.
    pub(crate) socket: PathBuf,
    _files: TempDir,
}

impl Server {
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The process and its children.
    pub(crate) fn pids(&self) -> Vec<u32> {
        family(self.pid())
    }

    /// The thread id of the event loop that serves requests, which is the main thread of its process.
    pub(crate) fn event_loop(&self) -> u32 {
        self.pids().last().copied().unwrap_or(self.pid())
    }

    /// nginx with one worker, which also listens on a unix socket if `with_socket` is set.
    pub(crate) fn nginx(cpu: Option<u32>, with_socket: bool) -> Result<Self> {
        let (port, files, socket) = allocate()?;
        let folder = files.path().display();
        let on_socket =
            if with_socket { format!("listen unix:{};", socket.display()) } else { String::new() };
        let config = format!(
            "daemon off; user root; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
             events {{ worker_connections 1024; }}
             http {{
               access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
               fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
               keepalive_requests 1000000000;
               server {{ listen 127.0.0.1:{port}; {on_socket} location / {{ return 200 'ok'; }} }}
             }}"
        );
        let file = files.path().join("nginx.conf");
        fs::write(&file, config)?;
        let mut command = program("nginx", cpu);
        command.arg("-p").arg(files.path()).args(["-e", "error.log", "-c"]).arg(file);
        let server = Self { process: Process::start(&mut command)?, port, socket, _files: files };
        wait_for_start("nginx's worker", || (server.pids().len() == 2).then_some(()))?;
        server.listening("nginx")
    }

    /// Redis, without persistence.
    pub(crate) fn redis(cpu: Option<u32>) -> Result<Self> {
        let (port, files, socket) = allocate()?;
        let mut command = program("redis-server", cpu);
        command.args([
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]);
        command.current_dir(files.path());
        Self { process: Process::start(&mut command)?, port, socket, _files: files }.listening("redis-server")
    }

    /// An HTTP server on Node.js.
    pub(crate) fn node(cpu: Option<u32>) -> Result<Self> {
        let (port, files, socket) = allocate()?;
        let mut command = program("node", cpu);
        command.args(["-e", NODE, &port.to_string()]);
        Self { process: Process::start(&mut command)?, port, socket, _files: files }.listening("node")
    }

    /// An HTTP server on CPython's asyncio, with one deferred task per request.
    pub(crate) fn asyncio(cpu: Option<u32>) -> Result<Self> {
        let (port, files, socket) = allocate()?;
        let mut command = program("/usr/bin/python3", cpu);
        // asyncio prints an error for each connection that a client closes.
        command.args(["-c", ASYNCIO, &port.to_string()]).stderr(Stdio::null());
        Self { process: Process::start(&mut command)?, port, socket, _files: files }.listening("asyncio")
    }

    /// An HTTP server on Ruby's async.
    pub(crate) fn ruby(cpu: Option<u32>) -> Result<Self> {
        let (port, files, socket) = allocate()?;
        let mut command = program("/usr/bin/ruby", cpu);
        command.args(["-e", RUBY, &port.to_string()]);
        Self { process: Process::start(&mut command)?, port, socket, _files: files }.listening("ruby")
    }

    fn listening(self, name: &str) -> Result<Self> {
        wait_for_start(name, || TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).ok())?;
        Ok(self)
    }
}

/// A port, a temporary folder, and the path of a socket in it.
fn allocate() -> Result<(u16, TempDir, PathBuf)> {
    let files = tempfile::tempdir()?;
    let socket = files.path().join("socket");
    Ok((free_port()?, files, socket))
}

/// A port that no socket listens on.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// observer's example `ring_acceptor`: a server that accepts through io_uring and is its own client.
pub(crate) struct RingAcceptor {
    process: Process,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Its `TMPDIR`.
    _files: TempDir,
}

impl RingAcceptor {
    pub(crate) fn start(binary: &Path) -> Result<Self> {
        let files = tempfile::tempdir()?;
        let mut command = program(binary, None);
        command.args(["v4", "single", "512"]).env("TMPDIR", files.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let commands = process.child.stdin.take().context("stdin is piped")?;
        let mut answers = BufReader::new(process.child.stdout.take().context("stdout is piped")?);
        answers.read_line(&mut String::new())?;
        Ok(Self { process, commands, answers, _files: files })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Runs a command, and returns the number in its answer.
    pub(crate) fn run(&mut self, command: &str) -> Result<u64> {
        writeln!(self.commands, "{command}")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        answer.trim().parse().with_context(|| format!("the io_uring server answers {answer:?} to {command}"))
    }
}
