//! `observer demo`: a server with known misbehaviour, its load, and observer on it.

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
    observation::Selection,
    process::choice::Choice,
    process::wait_call::WaitCall,
    profiles::PROFILES,
    read::capacity::Capacity,
    run::{self, Controls},
};

const DURATION: Duration = Duration::from_secs(15);

/// Starts the server, loads it, observes it and explains what there is to see.
pub(crate) fn run(output: Output) -> Result<ExitCode> {
    let server = Server::start()?;
    load::start(server.ports)?;
    let pids = BTreeSet::from([server.child.id()]);
    let calls = WaitCall::DEFAULT.to_vec();
    let profiles = PROFILES.clone();
    let selection = Selection {
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
    run::run(selection, &output, Controls::default())?;
    if output.format != Some(Format::Json) {
        writeln!(stdout().lock(), "\n{}", explanation())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The misbehaving server, a process of its own; it ends with this value.
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
            .context("cannot start the demo's server")?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("the server's output")?;
        BufReader::new(stdout).read_line(&mut line).context("the demo's server says nothing")?;
        let ports = line.parse().context("the demo's server could not start")?;
        Ok(Self { child, ports })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have exited by itself, which is what is wanted.
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn explanation() -> String {
    format!(
        "What you have just seen. The server in this demo misbehaves in known ways:\n  \
         - Its event loop `{reactor}` computes for {spin} ms once a second, and once a second sleeps for {sleep} ms: nobody\n    \
           else is served meanwhile. The report shows these as its longest slices: the first on a CPU, the second blocked.\n  \
         - After some requests it does work it had deferred, {work} ms each: slices too long to be free, too short to be late.\n  \
         - Its thread `{accepter}` accepts one connection every {pause} ms, while {burst} arrive at once: they wait in the\n    \
           accept queue, which no timer inside the server could tell.\n\
         Now try it on a server of yours: sudo observer --pid PID --duration 30s",
        reactor = server::REACTOR,
        accepter = server::ACCEPTER,
        spin = server::SPIN.as_millis(),
        sleep = server::SLEEP.as_millis(),
        work = server::DEFERRED_WORK.as_millis(),
        pause = server::ACCEPT_PAUSE.as_millis(),
        burst = load::BURST,
    )
}
