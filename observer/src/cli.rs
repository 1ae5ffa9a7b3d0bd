//! The command line and its help, from which the manual page is generated. Parsing only. A setting is an argument under
//! `HEADING`, here or, for profiles and OTLP, in the module that uses it. `run.rs` passes it on, to the programs and the
//! observation as a field of `observation/parameters.rs`.

use std::{ffi::OsString, net::SocketAddr, num::NonZero, path::PathBuf, time::Duration};

use clap::{
    ArgMatches, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum,
    parser::ValueSource,
};
use clap_complete::Shell;
use glob::Pattern;

use crate::{
    export::otlp::settings::OtlpArguments, model::histogram::Resolution, process::wait_call::WaitCall,
    profiles::ProfileSelection, read::capacity::Capacity, setting::HEADING,
};

/// The command line.
#[derive(Debug, Parser)]
#[command(
    name = "observer",
    version,
    about = "Is my server late, and whose fault is it?",
    long_about = "observer profiles event-loop servers from outside, without changing or restarting them. It measures how long \
connections wait to be accepted, how late each event loop is and why (on a CPU, waiting for one, or blocked), and which request \
each deferred task came from.",
    after_help = "Exit codes: 0 success, 1 failure (standard error says what to do), 2 wrong usage.",
    after_long_help = MORE,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) observe: Observe,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Blocks of text that begin with a title. `manual.rs` turns each into a section, and lines with two columns into a
/// list.
const MORE: &str = "\
Examples:
  sudo observer --pid $(pgrep -o nginx)                    live view of nginx and its workers; q prints the report
  sudo observer --pid 4242 --duration 30s --format text    a report after 30 seconds; metrics meanwhile at
                                                           http://127.0.0.1:9464/metrics
  sudo observer --pid 4242 --duration 10s --format json    a report for programs
  sudo observer --port 8080 --port 8081                    the processes that listen there, now or later
  sudo observer --all --format text                        every server of this machine
  sudo observer --config /etc/observer.toml --format text  as a service: docs/configuration.md
  sudo observer demo                                       a server with known misbehaviour

Terms:
  slice     the time between two waits for events of one thread; nothing else runs on its event loop meanwhile
  lag       the delay that an event arriving at a random moment would see; a loop with 50ms or more is LATE if
            events are known to have waited meanwhile, else BUSY
  stall     a slice of --stall-threshold or more, attributed to the stack that was seen most often in it
  wake-up   the delay from when an event makes a waiting loop runnable until the loop runs
  depth     connections whose handshake is done and that no process has accepted yet; limit is the maximum,
            oldest is how long the first of them has waited
  task      a deferred task: a coroutine, a timer or a job that a handler enqueues to run later; its origin is
            the request that enqueued it

Live view: it needs a terminal of at least 50 x 12 characters that can position text (TERM=dumb cannot).
Press ? for its keys. NO_COLOR turns colours off. Messages are printed when the view ends.

Pushing: these variables apply: OTEL_EXPORTER_OTLP_ENDPOINT, _PROTOCOL, _HEADERS, _TIMEOUT, _COMPRESSION (gzip),
_CERTIFICATE, _CLIENT_CERTIFICATE, _CLIENT_KEY; OTEL_METRIC_EXPORT_INTERVAL (milliseconds; default 60000),
OTEL_BSP_SCHEDULE_DELAY (the same for traces; default 1000), OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME
(of observer itself), OTEL_METRICS_EXPORTER=none, OTEL_TRACES_EXPORTER=none, OTEL_SDK_DISABLED. For one signal,
OTEL_EXPORTER_OTLP_METRICS_… or OTEL_EXPORTER_OTLP_TRACES_… takes precedence. sudo passes variables on only
with -E or --preserve-env.

Exit codes: 0 success, 1 failure (standard error says what to do), 2 wrong usage.";

/// A parsed command line.
pub(crate) struct CommandLine {
    words: Vec<OsString>,
    matches: ArgMatches,
}

