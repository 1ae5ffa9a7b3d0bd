//! The command line: what can be asked for, and its help, which serves as the manual. Parsing only.

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

/// What a command line asks for.
#[derive(Debug, Parser)]
#[command(
    name = "observer",
    version,
    about = "Is my server late, and whose fault is it?",
    long_about = "Observer looks at event-loop servers from outside, without changing or restarting them. It tells how many \
connections wait to be accepted and for how long, and how long each event loop runs between two waits and why: on a CPU, \
waiting for one, or blocked.",
    after_help = "Exit codes: 0 done, 1 could not do it (what happened, and what to do), 2 wrong usage.",
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

/// Blocks that begin with a title. `manual.rs` makes sections of them, and of lines with two columns a list.
const MORE: &str = "\
Examples:
  sudo observer --pid $(pgrep -o nginx)                    watch until q, then a report; with all its workers
  sudo observer --pid 4242 --duration 30s --format text    a report after 30 seconds; figures meanwhile at
                                                           http://127.0.0.1:9464/metrics
  sudo observer --pid 4242 --duration 10s --format json    a report for programs
  sudo observer --port 8080 --port 8081                    whoever listens there, now or later
  sudo observer --all --format text                        every server of this machine
  sudo observer --config /etc/observer.toml --format text  as a service: docs/configuration.md
  sudo observer demo                                       watch a server with known misbehaviour

Words:
  slice     the time between two waits for events of the same thread, from when it is back on a CPU to
            when it blocks again: nothing else on that event loop can run meanwhile
  late      lag: the delay that something due at a random moment meets, be it a request or a timer
  stall     a slice of --stall-threshold or more; stalls are put down to the code that was seen in
            most of the looks that observer took while they lasted
  wake-up   the delay between an event making the loop runnable and the loop running
  depth     connections whose handshake is done and that nobody has accepted yet; limit is the most
            that may wait, oldest how long the first of them has waited

Live view: it needs a terminal that can place text (TERM=dumb cannot) and at least 50 x 12
characters; ? in it tells its keys. NO_COLOR turns its colours off. Messages wait until the
terminal is given back; the latest is shown.

Pushing: these variables are respected, those of OTEL_EXPORTER_OTLP_ also as
OTEL_EXPORTER_OTLP_METRICS_…, which comes first: OTEL_EXPORTER_OTLP_ENDPOINT, _PROTOCOL, _HEADERS,
_TIMEOUT, _COMPRESSION (gzip), _CERTIFICATE, _CLIENT_CERTIFICATE, _CLIENT_KEY;
OTEL_METRIC_EXPORT_INTERVAL (milliseconds; a minute without it), OTEL_RESOURCE_ATTRIBUTES,
OTEL_SERVICE_NAME (of observer itself), OTEL_METRICS_EXPORTER=none, OTEL_SDK_DISABLED. Mind that
sudo does not pass variables on unless told so.

Exit codes: 0 done, 1 could not do it (what happened, and what to do), 2 wrong usage.";

/// A command line that has been parsed.
pub(crate) struct CommandLine {
    words: Vec<OsString>,
    matches: ArgMatches,
}

impl CommandLine {
    /// Parses words, the first of which is the program.
    pub(crate) fn parse(words: impl Iterator<Item = OsString>) -> Result<(Self, Cli), clap::Error> {
        let words: Vec<_> = words.collect();
        let matches = Cli::command().try_get_matches_from(&words)?;
        let cli = Cli::from_arg_matches(&matches)?;
        Ok((Self { words, matches }, cli))
    }

    /// Whether it has a setting, by its id.
    pub(crate) fn has(&self, setting: &str) -> bool {
        self.matches.try_contains_id(setting).is_ok()
            && self.matches.value_source(setting) == Some(ValueSource::CommandLine)
    }

    /// What it asks for with these words as well, which are known to be valid.
    pub(crate) fn with(&self, more: impl Iterator<Item = String>) -> Observe {
        let words = self.words.iter().cloned().chain(more.map(Into::into));
        let parsed = Self::parse(words);
        parsed.map_or_else(|error| error.exit(), |(_, cli)| cli.observe)
    }
}

