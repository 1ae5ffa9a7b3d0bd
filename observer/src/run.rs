//! Runs an observation, from the preflight checks to the report, with its signals, reloads and kill switch, and drives the
//! exporters.

use std::{
    future::pending,
    io::{Write as _, stderr, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex},
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
    observation::{Observation, Parameters},
    process::{choice::Choice, criteria::Criteria, ensure_observable},
    profiles,
    sanitize::clean,
    signals::Signals,
    worker::{Done, Job, Worker, lock},
};

/// Interval between refreshes of an observation.
const REFRESH_PERIOD: Duration = Duration::from_secs(1);

/// How long breakpoints are removed silently; after that, a message is printed.
const SILENT_REMOVAL: Duration = Duration::from_secs(1);

/// How a running observation is controlled from outside.
#[derive(Default)]
pub(crate) struct Controls {
    /// observer is detached while this file exists.
    kill_switch: Option<PathBuf>,
    /// What a reload reads again; `None` without a configuration file.
    reload: Option<Reload>,
}

/// The configuration in force, and the command line that it belongs to.
struct Reload {
    observe: Observe,
    config: Config,
}

/// Observes what the command line and the configuration file ask for.
pub(crate) fn observe(observe: Observe, line: &CommandLine) -> Result<ExitCode> {
    let config = Config::of(&observe)?;
    let observe = config.complete(line);
    let parameters = Parameters {
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
    run(parameters, &output, Controls { kill_switch, reload })?;
    Ok(ExitCode::SUCCESS)
}

/// The selectors of the command line and the configuration file, other than `--pid`.
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
    /// Reads the configuration file again. An invalid one is logged and changes nothing.
    fn reread(&self) -> Option<Choice> {
        match Config::of(&self.observe) {
            Ok(config) => {
                let changed = config.settings_changed_from(&self.config);
                if !changed.is_empty() {
                    log::warn!("changed settings take effect after a restart: {}", changed.join(", "));
                }
                Some(choice(&self.observe, &config))
            }
            Err(failure) => {
                log::error!("{}; keeping the previous configuration", failure.what);
                None
            }
        }
    }

    /// Reads the configuration file again and applies its selectors to a running observation.
    fn apply(&self, observation: &mut Observation, chosen: &mut Choice) -> Result<()> {
        let reread = self.reread();
        let is_accepted = reread.is_some();
        if let Some(choice) = reread {
            chosen.clone_from(&choice);
            observation.choose(choice)?;
        }
        observation.count_reload(is_accepted);
        Ok(())
    }
}

/// Observes until the time is up, a signal arrives or all targets have exited; then prints the report.
pub(crate) fn run(mut parameters: Parameters, output: &Output, controls: Controls) -> Result<()> {
    init_logging(output.verbose);
    let format = format(output);
    let settings = Settings::find(&output.otlp)?;
    check_preconditions(&parameters)?;
    heap::set_mmap_threshold();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        // Before everything else: a port in use is the likeliest failure and the cheapest to detect.
        let flame = output.flame.as_deref().map(flame::create).transpose()?;
        let endpoint = if output.no_listen { None } else { Some(listen(output).await?) };
        let mut run = Run {
            output,
            controls: &controls,
            format,
            settings,
            metrics_url: endpoint.as_ref().and_then(metrics_url),
            limiter: Arc::new(Mutex::new(SeriesLimiter::at(output.resolution))),
            current: Arc::default(),
            flame,
            end: None,
        };
        if let Some(endpoint) = endpoint {
            run.serve(endpoint);
        }
        run.observe_until_end(&mut parameters).await
    });
    // A name lookup without an answer would delay the exit.
    runtime.shutdown_background();
    outcome
}

fn init_logging(is_verbose: bool) {
    let own_level = if is_verbose { LevelFilter::Debug } else { LevelFilter::Warn };
    env_logger::Builder::new()
        .filter_level(LevelFilter::Warn)
        // observer's own level applies to the eBPF programs as well: the name of their crate has the same prefix.
        .filter_module("observer", own_level)
        .format_timestamp(None)
        .target(Target::Pipe(Box::new(live::Messages)))
        .init();
}

