//! `xtask test`, which is also what CI runs: style, lints, then the tests here and on each kernel.
//! A stage that fails does not stop those that can do without it; the closing table tells.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::ValueEnum;
use clap::builder::PossibleValue;
use duct::Expression;

use crate::kernel::Series;
use crate::python::{COLLECTOR, TRACER};
use crate::report::{Report, Work};
use crate::shell::{limited, show};
use crate::tally::Tally;
use crate::workspace::{Executable, build, cargo, plain_cargo};
use crate::{dependencies, documents, guest, manifests, observer, packages, toolchain, vm};

/// Those whose tests depend on the kernel.
const GUEST_PACKAGES: &[&str] = &["observer", "observer-common"];

/// A test executable that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(40 * 60);

/// Where tests run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Machine {
    Host,
    Guest(Series),
}

impl ValueEnum for Machine {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Host, Self::Guest(Series::V5_10), Self::Guest(Series::V6_1), Self::Guest(Series::V6_12)]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::Host => Some(PossibleValue::new("host")),
            Self::Guest(series) => series.to_possible_value(),
        }
    }
}

impl Machine {
    fn series(self) -> Option<Series> {
        match self {
            Self::Host => None,
            Self::Guest(series) => Some(series),
        }
    }
}

/// Runs all stages, on all machines if none is named.
pub(crate) fn run(machines: &[Machine], filter: Option<&str>) -> ExitCode {
    let machines = if machines.is_empty() { Machine::value_variants() } else { machines };
    let mut report = Report::default();
    stages(&mut report, machines, filter);
    report.finish()
}

/// Leaves early where going on makes no sense.
fn stages(report: &mut Report, machines: &[Machine], filter: Option<&str>) -> Option<()> {
    let guests: Vec<Series> = machines.iter().filter_map(|machine| machine.series()).collect();
    report.stage("setup", |_| {
        toolchain::setup()?;
        packages::install(&if guests.is_empty() { packages::for_tests() } else { packages::for_guests() })?;
        COLLECTOR.install()?;
        TRACER.install().map(|_| ())
    })?;
    report.stage("format", |_| check("cargo fmt", &plain_cargo(["fmt", "--all", "--check"])));
    report.stage("lint", |_| {
        let rest = ["--workspace", "--exclude", "observer-ebpf", "--all-targets", "--", "-D", "warnings"];
        check("cargo clippy", &cargo("clippy", &rest)?)?;
        // By itself, or it would share features with the others that need std; and without std no unwinding.
        let abort = "profile.release.panic='abort'";
        let ebpf = ["--package", "observer-ebpf", "--config", abort, "--", "-D", "warnings"];
        check("cargo clippy for observer-ebpf", &cargo("clippy", &ebpf)?)?;
        let rest = ["--workspace", "--exclude", "observer-ebpf", "--no-deps", "--document-private-items"];
        check("cargo doc", &cargo("doc", &rest)?.env("RUSTDOCFLAGS", "-D warnings"))
    });
    report.stage("dependencies", dependencies::check);
    report.stage("dashboards", |_| documents::check());
    report.stage("manifests", |_| manifests::check());
    let (observer, tests, programs) = report.stage("build", |_| {
        let args = ["--workspace", "--exclude", "observer-ebpf", "--no-run"];
        let built = build("test", &args)?.into_iter();
        let (tests, programs): (Vec<_>, Vec<_>) = built.partition(|executable| executable.is_test);
        Ok((observer::build()?, tests, programs))
    })?;

    if machines.contains(&Machine::Host) {
        report.stage("tests on host", |tally| {
            test_here(&tests, filter, tally)?;
            expect_some(tally, filter)
        });
    }
    // Each keeps one processor busy.
    report.at_once(guests.iter().map(|&series| {
        let (observer, tests, programs) = (&observer, &tests, &programs);
        Work::new(format!("tests on {series}"), move |tally| {
            test_in_guest(series, observer, tests, programs, filter, tally)?;
            expect_some(tally, filter)
        })
    }));
    None
}

/// A name may well exist in xtask alone, but without a name no test at all means a mistake.
fn expect_some(tally: &Tally, filter: Option<&str>) -> Result<()> {
    if tally.is_empty() && filter.is_none() {
        bail!("no test ran");
    }
    Ok(())
}

fn check(what: &str, command: &Expression) -> Result<()> {
    if !command.unchecked().run()?.status.success() {
        bail!("{what} found fault, see above");
    }
    Ok(())
}

fn test_here(tests: &[Executable], filter: Option<&str>, tally: &mut Tally) -> Result<()> {
    let mut all_passed = true;
    for test in tests {
        eprintln!("{}: {}", test.package(), test.name);
        let command = limited(LIMIT, &test.path, arguments(filter));
        // As cargo does for the tests it runs itself.
        let shown = show(&command.dir(&test.folder).env("CARGO_MANIFEST_DIR", &test.folder), "")?;
        *tally += &Tally::of(&shown.output);
        all_passed &= shown.success;
    }
    if !all_passed {
        bail!("tests failed here, see above");
    }
    Ok(())
}

fn test_in_guest(
    series: Series,
    observer: &Path,
    tests: &[Executable],
    programs: &[Executable],
    filter: Option<&str>,
    tally: &mut Tally,
) -> Result<()> {
    let kernel = series.kernel()?;
    let mut image = guest::image(observer, &kernel)?;
    for program in programs.iter().filter(|program| GUEST_PACKAGES.contains(&program.package())) {
        image.add_program(&program.path);
    }
    let mut commands = String::from("failed=0\n");
    for test in tests.iter().filter(|test| GUEST_PACKAGES.contains(&test.package())) {
        image.add_program(&test.path);
        let skipped = if series == Series::V5_10 || filter.is_some() { &[][..] } else { NOT_OF_THE_KERNEL };
        let skipped = skipped.iter().flat_map(|name| ["--skip", name]);
        let words =
            [test.path.to_str().unwrap_or_default()].into_iter().chain(arguments(filter)).chain(skipped);
        let test_command = shlex::try_join(words)?;
        let folder = shlex::try_quote(test.package())?;
        writeln!(commands, "echo {folder}: {}", test.name)?;
        writeln!(commands, "(cd {folder} && CARGO_MANIFEST_DIR=$PWD {test_command}) || failed=1")?;
    }
    commands.push_str("exit $failed");
    guest::set_command(&mut image, &commands)?;

    let outcome = vm::run(&kernel, &image.write()?, &format!("{series} | "))?;
    *tally += &Tally::of(&outcome.output);
    match outcome.status {
        Some(0) => Ok(()),
        Some(_) => bail!("tests failed on Linux {series}, see above"),
        None => bail!("the guest with Linux {series} did not come to its end, see above"),
    }
}

/// Tests of what is in user space alone. They run on the host and on one emulated kernel, which takes long enough.
const NOT_OF_THE_KERNEL: &[&str] = &[
    "churn::",
    "cli::",
    "deploy::",
    "endpoint::",
    "exports::",
    "lag::a",
    "otlp::",
    "otlp_traces::",
    "servers::",
    "stacks::",
    "symbols::",
];

/// One test at a time: they watch the same machine. Not captured: else skipped tests could not say so.
fn arguments(filter: Option<&str>) -> impl Iterator<Item = &str> {
    ["--test-threads=1", "--nocapture"].into_iter().chain(filter)
}