/// Anything but the main job.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what this kernel and these rights allow; exit with 1 if the main job cannot run
    Check(Check),
    /// List the probes: what each tells, what it hooks, what it costs
    Probes,
    /// List the built-in profiles: which runtimes are known, by what, and where they put work off
    Profiles,
    /// Write the reference page of all metrics
    #[command(hide = true)]
    Metrics,
    /// Observe a small server with known misbehaviour, made for this
    Demo(Demo),
    /// Write a script that has a shell complete what is typed
    Completions(Completions),
    /// Write the manual page: what --help says, for man
    Man,
    /// The server that `demo` observes
    #[command(hide = true)]
    DemoServer,
}

/// The main job.
#[derive(Args, Debug)]
pub(crate) struct Observe {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) not: Not,
    /// Leave out the children of these processes
    #[arg(long)]
    pub(crate) no_follow: bool,
    /// Of processes that are selected, attach to the runtimes of so many in a second; others wait for their turn
    ///
    /// Queues and loops are seen at once; this is for collections and deferred work. A process that is given by its id
    /// does not wait.
    #[arg(help_heading = HEADING, long, value_name = "PROCESSES", default_value = "10")]
    pub(crate) attach_per_second: NonZero<u32>,
    /// As long as this file exists, keep everything of observer's out of the kernel
    ///
    /// What was observed until it appeared is forgotten; when it is gone, a new observation begins.
    #[arg(help_heading = HEADING, long, value_name = "FILE")]
    pub(crate) kill_switch: Option<PathBuf>,
    /// Calls that threads wait for events with
    ///
    /// A thread that waits with several of them is known by the first of: epoll, io_uring, poll and select; its other
    /// blocking calls count as time blocked. A poll or select on a single descriptor is a wait only in a loop that
    /// polls several otherwise. A call with a timeout of 0 is a wait that returns at once if it looks at what the
    /// loop waits on; otherwise (into a nested epoll set) it is part of the work.
    #[arg(help_heading = HEADING, long, value_enum, value_name = "CALLS", value_delimiter = ',', default_values_t = WaitCall::DEFAULT)]
    pub(crate) reactor_calls: Vec<WaitCall>,
    /// From which length on a slice is a stall, told with its cause and culprit; at least 1ms
    #[arg(help_heading = HEADING, long, value_name = "TIME", value_parser = stall_threshold, default_value = "50ms")]
    pub(crate) stall_threshold: Duration,
    /// Room for so many event loops and listeners, four times as many processes, and the rest in proportion; from 16 to 65536
    ///
    /// What this takes of the kernel's memory (about 49 MiB for 1024) is told at the start, taken at once and never grows.
    /// What finds no room is not observed, and counted (observer_self_lost_total, "Not seen here" in reports).
    #[arg(help_heading = HEADING, long, value_name = "LOOPS", default_value_t = Capacity::DEFAULT)]
    pub(crate) capacity: Capacity,
    #[command(flatten)]
    pub(crate) known: ProfileSelection,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Whom to observe: whoever any of these fits, each with all its threads and children.
#[derive(Args, Clone, Debug)]
#[group(id = "which", required = true, multiple = true)]
pub(crate) struct Which {
    /// Process to observe; this, like all that select processes, can be given more than once
    #[arg(long = "pid", value_name = "PID", value_parser = process_id)]
    pub(crate) pids: Vec<u32>,
    /// Every process of this name, as `ps -o comm` shows it
    ///
    /// Processes that are not there yet are observed from the moment when they first listen or wait for events, as with
    /// all that follow; observer then goes on when none is left.
    #[arg(long = "comm", value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Every process that runs this program: a path, or the name of a file alone; * and ? stand for any characters
    #[arg(long = "exe", value_name = "GLOB")]
    pub(crate) executables: Vec<Pattern>,
    /// Every process that listens on this TCP port, in whatever network namespace
    #[arg(long = "port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) ports: Vec<u16>,
    /// Every process in this cgroup or in one below it
    #[arg(long = "cgroup", value_name = "PATH")]
    pub(crate) cgroups: Vec<String>,
    /// Every process that listens or waits for events
    #[arg(long)]
    pub(crate) all: bool,
    /// File with whom to observe and whom not to, and other settings; SIGHUP has it read again
    ///
    /// docs/configuration.md has all that it may say. What the command line says comes before it.
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) config: Option<PathBuf>,
}