/// What outlives an observation: the kill switch may end one, and another one starts when the file is gone.
struct Run<'r> {
    output: &'r Output,
    controls: &'r Controls,
    format: Format,
    settings: Option<Settings>,
    metrics_url: Option<String>,
    /// All exporters share it, so that they report the same subjects individually.
    limiter: Arc<Mutex<SeriesLimiter>>,
    /// `None` while observer is detached by the kill switch.
    current: Arc<Mutex<Option<Worker>>>,
    flame: Option<flame::Place>,
    /// When the time is up. It starts when the first observation has started.
    end: Option<Instant>,
}

impl Run<'_> {
    /// Answers scrapes whenever this thread awaits something: while observer is detached, and while it observes.
    fn serve(&self, endpoint: TcpListener) {
        let current = Arc::clone(&self.current);
        let read = move || {
            let worker = lock(&current).clone();
            worker.map_or_else(|| Ok(Snapshot::turned_off()), |worker| worker.snapshot())
        };
        tokio::spawn(endpoint::serve(endpoint, read, Arc::clone(&self.limiter)));
    }

    /// Observes, again after each time that the kill switch has detached observer.
    async fn observe_until_end(&mut self, parameters: &mut Parameters) -> Result<()> {
        loop {
            if let Some(file) = self.controls.kill_switch.as_deref().filter(|file| file.exists()) {
                log::warn!("detached while {} exists", file.display());
                let mut signals = Signals::catch(self.controls.reload.is_some())?;
                if !until_attachable(file, self.end, &mut signals).await {
                    return Ok(());
                }
                // SIGHUP does not reload while observer is detached, so the file may have changed.
                if let Some(choice) = self.controls.reload.as_ref().and_then(Reload::reread) {
                    parameters.choice = choice;
                }
            }
            if let End::Over = self.observe(parameters).await? {
                return Ok(());
            }
        }
    }

    /// Starts an observation, runs it until it ends, and prints the report unless the kill switch has ended it.
    async fn observe(&mut self, parameters: &mut Parameters) -> Result<End> {
        let collector = self.settings.clone().map(Collector::new).transpose()?;
        let mut observation =
            Observation::start(parameters, self.output.verbose).map_err(Failure::explained)?;
        let program_logs = self.output.verbose.then(|| forward_program_logs(&mut observation)).transpose()?;
        rights::drop_others()?;
        heap::trim();
        // Before any message says how to end observer.
        let mut signals = Signals::catch(self.controls.reload.is_some())?;
        let pushes = collector.is_some();
        let mut push = collector
            .map(|collector| Push::start(collector, observation.started(), Arc::clone(&self.limiter)));
        if let Some(push) = &push {
            push.export_stats().for_each(|stats| observation.add_export_stats(stats));
            push.trace_stats().into_iter().for_each(|stats| observation.trace(stats));
        }
        let began = Instant::now().checked_sub(observation.age()).unwrap_or_else(Instant::now);
        self.end = self.end.or_else(|| began.checked_add(self.output.duration?));
        let mut view = self.start_view()?;
        show(&mut view, &observation)?;
        let worker = Worker::of(observation);
        *lock(&self.current) = Some(worker.clone());
        // Scrapes and the live view have data by now. Other output announces that all is attached.
        let when_attached = |observation: &Observation, parameters: &Parameters| {
            if self.format != Format::Live {
                announce(parameters, observation, self.output, self.metrics_url.as_deref(), pushes);
            }
        };
        let mut running = Running { worker: worker.clone(), view, push: &mut push, signals: &mut signals };
        let why = running.until_end(self.end, self.controls, parameters, when_attached).await?;
        drop(running);
        let snapshot = worker.lock().report()?;
        let is_detached = matches!(why, End::TurnedOff);
        let reported = if is_detached { Ok(()) } else { report(&snapshot, self.flame.take(), self.format) };
        if let Some(push) = &mut push {
            push_traces(push, &mut worker.lock(), true);
            push.push_metrics(&snapshot);
        }
        if is_detached {
            // Detached at once, even if the collector is slow.
            *lock(&self.current) = None;
            drop(worker);
            if let Some(program_logs) = program_logs {
                program_logs.abort();
            }
        }
        if let Some(push) = push {
            // A second signal ends the wait for the collector.
            push.finish(signals.terminated()).await;
        }
        reported.map(|()| why)
    }

    /// Shows the live view, if that is the output.
    fn start_view(&self) -> Result<Option<Live>> {
        let is_live = self.format == Format::Live;
        is_live.then(|| Live::start(self.metrics_url.clone(), self.output.duration)).transpose()
    }
}

