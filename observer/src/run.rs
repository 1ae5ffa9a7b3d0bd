//! The main job from preflight to report: checks what must hold, observes until it is time, prints.

use std::{
    future::pending,
    io::{Write as _, stderr, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use aya_log::EbpfLogger;
use env_logger::Target;
use log::LevelFilter;
use nix::sys::signal::{SigHandler, Signal as NixSignal, signal as set_signal_action};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::TcpListener,
    select,
    signal::unix::{Signal, SignalKind, signal},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until},
};

use crate::{
    cli::{CommandLine, Format, Not, Observe, Output, Which},
    config::Config,
    export::{
        endpoint, flame, json,
        live::{self, Live},
        otlp::{BUFFER, Collector, Due, Push, settings::Settings},
        series::SeriesLimiter,
        text,
    },
    failure::Failure,
    heap,
    kernel::{detach, preflight, rights},
    model::snapshot::Snapshot,
    observation::{Observation, Selection},
    process::{choice::Choice, criteria::Criteria, ensure_observable},
    profiles,
    sanitize::clean,
};

/// How often the observation is refreshed.
const REFRESH_PERIOD: Duration = Duration::from_secs(1);

/// How long breakpoints are removed without a word.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(1);

/// How an observation is controlled from outside.
#[derive(Default)]
pub(crate) struct Controls {
    /// Keeps observer out of the kernel while it exists.
    kill_switch: Option<PathBuf>,
    /// How to choose anew, if there is a configuration to read again.
    reload: Option<Reload>,
}

/// The configuration that is in force, and where it came from.
struct Reload {
    observe: Observe,
    config: Config,
}

/// Observes what the command line and the configuration ask for.
pub(crate) fn observe(observe: Observe, line: &CommandLine) -> Result<ExitCode> {
    let config = Config::of(&observe)?;
    let observe = config.complete(line);
    let selection = Selection {
        pids: observe.which.pids.iter().copied().collect(),
        choice: choice(&observe, &config),
        attach_per_second: observe.attach_per_second,
        follow: !observe.no_follow,
        calls: observe.reactor_calls.clone(),
        stall_threshold: observe.stall_threshold,
        capacity: observe.capacity,
        profiles: profiles::selected(&observe.known)?,
        is_limited: profiles::are_automatic(&observe.known),
    };
    let output = observe.output.clone();
    let kill_switch = observe.kill_switch.clone();
    let reload = observe.which.config.is_some().then_some(Reload { observe, config });
    run(selection, &output, Controls { kill_switch, reload })?;
    Ok(ExitCode::SUCCESS)
}

/// Whom the command line and the configuration choose, besides those that are given by their ids.
fn choice(observe: &Observe, config: &Config) -> Choice {
    let Which { pids: _, names, executables, ports, cgroups, all, config: file } = observe.which.clone();
    let Not { not_names, not_executables, not_ports, not_cgroups } = observe.not.clone();
    let include = Criteria { all, names, executables, ports, cgroups };
    let exclude = Criteria {
        all: false,
        names: not_names,
        executables: not_executables,
        ports: not_ports,
        cgroups: not_cgroups,
    };
    Choice {
        include: config.include.and(include),
        exclude: config.exclude.and(exclude),
        may_change: file.is_some(),
    }
}

impl Reload {
    /// Reads the configuration again. What is not understood changes nothing.
    fn again(&self) -> Option<Choice> {
        match Config::of(&self.observe) {
            Ok(config) => {
                let changed = config.settings_changed_from(&self.config);
                if !changed.is_empty() {
                    log::warn!("changed, but used only after a restart: {}", changed.join(", "));
                }
                Some(choice(&self.observe, &config))
            }
            Err(failure) => {
                log::error!("{}; the configuration stays as it was", failure.what);
                None
            }
        }
    }

    /// Has a running observation choose by what the configuration says now.
    fn reach(&self, observation: &mut Observation, chosen: &mut Choice) -> Result<()> {
        let again = self.again();
        let is_accepted = again.is_some();
        if let Some(choice) = again {
            chosen.clone_from(&choice);
            observation.choose(choice)?;
        }
        observation.count_reload(is_accepted);
        Ok(())
    }
}