impl CommandLine {
    /// Parses the arguments, of which the first is the name of the program.
    pub(crate) fn parse(words: impl Iterator<Item = OsString>) -> Result<(Self, Cli), clap::Error> {
        let words: Vec<_> = words.collect();
        let matches = Cli::command().try_get_matches_from(&words)?;
        let cli = Cli::from_arg_matches(&matches)?;
        Ok((Self { words, matches }, cli))
    }

    /// Whether the command line itself has the argument with this id, rather than its default.
    pub(crate) fn has(&self, setting: &str) -> bool {
        self.matches.try_contains_id(setting).is_ok()
            && self.matches.value_source(setting) == Some(ValueSource::CommandLine)
    }

    /// Parses the command line again with additional arguments, which must be valid.
    pub(crate) fn with(&self, more: impl Iterator<Item = String>) -> Observe {
        let words = self.words.iter().cloned().chain(more.map(Into::into));
        let parsed = Self::parse(words);
        parsed.map_or_else(|error| error.exit(), |(_, cli)| cli.observe)
    }
}

/// Subcommands. Without a subcommand, observer starts an observation.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check what can be observed with this kernel and these rights; exit with 1 if observer cannot run
    Check(Check),
    /// List the probes: what each measures, what it hooks, what it costs
    Probes,
    /// List the built-in profiles: which runtimes are recognised, and which of their functions enqueue tasks
    Profiles,
    /// Write the reference page of all metrics
    #[command(hide = true)]
    Metrics,
    /// Observe a built-in server with known misbehaviour
    Demo(Demo),
    /// Write completions for a shell
    Completions(Completions),
    /// Write the manual page, for `man -l -`
    Man,
    /// The server that `demo` observes
    #[command(hide = true)]
    DemoServer,
}

/// What to observe, and how.
#[derive(Args, Debug)]
pub(crate) struct Observe {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) not: Not,
    /// Do not observe the children of these processes
    #[arg(long)]
    pub(crate) no_follow: bool,
    /// Limit runtime attachments per second
    ///
    /// Attaching to a runtime, for its collections and deferred tasks, stops the process for a moment. Queues and
    /// loops need no such attachment. A process that is given by its id does not wait.
    #[arg(help_heading = HEADING, long, value_name = "PROCESSES", default_value = "10")]
    pub(crate) attach_per_second: NonZero<u32>,
    /// Detach while FILE exists
    ///
    /// All programs, probes and maps leave the kernel. When the file is gone, a new observation begins with new
    /// counters.
    #[arg(help_heading = HEADING, long, value_name = "FILE")]
    pub(crate) kill_switch: Option<PathBuf>,
    /// System calls that count as waits for events
    ///
    /// A thread that uses several is classified by the first of epoll, io_uring, poll and select; its other blocking
    /// calls count as blocked time. A poll or select on a single descriptor is a wait only in a loop that polls
    /// several otherwise. A call with a timeout of 0 is a wait if it polls what the loop waits on; if it polls something
    /// else, such as a nested epoll set, it is part of the slice.
    #[arg(help_heading = HEADING, long, value_enum, value_name = "CALLS", value_delimiter = ',', default_values_t = WaitCall::DEFAULT)]
    pub(crate) reactor_calls: Vec<WaitCall>,
    /// Report slices of TIME or more as stalls, with cause and stack; at least 1ms
    #[arg(help_heading = HEADING, long, value_name = "TIME", value_parser = stall_threshold, default_value = "50ms")]
    pub(crate) stall_threshold: Duration,
    /// Maximum number of event loops and listeners tracked, with four times as many processes; from 16 to 65536
    ///
    /// The kernel memory for this (about 52 MiB for 1024) is allocated at the start and never grows. What exceeds the
    /// maximum is not observed, but counted (observer_self_lost_total, "Incomplete data" in reports).
    #[arg(help_heading = HEADING, long, value_name = "LOOPS", default_value_t = Capacity::DEFAULT)]
    pub(crate) capacity: Capacity,
    #[command(flatten)]
    pub(crate) known: ProfileSelection,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Which processes to observe: those that match any of these, with their threads and children.