/// Waits until no breakpoint is left in any target. A signal may end the wait: the kernel then removes the others.
pub(crate) fn wait_for_removal() {
    for number in [NixSignal::SIGINT, NixSignal::SIGTERM, NixSignal::SIGHUP] {
        // SAFETY: installs no handler, but restores the default action; nothing needs the handler any more.
        let _cannot_fail = unsafe { set_signal_action(number, SigHandler::SigDfl) };
    }
    detach::finish_all(SILENT_REMOVAL, |left| {
        let message = format!("removing {left} breakpoints from the observed processes\n");
        let _ignored = stderr().write_all(message.as_bytes());
    });
}

/// Waits until the kill switch is removed. Returns `false` if the time was up or a signal arrived before.
async fn until_attachable(switch: &Path, end: Option<Instant>, signals: &mut Signals) -> bool {
    let gone = async {
        while switch.exists() {
            sleep(REFRESH_PERIOD).await;
        }
    };
    select! {
        () = gone => true,
        () = until(end) => false,
        _ = signals.terminated() => false,
    }
}

/// Waits until `end`; forever without one.
async fn until(end: Option<Instant>) {
    match end {
        Some(end) => sleep_until(end).await,
        None => pending().await,
    }
}

/// Writes the report and the flame graph that were requested.
fn report(snapshot: &Snapshot, flame: Option<flame::Place>, format: Format) -> Result<()> {
    // A flame graph that cannot be written must not prevent the report, nor the other way round.
    let graph = flame.map_or(Ok(()), |place| flame::write(snapshot, place));
    match format {
        Format::Live | Format::Text => text::write(snapshot, &mut stdout().lock()),
        Format::Json => json::write(snapshot, &mut stdout().lock()),
    }?;
    graph
}

/// The output format to use on this terminal.
fn format(output: &Output) -> Format {
    match output.format {
        Some(Format::Live) | None if live::is_possible() => Format::Live,
        Some(Format::Live) => {
            log::warn!(
                "the live view needs a terminal in the foreground that can position text (TERM must not be dumb); \
                 printing the report as text"
            );
            Format::Text
        }
        other => other.unwrap_or(Format::Text),
    }
}