/// Observes until the time is up, a signal comes or all targets are gone; then prints the report.
pub(crate) fn run(mut selection: Selection, output: &Output, controls: Controls) -> Result<()> {
    let own_level = if output.verbose { LevelFilter::Debug } else { LevelFilter::Warn };
    env_logger::Builder::new()
        .filter_level(LevelFilter::Warn)
        // Ours and, by the name of their crate, the programs'.
        .filter_module("observer", own_level)
        .format_timestamp(None)
        .target(Target::Pipe(Box::new(live::Messages)))
        .init();
    let format = format(output);
    let settings = Settings::find(&output.otlp)?;
    ensure_possible(&selection)?;
    heap::set_mmap_threshold();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        // First of all, because a busy port is the likeliest failure and the cheapest to find.
        let mut flame = output.flame.as_deref().map(flame::create).transpose()?;
        let endpoint = if output.no_listen { None } else { Some(listen(output).await?) };
        let figures = endpoint.as_ref().and_then(figures);
        // Whoever is told by name is so everywhere.
        let cap = Arc::new(Mutex::new(SeriesLimiter::at(output.resolution)));
        // None while observer is turned off.
        let current = Arc::new(Mutex::new(None::<Arc<Mutex<Observation>>>));
        if let Some(endpoint) = endpoint {
            // It answers from the first time on that nothing else is to be done: while observer waits, or observes.
            let current = Arc::clone(&current);
            let read = move || {
                let observation = lock(&current).clone();
                observation
                    .map_or_else(|| Ok(Snapshot::turned_off()), |observation| lock(&observation).snapshot())
            };
            tokio::spawn(endpoint::serve(endpoint, read, Arc::clone(&cap)));
        }
        let mut end = None;
        loop {
            if let Some(file) = controls.kill_switch.as_deref().filter(|file| file.exists()) {
                log::warn!("detached while {} exists", file.display());
                let mut signals = Signals::catch(controls.reload.is_some())?;
                if !until_turned_on(file, end, &mut signals).await {
                    return Ok(());
                }
                // It may have changed meanwhile, and was not read.
                if let Some(choice) = controls.reload.as_ref().and_then(Reload::again) {
                    selection.choice = choice;
                }
            }
            let collector = settings.clone().map(Collector::new).transpose()?;
            let mut observation =
                Observation::start(&selection, output.verbose).map_err(Failure::explained)?;
            let diagnostics = output.verbose.then(|| show_diagnostics(&mut observation)).transpose()?;
            rights::drop_others()?;
            heap::trim();
            // Before anybody is told how to end it.
            let mut signals = Signals::catch(controls.reload.is_some())?;
            let view = if format == Format::Live {
                Some(Live::start(figures.clone(), output.duration)?)
            } else {
                announce(&selection, &observation, output, figures.as_deref(), collector.is_some());
                None
            };
            let mut push =
                collector.map(|collector| Push::start(collector, observation.started(), Arc::clone(&cap)));
            if let Some(push) = &push {
                push.export_stats().for_each(|stats| observation.add_export_stats(stats));
                push.trace_stats().into_iter().for_each(|stats| observation.trace(stats));
            }
            let observation = Arc::new(Mutex::new(observation));
            *lock(&current) = Some(Arc::clone(&observation));
            // From when there is something to see, and not once more if observer was turned off meanwhile.
            end = end.or_else(|| Instant::now().checked_add(output.duration?));
            let chosen = &mut selection.choice;
            let why = until_over(&observation, end, &mut signals, view, &mut push, &controls, chosen).await?;
            let is_off = matches!(why, End::TurnedOff);
            let snapshot = lock(&observation).report()?;
            let reported = if is_off { Ok(()) } else { report(&snapshot, flame.take(), format) };
            if let Some(push) = &mut push {
                push_traces(push, &mut lock(&observation), true);
                push.push_metrics(&snapshot);
            }
            if is_off {
                // Out of the kernel at once, whatever the collector does.
                *lock(&current) = None;
                drop(observation);
                if let Some(diagnostics) = diagnostics {
                    diagnostics.abort();
                }
            }
            if let Some(push) = push {
                // Whoever asks again does not want to wait for a collector.
                push.finish(signals.come()).await;
            }
            if !is_off {
                return reported;
            }
        }
    });
    // Whoever looks a name up that nobody knows may take long over it.
    runtime.shutdown_background();
    outcome
}

/// Returns when no breakpoint is left in any target. A signal may end the wait: the kernel removes the rest all the same.
pub(crate) fn wait_for_removal() {
    for number in [NixSignal::SIGINT, NixSignal::SIGTERM, NixSignal::SIGHUP] {
        // SAFETY: sets no handler, but takes one away that nobody needs any more.
        let _cannot_fail = unsafe { set_signal_action(number, SigHandler::SigDfl) };
    }
    detach::finish_all(REMOVAL_PATIENCE, |left| {
        let message = format!("removing {left} breakpoints from the observed processes\n");
        let _nobody_reads = stderr().write_all(message.as_bytes());
    });
}

/// Waits until the kill switch is gone. Whether it is: before that, the time may be up or a signal may come.
async fn until_turned_on(switch: &Path, end: Option<Instant>, signals: &mut Signals) -> bool {
    let gone = async {
        while switch.exists() {
            sleep(REFRESH_PERIOD).await;
        }
    };
    select! {
        () = gone => true,
        () = until(end) => false,
        _ = signals.come() => false,
    }
}

/// Never, without an end.
async fn until(end: Option<Instant>) {
    match end {
        Some(end) => sleep_until(end).await,
        None => pending().await,
    }
}

