//! The main job from preflight to report: checks what must hold, observes until it is time, prints.

use std::{
    fs::File,
    future::pending,
    io::stdout,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya_log::EbpfLogger;
use env_logger::Target;
use log::LevelFilter;
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::TcpListener,
    select,
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use crate::{
    cli::{Format, Observe, Output, Which},
    export::{
        endpoint, flame, json,
        live::{self, Live},
        otlp::{BUFFER, Collector, Due, Push, settings::Settings},
        series::Cap,
        text,
    },
    failure::Failure,
    kernel::{preflight, rights},
    model::snapshot::Snapshot,
    observation::{Observation, Selection},
    profiles::{self, Profile},
    target::{criteria::Criteria, process::ensure_observable},
};

/// How often targets, listeners and finished threads are looked after.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// Observes what the command line asks for.
pub(crate) fn observe(observe: &Observe) -> Result<ExitCode> {
    let Which { pids, names, executables, ports, cgroups, all } = observe.which.clone();
    let selection = Selection {
        pids: pids.into_iter().collect(),
        criteria: Criteria { all, names, executables, ports, cgroups },
        follow: !observe.no_follow,
        calls: observe.reactor_calls.clone(),
        stall_threshold: observe.stall_threshold,
        capacity: observe.capacity,
        profiles: profiles(observe)?,
        is_limited: observe.profiles.iter().any(|profile| profile == "auto"),
    };
    run(&selection, &observe.output)?;
    Ok(ExitCode::SUCCESS)
}

/// What runtimes are known by: what was chosen, and a library of the user's own.
fn profiles(observe: &Observe) -> Result<Vec<Arc<Profile>>> {
    let mut chosen = profiles::chosen(&observe.profiles)?;
    if let (Some(snapshot), Some(restore)) = (&observe.snapshot, &observe.restore) {
        chosen.push(Arc::new(Profile::of_own_library(snapshot, restore, observe.forget.as_ref())));
    }
    Ok(chosen)
}

/// Observes until the time is up, a signal comes or all targets are gone; then prints the report.
pub(crate) fn run(selection: &Selection, output: &Output) -> Result<()> {
    let own_level = if output.verbose { LevelFilter::Debug } else { LevelFilter::Warn };
    env_logger::Builder::new()
        .filter_level(LevelFilter::Warn)
        // Ours and, by the name of their crate, the programs'.
        .filter_module("observer", own_level)
        .format_timestamp(None)
        .target(Target::Pipe(Box::new(live::Messages)))
        .init();
    let format = format(output);
    let collector = Settings::find(output)?.map(Collector::find).transpose()?;
    ensure_possible(selection)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        // First of all, because a busy port is the likeliest failure and the cheapest to find.
        let flame = output.flame.as_deref().map(flame::create).transpose()?;
        let endpoint = if output.no_listen { None } else { Some(listen(output).await?) };
        let mut observation = Observation::start(selection, output.verbose).map_err(Failure::explained)?;
        if output.verbose {
            show_diagnostics(&mut observation)?;
        }
        rights::drop_others()?;
        return_memory();
        // Before anybody is told how to end it.
        let mut signals = Signals::catch()?;
        let view = if format == Format::Live {
            Some(Live::start(endpoint.as_ref().and_then(figures), output.duration)?)
        } else {
            announce(selection, &observation, output, endpoint.as_ref(), collector.is_some());
            None
        };
        // Whoever is told by name is so everywhere.
        let cap = Arc::new(Mutex::new(Cap::at(output.resolution)));
        let mut push = collector.map(|collector| Push::start(collector, &mut observation, Arc::clone(&cap)));
        let observation = Arc::new(Mutex::new(observation));
        if let Some(endpoint) = endpoint {
            tokio::spawn(endpoint::serve(endpoint, Arc::clone(&observation), cap));
        }
        until_over(&observation, output.duration, &mut signals, view, &mut push).await?;
        let snapshot = lock(&observation).report()?;
        let reported = report(&snapshot, flame, format);
        if let Some(mut push) = push {
            push.push_last(&snapshot, &mut lock(&observation));
            // Whoever asks again does not want to wait for a collector.
            push.finish(signals.come()).await;
        }
        reported
    });
    // Whoever looks a name up that nobody knows may take long over it.
    runtime.shutdown_background();
    outcome
}

/// Writes what was asked for.
fn report(snapshot: &Snapshot, flame: Option<File>, format: Format) -> Result<()> {
    // Where one cannot be written, the other may be.
    let graph = flame.map_or(Ok(()), |file| flame::write(snapshot, file));
    match format {
        Format::Live | Format::Text => text::write(snapshot, &mut stdout().lock()),
        Format::Json => json::write(snapshot, &mut stdout().lock()),
    }?;
    graph
}

/// What to show, here.
fn format(output: &Output) -> Format {
    match output.format {
        Some(Format::Live) | None if live::is_possible() => Format::Live,
        Some(Format::Live) => {
            log::warn!("no live view: it needs a terminal, in the foreground, that can place text");
            Format::Text
        }
        other => other.unwrap_or(Format::Text),
    }
}