#[derive(Args, Clone, Debug)]
#[group(id = "which", required = true, multiple = true)]
pub(crate) struct Which {
    /// Observe this process; this and all other selectors can be given more than once
    #[arg(long = "pid", value_name = "PID", value_parser = process_id)]
    pub(crate) pids: Vec<u32>,
    /// Observe every process of this name, as `ps -o comm` shows it
    ///
    /// With this and the following selectors, processes that start later are observed from when they first listen or
    /// wait for events, and observer continues when no process is left.
    #[arg(long = "comm", value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Observe every process that runs this program: a path or a file name; * and ? match any characters
    #[arg(long = "exe", value_name = "GLOB")]
    pub(crate) executables: Vec<Pattern>,
    /// Observe every process that listens on this TCP port, in any network namespace
    #[arg(long = "port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) ports: Vec<u16>,
    /// Observe every process in this cgroup or below
    #[arg(long = "cgroup", value_name = "PATH")]
    pub(crate) cgroups: Vec<String>,
    /// Observe every process that listens or waits for events
    #[arg(long)]
    pub(crate) all: bool,
    /// Read selectors, exclusions and settings from this file; SIGHUP reloads it
    ///
    /// docs/configuration.md lists them all. The command line takes precedence.
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,
}

/// Which processes not to observe, even if they are children of observed ones; --pid takes precedence.
#[derive(Args, Clone, Debug)]
pub(crate) struct Not {
    /// Do not observe processes of this name
    #[arg(long = "exclude-comm", value_name = "NAME")]
    pub(crate) not_names: Vec<String>,
    /// Do not observe processes that run this program
    #[arg(long = "exclude-exe", value_name = "GLOB")]
    pub(crate) not_executables: Vec<Pattern>,
    /// Do not observe processes that listen on this TCP port
    #[arg(long = "exclude-port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) not_ports: Vec<u16>,
    /// Do not observe processes in this cgroup or below
    #[arg(long = "exclude-cgroup", value_name = "PATH")]
    pub(crate) not_cgroups: Vec<String>,
}

/// The default of `--stall-threshold`, a delay that people notice.
pub(crate) const STALL_THRESHOLD: Duration = Duration::from_millis(50);

/// Parses a stall threshold. Stalls below 1 ms would end before their stack can be read.
pub(crate) fn stall_threshold(text: &str) -> Result<Duration, String> {
    let threshold = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if threshold < Duration::from_millis(1) { Err("at least 1ms".into()) } else { Ok(threshold) }
}

fn process_id(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "a process id is a number; --comm and --exe take names".into())
}

/// Arguments of `check`.
#[derive(Args, Debug)]
pub(crate) struct Check {
    /// Also check what can be observed of this process
    #[arg(long, value_name = "PID", value_parser = process_id)]
    pub(crate) pid: Option<u32>,
    #[command(flatten)]
    pub(crate) known: ProfileSelection,
}

/// Arguments of `demo`.
#[derive(Args, Debug)]
pub(crate) struct Demo {
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Arguments of `completions`.
#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// bash, elvish, fish, powershell or zsh
    #[arg(value_enum, hide_possible_values = true)]
    pub(crate) shell: Shell,
}