/// Writes what was asked for.
fn report(snapshot: &Snapshot, flame: Option<flame::Place>, format: Format) -> Result<()> {
    // Where one cannot be written, the other may be.
    let graph = flame.map_or(Ok(()), |place| flame::write(snapshot, place));
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
            log::warn!(
                "no live view: it needs a terminal in the foreground that can place text (TERM is not dumb)"
            );
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

/// Passes on what the programs themselves have to say.
fn show_diagnostics(observation: &mut Observation) -> Result<JoinHandle<()>> {
    let logger = EbpfLogger::init(observation.programs()).context("cannot read the programs' diagnostics")?;
    // SAFETY: the logger owns its ring's descriptor and never closes it before it is dropped itself.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
        .map_err(|error| error.into_parts().1)?;
    Ok(tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    }))
}

/// Tells a person at a terminal that something is going on, and how it ends.
fn announce(
    selection: &Selection,
    observation: &Observation,
    output: &Output,
    figures: Option<&str>,
    pushes: bool,
) {
    let names: Vec<_> = observation.live().map(|p| format!("{} ({})", clean(&p.comm), p.pid)).collect();
    let shown = names.iter().take(4).cloned().collect::<Vec<_>>().join(", ");
    let more = names.len().saturating_sub(4);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    if names.is_empty() {
        eprintln!("no matching process yet; waiting for one");
    } else {
        eprintln!("observing {shown}{more}");
    }
    let memory = mebibytes(observation.map_memory());
    let waiting = if pushes {
        let most = mebibytes(BUFFER.try_into().unwrap_or(u64::MAX));
        format!("; at most {most} of each signal are buffered for the collector")
    } else {
        String::new()
    };
    eprintln!("capacity: {}; {memory} of kernel memory{waiting}", selection.capacity.described());
    if let Some(address) = figures {
        eprintln!("metrics at {address}");
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

/// The signals that end an observation in good order, or have its configuration read again.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    /// Whether the last of them is no end.
    reloads: bool,
}

impl Signals {
    fn catch(reloads: bool) -> Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            reloads,
        })
    }

    /// Returns when one has come that ends it.
    async fn come(&mut self) {
        let reloads = self.reloads;
        select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv(), if !reloads => {}
        }
    }

    /// Returns when one has come; whether it ends the observation, instead of having the configuration read again.
    async fn next(&mut self) -> bool {
        select! {
            _ = self.interrupt.recv() => true,
            _ = self.terminate.recv() => true,
            _ = self.hang_up.recv() => !self.reloads,
        }
    }
}

/// Why an observation has ended.
enum End {
    /// The time is up, a signal has come, all targets are gone or the user of the view has had enough.
    Over,
    /// There is the file that turns observer off.
    TurnedOff,
}

/// Returns when the observation has ended.
async fn until_over(
    observation: &Mutex<Observation>,
    end: Option<Instant>,
    signals: &mut Signals,
    mut view: Option<Live>,
    push: &mut Option<Push>,
    controls: &Controls,
    chosen: &mut Choice,
) -> Result<End> {
    let time_is_up = until(end);
    tokio::pin!(time_is_up);
    let mut refresh = interval(REFRESH_PERIOD);
    refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watch = interval(lock(observation).watch_period());
    watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let kinds = lock(observation).kinds_descriptor()?;
    // SAFETY: it owns the descriptor, which nobody closes before it is dropped itself.
    let kinds = unsafe { AsyncFd::register_with_interest(kinds, Interest::READABLE) }
        .map_err(|error| error.into_parts().1)?;
    loop {
        select! {
            () = &mut time_is_up => return Ok(End::Over),
            is_end = signals.next() => match &controls.reload {
                Some(reload) if !is_end => reload.reach(&mut lock(observation), chosen)?,
                _ => return Ok(End::Over),
            },
            ready = kinds.readable() => {
                ready?.clear_ready();
                lock(observation).name_new();
            }
            _ = watch.tick() => lock(observation).watch()?,
            quit = until_quit(&mut view) => return quit.map(|()| End::Over),
            (push, due) = until_due(push) => match due {
                Due::Metrics => push.push_metrics(&lock(observation).snapshot()?),
                Due::Traces => push_traces(push, &mut lock(observation), false),
            },
            _ = refresh.tick() => {
                if controls.kill_switch.as_deref().is_some_and(Path::exists) {
                    return Ok(End::TurnedOff);
                }
                let mut observation = lock(observation);
                observation.refresh()?;
                if let Some(view) = &mut view {
                    view.show(observation.snapshot()?)?;
                }
                if observation.is_over() {
                    return Ok(End::Over);
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

/// Queues spans of what has happened since the last time.
fn push_traces(push: &mut Push, observation: &mut Observation, are_last: bool) {
    let events = observation.events();
    push.push_traces(events, observation.live(), |pid| observation.process(pid), are_last);
}

/// Whoever panicked with the lock in hand has left nothing half done that matters to others.
fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