/// Finds out what would fail later, and says what to do about it. Runs before any thread is started.
fn ensure_possible(selection: &Selection) -> Result<()> {
    // Whoever asks for a process that is not there wants to hear that first.
    for &pid in &selection.pids {
        ensure_observable(pid)?;
    }
    Ok(preflight::ensure()?)
}

async fn listen(output: &Output) -> Result<TcpListener> {
    let address = output.listen;
    TcpListener::bind(address).await.map_err(|error| {
        let what = format!("cannot listen on {address}: {error}");
        Failure::new(what, "choose another address with --listen ADDR, or none with --no-listen").into()
    })
}

/// Gives back what reading the kernel's BTF took, several times what observer keeps.
fn return_memory() {
    // SAFETY: no preconditions; only free memory is touched.
    #[cfg(target_env = "gnu")]
    unsafe {
        nix::libc::malloc_trim(0);
    }
}

/// Passes on what the programs themselves have to say.
fn show_diagnostics(observation: &mut Observation) -> Result<()> {
    let logger = EbpfLogger::init(observation.programs()).context("cannot read the programs' diagnostics")?;
    // SAFETY: the logger owns its ring's descriptor and never closes it before it is dropped itself.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
        .map_err(|error| error.into_parts().1)?;
    tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    });
    Ok(())
}

/// Tells a person at a terminal that something is going on, and how it ends.
fn announce(
    selection: &Selection,
    observation: &Observation,
    output: &Output,
    endpoint: Option<&TcpListener>,
    pushes: bool,
) {
    let names: Vec<_> = observation.live().map(|p| format!("{} ({})", p.comm, p.pid)).collect();
    let shown = names.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
    let more = names.len().saturating_sub(4);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    if names.is_empty() {
        eprintln!("observing nobody yet: no process like that is there; one that comes will be noticed");
    } else {
        eprintln!("observing {shown}{more}");
    }
    let memory = mebibytes(observation.map_memory());
    let waiting = if pushes {
        let most = mebibytes(BUFFER.try_into().unwrap_or(u64::MAX));
        format!("; at most {most} of each signal wait for the collector")
    } else {
        String::new()
    };
    eprintln!("room for {}: {memory} of the kernel's memory{waiting}", selection.capacity.described());
    if let Some(address) = endpoint.and_then(figures) {
        eprintln!("figures at {address}");
    }
    match output.duration {
        Some(duration) => eprintln!("report in {}, or at Ctrl-C", humantime::format_duration(duration)),
        None => eprintln!("report at Ctrl-C"),
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{}.{} MiB", bytes >> 20, (bytes >> 10) % 1024 * 10 / 1024)
}

/// Where a scraper finds the figures.
fn figures(endpoint: &TcpListener) -> Option<String> {
    Some(format!("http://{}/metrics", endpoint.local_addr().ok()?))
}

/// The signals that end an observation in good order.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn catch() -> Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Returns when one has come.
    async fn come(&mut self) {
        select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Returns when the time is up, a signal has come, all targets are gone or the user of the view has had enough.
async fn until_over(
    observation: &Mutex<Observation>,
    duration: Option<Duration>,
    signals: &mut Signals,
    mut view: Option<Live>,
    push: &mut Option<Push>,
) -> Result<()> {
    let end = duration.and_then(|duration| Instant::now().checked_add(duration));
    let time_is_up = async {
        match end {
            Some(end) => sleep_until(end).await,
            None => pending().await,
        }
    };
    tokio::pin!(time_is_up);
    let mut housekeeping = interval(HOUSEKEEPING);
    housekeeping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watch = interval(lock(observation).watch_period());
    watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let kinds = lock(observation).kinds_descriptor()?;
    // SAFETY: it owns the descriptor, which nobody closes before it is dropped itself.
    let kinds = unsafe { AsyncFd::register_with_interest(kinds, Interest::READABLE) }
        .map_err(|error| error.into_parts().1)?;
    loop {
        select! {
            () = &mut time_is_up => return Ok(()),
            () = signals.come() => return Ok(()),
            ready = kinds.readable() => {
                ready?.clear_ready();
                lock(observation).name_new();
            }
            _ = watch.tick() => lock(observation).watch()?,
            quit = until_quit(&mut view) => return quit,
            (push, due) = until_due(push) => push.push(due, &mut lock(observation))?,
            _ = housekeeping.tick() => {
                let mut observation = lock(observation);
                match &mut view {
                    Some(view) => view.show(observation.snapshot()?)?,
                    None => observation.refresh()?,
                }
                if observation.is_over() {
                    return Ok(());
                }
            }
        }
    }
}

/// Without a view nobody quits it.
async fn until_quit(view: &mut Option<Live>) -> Result<()> {
    match view {
        Some(view) => view.until_quit().await,
        None => pending().await,
    }
}

/// Without a collector nothing is ever due.
async fn until_due(push: &mut Option<Push>) -> (&mut Push, Due) {
    match push {
        Some(push) => {
            let due = push.due().await;
            (push, due)
        }
        None => pending().await,
    }
}

/// Whoever panicked with the lock in hand has left nothing half done that matters to others.
fn lock(observation: &Mutex<Observation>) -> MutexGuard<'_, Observation> {
    observation.lock().unwrap_or_else(PoisonError::into_inner)
}
