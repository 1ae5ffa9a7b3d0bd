//! `observer demo`: a server with known misbehaviour, its load, and an observation of it.

pub(crate) mod server;
mod load;

use std::{
    collections::BTreeSet,
    env,
    io::{BufRead as _, BufReader, Write as _, stdout},
    num::NonZero,
    process::{Child, Command, ExitCode, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    cli::{Format, Output, STALL_THRESHOLD},
    observation::Parameters,
    process::choice::Choice,
    process::wait_call::WaitCall,
    profiles::PROFILES,
    read::capacity::Capacity,
    run::{self, Controls},
};

const DURATION: Duration = Duration::from_secs(15);

/// Starts the server and its load, observes the server, and explains the result.
pub(crate) fn run(output: Output) -> Result<ExitCode> {
    let server = Server::start()?;
    load::start(server.ports)?;
    let pids = BTreeSet::from([server.child.id()]);
    let calls = WaitCall::DEFAULT.to_vec();
    let profiles = PROFILES.clone();
    let parameters = Parameters {
        pids,
        choice: Choice::default(),
        attach_per_second: NonZero::<u32>::MAX,
        follow: true,
        calls,
        stall_threshold: STALL_THRESHOLD,
        capacity: Capacity::DEFAULT,
        profiles,
        is_limited: true,
    };
    let output = Output { duration: output.duration.or(Some(DURATION)), ..output };
    run::run(parameters, &output, Controls::default())?;
    if output.format != Some(Format::Json) {
        writeln!(stdout().lock(), "\n{}", explanation())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The server, in a process that is killed when this is dropped.
struct Server {
    child: Child,
    ports: server::Ports,
}

impl Server {
    fn start() -> Result<Self> {
        let mut child = Command::new(env::current_exe()?)
            .arg("demo-server")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the demo server")?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("the demo server has no standard output")?;
        BufReader::new(stdout).read_line(&mut line).context("cannot read the output of the demo server")?;
        let ports = line.parse().context("the demo server failed to start")?;
        Ok(Self { child, ports })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have exited already.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn explanation() -> String {
    format!(
        "What the report shows. The server of this demo misbehaves in known ways:\n  \
         - Its event loop `{reactor}` computes for {spin} ms once a second, and sleeps for {sleep} ms once a second. Nothing\n    \
           else runs on it meanwhile. These are its longest slices in the report: the first on a CPU, the second blocked.\n  \
         - After some requests it runs a deferred task for {work} ms. These slices add to the lag, but are too short for stalls.\n  \
         - Its thread `{accepter}` accepts a connection every {pause} ms, while {burst} arrive at once. They wait in the accept\n    \
           queue, which no timer inside the server can measure.\n\
         Now try it on your own server: sudo observer --pid PID --duration 30s",
        reactor = server::REACTOR,
        accepter = server::ACCEPTER,
        spin = server::SPIN.as_millis(),
        sleep = server::SLEEP.as_millis(),
        work = server::DEFERRED_WORK.as_millis(),
        pause = server::ACCEPT_PAUSE.as_millis(),
        burst = load::BURST,
    )
}
