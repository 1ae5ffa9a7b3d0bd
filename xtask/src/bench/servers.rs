//! The servers that are measured, on loopback ports of their own, with nothing of theirs left behind.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::process::{Process, family, program, wait_for_start};
use crate::workspace::kept;

/// An HTTP server of Node.js that does nothing else.
const NODE: &str = "require('node:http').createServer((_, response) => response.end('ok'))\
.listen(Number(process.argv[1]), '127.0.0.1')";

/// An HTTP server of CPython's asyncio each of whose requests puts off one task.
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

/// An HTTP server of Ruby's async that does nothing else.
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

/// A server that listens.
pub(super) struct Server {
    process: Process,
    pub(super) port: u16,
    /// Where it listens besides, if it was told to.
    pub(super) socket: PathBuf,
    _files: TempDir,
}

impl Server {
    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// All of its processes.
    pub(super) fn pids(&self) -> Vec<u32> {
        family(self.pid())
    }

    /// The process whose first thread is the event loop under load.
    pub(super) fn event_loop(&self) -> u32 {
        self.pids().last().copied().unwrap_or(self.pid())
    }

    /// nginx with one worker.
    pub(super) fn nginx(cpu: Option<u32>, with_socket: bool) -> Result<Self> {
        let (port, files, socket) = place()?;
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
    pub(super) fn redis(cpu: Option<u32>) -> Result<Self> {
        let (port, files, socket) = place()?;
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

    /// Node.js.
    pub(super) fn node(cpu: Option<u32>) -> Result<Self> {
        let (port, files, socket) = place()?;
        let mut command = program("node", cpu);
        command.args(["-e", NODE, &port.to_string()]);
        Self { process: Process::start(&mut command)?, port, socket, _files: files }.listening("node")
    }

    /// CPython's asyncio, with a deferred task for each request.
    pub(super) fn asyncio(cpu: Option<u32>) -> Result<Self> {
        let (port, files, socket) = place()?;
        let mut command = program("/usr/bin/python3", cpu);
        // Clients that go away are told of as errors.
        command.args(["-c", ASYNCIO, &port.to_string()]).stderr(Stdio::null());
        Self { process: Process::start(&mut command)?, port, socket, _files: files }.listening("asyncio")
    }

    /// An event loop of Ruby.
    pub(super) fn ruby(cpu: Option<u32>) -> Result<Self> {
        let (port, files, socket) = place()?;
        let mut command = program("/usr/bin/ruby", cpu);
        command.args(["-e", RUBY, &port.to_string()]);
        Self { process: Process::start(&mut command)?, port, socket, _files: files }.listening("ruby")
    }

    fn listening(self, name: &str) -> Result<Self> {
        wait_for_start(name, || TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).ok())?;
        Ok(self)
    }
}

/// A port, a folder, and a path in it for a socket.
fn place() -> Result<(u16, TempDir, PathBuf)> {
    // In here, so that nothing is strewn about where nobody is left to tidy up.
    let files = tempfile::tempdir_in(kept(""))?;
    let socket = files.path().join("socket");
    Ok((free_port()?, files, socket))
}

/// A port that was free a moment ago.
pub(super) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// The tests' server that accepts through io_uring, and is its own client.
pub(super) struct RingAcceptor {
    process: Process,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Where it makes its own.
    _files: TempDir,
}

impl RingAcceptor {
    pub(super) fn start(binary: &Path) -> Result<Self> {
        let files = tempfile::tempdir_in(kept(""))?;
        let mut command = program(binary, None);
        command.args(["v4", "single", "512"]).env("TMPDIR", files.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::start(&mut command)?;
        let commands = process.child.stdin.take().context("its input")?;
        let mut answers = BufReader::new(process.child.stdout.take().context("its output")?);
        answers.read_line(&mut String::new())?;
        Ok(Self { process, commands, answers, _files: files })
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Has it do something, so many times.
    pub(super) fn tell(&mut self, what: &str) -> Result<u64> {
        writeln!(self.commands, "{what}")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        answer.trim().parse().with_context(|| format!("the io_uring server answers {answer:?} to {what}"))
    }
}