/// Checks what would fail later; an error states how to fix it. Must run before any thread is started.
fn check_preconditions(parameters: &Parameters) -> Result<()> {
    // A process that does not exist is reported before missing rights.
    for &pid in &parameters.pids {
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

/// Forwards the log messages of the eBPF programs.
fn forward_program_logs(observation: &mut Observation) -> Result<JoinHandle<()>> {
    let logger = EbpfLogger::init(observation.programs())
        .context("cannot read the log messages of the eBPF programs")?;
    // SAFETY: the logger owns its ring's descriptor, and closes it only when it is dropped.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }
        .map_err(|error| error.into_parts().1)?;
    Ok(tokio::spawn(async move {
        while let Ok(mut guard) = logger.readable_mut().await {
            guard.get_inner_mut().flush();
            guard.clear_ready();
        }
    }))
}

/// Prints on standard error what is observed, and how the observation ends.
fn announce(
    parameters: &Parameters,
    observation: &Observation,
    output: &Output,
    metrics_url: Option<&str>,
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
    eprintln!("capacity: {}; {memory} of kernel memory{waiting}", parameters.capacity.described());
    if let Some(url) = metrics_url {
        eprintln!("metrics at {url}");
    }
    match output.duration {
        Some(duration) => eprintln!("report in {}, or at Ctrl-C", humantime::format_duration(duration)),
        None => eprintln!("report at Ctrl-C"),
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{}.{} MiB", bytes >> 20, (bytes >> 10) % 1024 * 10 / 1024)
}

/// URL of the Prometheus endpoint.
fn metrics_url(endpoint: &TcpListener) -> Option<String> {
    Some(format!("http://{}/metrics", endpoint.local_addr().ok()?))
}

/// Why an observation has ended.
enum End {
    /// The time is up, a signal has arrived, all targets have exited, or the user has quit the live view.
    Over,
    /// The file of `--kill-switch` exists.
    TurnedOff,
}

/// A running observation, and all that reacts to it.
struct Running<'r> {
    worker: Worker,
    view: Option<Live>,
    push: &'r mut Option<Push>,
    signals: &'r mut Signals,
}

impl Running<'_> {
    /// Runs the observation until it ends. `when_attached` is called once, when the targets that exist at the start have
    /// been attached to.
    async fn until_end(
        &mut self,
        end: Option<Instant>,
        controls: &Controls,
        parameters: &mut Parameters,
        when_attached: impl FnOnce(&Observation, &Parameters),
    ) -> Result<End> {
        let mut when_attached = Some(when_attached);
        let time_is_up = until(end);
        tokio::pin!(time_is_up);
        let mut refresh = interval(REFRESH_PERIOD);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watch = interval(self.worker.lock().watch_period());
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let kinds = self.worker.lock().kinds_descriptor()?;
        // SAFETY: it owns the descriptor, and closes it only when it is dropped.
        let kinds = unsafe { AsyncFd::register_with_interest(kinds, Interest::READABLE) }
            .map_err(|error| error.into_parts().1)?;
        let mut job = Job::None;
        let end = loop {
            let is_idle = job.is_none();
            select! {
                () = &mut time_is_up => break End::Over,
                is_end = self.signals.next() => match &controls.reload {
                    Some(reload) if !is_end => {
                        job.end().await?;
                        reload.apply(&mut self.worker.lock(), &mut parameters.choice)?;
                        // Attaches to the runtimes of new targets.
                        refresh.reset_immediately();
                    }
                    _ => break End::Over,
                },
                quit = until_quit(&mut self.view) => {
                    quit?;
                    break End::Over;
                }
                done = job.end(), if !is_idle => {
                    if done? == Some(Done::Refreshed) {
                        let observation = self.worker.lock();
                        when_attached.take().into_iter().for_each(|report| report(&observation, parameters));
                        if observation.is_over() {
                            break End::Over;
                        }
                        show(&mut self.view, &observation)?;
                    }
                }
                ready = kinds.readable(), if is_idle => {
                    ready?.clear_ready();
                    self.worker.lock().name_new();
                }
                _ = watch.tick(), if is_idle => job = self.worker.watch()?,
                (push, due) = until_due(self.push), if is_idle && when_attached.is_none() => match due {
                    Due::Metrics => push.push_metrics(&self.worker.lock().snapshot()?),
                    Due::Traces => push_traces(push, &mut self.worker.lock(), false),
                },
                _ = refresh.tick(), if is_idle => {
                    if controls.kill_switch.as_deref().is_some_and(Path::exists) {
                        break End::TurnedOff;
                    }
                    job = self.worker.refresh();
                }
            }
        };
        job.end().await?;
        when_attached.into_iter().for_each(|report| report(&self.worker.lock(), parameters));
        Ok(end)
    }
}

/// Shows the present state in the live view, if there is one.
fn show(view: &mut Option<Live>, observation: &Observation) -> Result<()> {
    view.as_mut().map_or(Ok(()), |view| view.show(observation.snapshot()?))
}

/// Waits until the user quits the live view; forever without one.
async fn until_quit(view: &mut Option<Live>) -> Result<()> {
    match view {
        Some(view) => view.until_quit().await,
        None => pending().await,
    }
}

/// Waits until a push is due; forever without a collector.
async fn until_due(push: &mut Option<Push>) -> (&mut Push, Due) {
    match push {
        Some(push) => {
            let due = push.due().await;
            (push, due)
        }
        None => pending().await,
    }
}

/// Queues spans for the events since the last call.
fn push_traces(push: &mut Push, observation: &mut Observation, are_last: bool) {
    let events = observation.events();
    push.push_traces(events, observation.live(), |pid| observation.process(pid), are_last);
}