/// How long to observe, and where the results go.
#[derive(Args, Clone, Debug)]
pub(crate) struct Output {
    /// Stop and print the report after TIME, such as 500ms, 30s or 5m; default: at Ctrl-C, or when all processes have
    /// exited
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) duration: Option<Duration>,
    /// Output format; default: the live view on a terminal, text elsewhere
    #[arg(long, value_enum)]
    pub(crate) format: Option<Format>,
    /// Write a flame graph of the lag to this file at the end: a function is as wide as its share of the mean lag
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) flame: Option<PathBuf>,
    /// Listen on this address for Prometheus (path /metrics)
    #[arg(help_heading = HEADING, long, value_name = "ADDR", default_value = "127.0.0.1:9464")]
    pub(crate) listen: SocketAddr,
    /// Do not listen for Prometheus
    #[arg(long, conflicts_with = "listen")]
    pub(crate) no_listen: bool,
    /// Buckets of scraped and pushed histograms for each power of two, from 1 us to 69 s: 1, 2, 4 or 8
    ///
    /// With 1, a quantile is exact to a factor of 2; with 8, as in reports, to 12.5 %, with eight times as many series.
    #[arg(help_heading = HEADING, long, value_name = "BOUNDS", default_value_t = Resolution::LOWEST)]
    pub(crate) resolution: Resolution,
    #[command(flatten)]
    pub(crate) otlp: OtlpArguments,
    /// Print more messages, including those of the eBPF programs, on standard error
    #[arg(short, long)]
    pub(crate) verbose: bool,
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A view that is updated once a second, and the text report when it ends
    Live,
    /// A report for people
    Text,
    /// A report for programs: one object, schema observer.report/1, seconds as floats
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declaration_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn pids_can_be_repeated() {
        let cli = Cli::try_parse_from(["observer", "--pid", "1", "--pid", "2", "--duration", "30s"]).unwrap();
        let observe = cli.observe;
        assert_eq!(observe.which.pids, [1, 2]);
        assert_eq!(observe.output.duration, Some(Duration::from_secs(30)));
        assert_eq!(observe.output.listen.to_string(), "127.0.0.1:9464");
    }

    #[test]
    fn processes_can_be_selected_in_several_ways() {
        let arguments = ["observer", "--comm", "nginx", "--exe", "/usr/bin/python3*", "--port", "80"];
        let which = Cli::try_parse_from(arguments).unwrap().observe.which;
        assert_eq!((which.names.as_slice(), which.ports.as_slice()), (&["nginx".to_owned()][..], &[80][..]));
        assert!(Cli::try_parse_from(["observer", "--all"]).unwrap().observe.which.all);
        let none = ["--attach-per-second", "0"];
        for wrong in [["--exe", "[a"], ["--port", "http"], ["--port", "0"], ["--exclude-port", "0"], none] {
            let arguments = ["observer", "--all"].into_iter().chain(wrong);
            assert!(Cli::try_parse_from(arguments).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn calls_are_a_list() {
        let calls = |arguments: &[&str]| Cli::try_parse_from(arguments).map(|cli| cli.observe.reactor_calls);
        assert_eq!(calls(&["observer", "--pid", "1"]).unwrap(), [WaitCall::Epoll, WaitCall::IoUring]);
        let all = ["observer", "--pid", "1", "--reactor-calls", "epoll,io_uring,poll,select"];
        assert_eq!(calls(&all).unwrap(), WaitCall::value_variants());
        assert!(calls(&["observer", "--pid", "1", "--reactor-calls", "kqueue"]).is_err());
    }

    #[test]
    fn a_stall_has_a_threshold() {
        let threshold =
            |arguments: &[&str]| Cli::try_parse_from(arguments).map(|cli| cli.observe.stall_threshold);
        assert_eq!(threshold(&["observer", "--pid", "1"]).unwrap(), STALL_THRESHOLD);
        let given = ["observer", "--pid", "1", "--stall-threshold", "5ms"];
        assert_eq!(threshold(&given).unwrap(), Duration::from_millis(5));
        assert!(threshold(&["observer", "--pid", "1", "--stall-threshold", "10us"]).is_err());
    }

    #[test]
    fn nothing_to_observe_is_wrong_usage() {
        assert!(Cli::try_parse_from(["observer"]).is_err());
        assert!(Cli::try_parse_from(["observer", "--pid", "nginx"]).is_err());
        assert!(Cli::try_parse_from(["observer", "--pid", "1", "--duration", "soon"]).is_err());
    }
}