/// Whom not to observe, be it the child of one who is: whoever any of these fits and no --pid names.
#[derive(Args, Clone, Debug)]
pub(crate) struct Not {
    /// Leave out processes of this name
    #[arg(long = "exclude-comm", value_name = "NAME")]
    pub(crate) not_names: Vec<String>,
    /// Leave out processes that run this program
    #[arg(long = "exclude-exe", value_name = "GLOB")]
    pub(crate) not_executables: Vec<Pattern>,
    /// Leave out processes that listen on this TCP port
    #[arg(long = "exclude-port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) not_ports: Vec<u16>,
    /// Leave out processes in this cgroup or in one below it
    #[arg(long = "exclude-cgroup", value_name = "PATH")]
    pub(crate) not_cgroups: Vec<String>,
}

/// What people notice.
pub(crate) const STALL_THRESHOLD: Duration = Duration::from_millis(50);

/// Shorter ones could not be looked at while they last.
pub(crate) fn stall_threshold(text: &str) -> Result<Duration, String> {
    let threshold = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if threshold < Duration::from_millis(1) { Err("at least 1ms".into()) } else { Ok(threshold) }
}

fn process_id(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "a process id is a number; --comm and --exe take names".into())
}

/// The check.
#[derive(Args, Debug)]
pub(crate) struct Check {
    /// Also tell what can be seen of this process
    #[arg(long, value_name = "PID", value_parser = process_id)]
    pub(crate) pid: Option<u32>,
    #[command(flatten)]
    pub(crate) known: ProfileSelection,
}

/// The demonstration.
#[derive(Args, Debug)]
pub(crate) struct Demo {
    #[command(flatten)]
    pub(crate) output: Output,
}

/// Completion in a shell.
#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// bash, elvish, fish, powershell or zsh
    #[arg(value_enum, hide_possible_values = true)]
    pub(crate) shell: Shell,
}

/// How long to look, and where figures go.
#[derive(Args, Clone, Debug)]
pub(crate) struct Output {
    /// Print the report and stop after this time, such as 500ms, 30s or 5m; without it, at Ctrl-C or when all targets are gone
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) duration: Option<Duration>,
    /// What to show; without it, the live view on a terminal and text elsewhere
    #[arg(long, value_enum)]
    pub(crate) format: Option<Format>,
    /// Write a flame graph of the lag into this file at the end: the wider a function, the more of the mean lag is its
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) flame: Option<PathBuf>,
    /// Address of the Prometheus endpoint (path /metrics)
    #[arg(help_heading = HEADING, long, value_name = "ADDR", default_value = "127.0.0.1:9464")]
    pub(crate) listen: SocketAddr,
    /// No Prometheus endpoint
    #[arg(long, conflicts_with = "listen")]
    pub(crate) no_listen: bool,
    /// Bounds that scraped and pushed histograms have for each power of two, from 1 us to 69 s: 1, 2, 4 or 8
    ///
    /// With 1, a quantile is exact to a factor of 2; with 8, as in reports, to 12.5 %, at eight times as many series.
    #[arg(help_heading = HEADING, long, value_name = "BOUNDS", default_value_t = Resolution::LOWEST)]
    pub(crate) resolution: Resolution,
    #[command(flatten)]
    pub(crate) otlp: OtlpArguments,
    /// Tell more about what observer does, the eBPF programs' own diagnostics included, on standard error
    #[arg(short, long)]
    pub(crate) verbose: bool,
}

/// What to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A view that follows what happens, and after it the report for people
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
