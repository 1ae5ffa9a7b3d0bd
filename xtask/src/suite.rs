//! `xtask test`, which CI runs as well: formatting, lints, then the tests on this machine and on each kernel. A failed
//! stage does not stop stages that do not depend on it; the final report lists all failures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use clap::builder::PossibleValue;
use duct::Expression;

use crate::kernel::Series;
use crate::nextest::{
    ALONE, CONTRACT, FULL_ONLY, KERNEL_PACKAGES, Nextest, PARALLEL, QUIET, Selection, Threads, USERSPACE,
};
use crate::python::{COLLECTOR, TRACER};
use crate::report::{ConcurrentStage, Findings, Report};
use crate::results::{Results, Verdict};
use crate::workspace::{Executable, build, cargo, plain_cargo};
use crate::{dependencies, guest, ledger, manifests, nextest, packages, toolchain, vm};

/// Packages whose test executables run in guests.
const GUEST_PACKAGES: &[&str] = &["observer", "observer-common"];

/// Prefix of environment variables for tests; they are passed on to guests.
const VARIABLES: &str = "OBSERVER_TEST_";

/// Where tests run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Machine {
    Host,
    Guest(Series),
}

impl ValueEnum for Machine {
    fn value_variants<'a>() -> &'a [Self] {
        &[
            Self::Host,
            Self::Guest(Series::V5_10),
            Self::Guest(Series::V6_1),
            Self::Guest(Series::V6_12),
            Self::Guest(Series::Newest),
        ]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        match self {
            Self::Host => Some(PossibleValue::new("host")),
            Self::Guest(series) => series.to_possible_value(),
        }
    }
}

/// Options of `xtask test`.
pub(crate) struct Options {
    /// Run every test on every kernel, including the newest.
    pub(crate) full: bool,
    /// How often to repeat the tests to find flaky ones.
    pub(crate) soak: Option<u32>,
    /// Where to run; by default this machine and the pinned kernels.
    pub(crate) machines: Vec<Machine>,
    /// Substrings of the names of tests; all tests if empty.
    pub(crate) names: Vec<String>,
}

impl Options {
    fn machines(&self) -> Vec<Machine> {
        let all = Machine::value_variants();
        match (&self.machines[..], self.full) {
            ([], false) => all.iter().copied().filter(|&it| it != Machine::Guest(Series::Newest)).collect(),
            ([], true) => all.to_vec(),
            (chosen, _) => chosen.to_vec(),
        }
    }

    fn guests(&self) -> Vec<Series> {
        let series = |machine| if let Machine::Guest(series) = machine { Some(series) } else { None };
        self.machines().into_iter().filter_map(series).collect()
    }

    /// Filter expression for a kernel: the contract tests, or with `--full` or names all tests that depend on the
    /// kernel.
    fn expression(&self, series: Series) -> String {
        if !self.full && self.names.is_empty() {
            format!("{KERNEL_PACKAGES} & {CONTRACT}")
        } else if series == Series::V5_10 || !self.names.is_empty() {
            KERNEL_PACKAGES.to_owned()
        } else {
            format!("{KERNEL_PACKAGES} - {USERSPACE}")
        }
    }

    /// Whether lints are skipped, because only some tests or a soak are requested.
    fn is_partial(&self) -> bool {
        self.soak.is_some() || !self.names.is_empty()
    }
}

/// Runs the requested stages.
pub(crate) fn run(options: &Options) -> ExitCode {
    let mut report = Report::default();
    stages(&mut report, options);
    report.finish()
}

/// Runs the stages. Returns early if a stage fails that all later ones depend on.
fn stages(report: &mut Report, options: &Options) -> Option<()> {
    let guests = options.guests();
    report.stage("setup", |findings| {
        toolchain::setup()?;
        findings.unpinned.extend(toolchain::unpinned());
        packages::install(&if guests.is_empty() { packages::for_tests() } else { packages::for_guests() })?;
        nextest::install()?;
        COLLECTOR.install()?;
        TRACER.install()?;
        guests.iter().try_for_each(|series| series.fetch_kernel())
    })?;
    if !options.is_partial() {
        checks(report);
    }
    let built = report.stage("build", |_| Built::new())?;
    let has_host = options.machines().contains(&Machine::Host);
    if let Some(rounds) = options.soak {
        report.stage("soak", |findings| soak(&built, options, rounds, findings))?;
        return None;
    }
    // Guests keep the CPUs busy, so only tests that tolerate load run at the same time.
    let concurrent = has_host.then(|| {
        let built = &built;
        ConcurrentStage::new("host".to_owned(), move |findings| built.on_host(&PHASES[0], options, findings))
    });
    let guests = guests.iter().map(|&series| {
        let built = &built;
        ConcurrentStage::new(format!("Linux {series}"), move |findings| {
            built.on_guest(series, options, findings)
        })
    });
    let counts = (!options.is_partial() && options.machines.is_empty()).then(|| {
        let built = &built;
        ConcurrentStage::new("ledger".to_owned(), move |findings| {
            ledger::check(&built.observer, &built.ledger, findings)
        })
    });
    report.run_concurrently(concurrent.into_iter().chain(guests).chain(counts));
    if has_host {
        for phase in &PHASES[1..] {
            report.stage(phase.name, |findings| built.on_host(phase, options, findings));
        }
    }
    None
}

/// A group of tests on this machine.
struct Phase {
    name: &'static str,
    expression: &'static str,
    threads: Threads,
}

impl Phase {
    /// The tests of the phase, without long ones unless `--full` or names are given.
    fn selection(&self, options: &Options) -> Selection {
        let has_long = options.full || !options.names.is_empty();
        let expression = self.expression;
        Selection {
            label: self.name.to_owned(),
            expression: if has_long { expression.to_owned() } else { format!("{expression} - {FULL_ONLY}") },
            names: options.names.clone(),
            threads: self.threads,
            is_full: options.full,
        }
    }
}

/// These run one after the other.
const PHASES: [Phase; 3] = [
    Phase { name: "host", expression: PARALLEL, threads: Threads::AsConfigured },
    Phase { name: "host, quiet", expression: QUIET, threads: Threads::AsConfigured },
    Phase { name: "host, alone", expression: ALONE, threads: Threads::One },
];

/// All checks that do not run tests.
fn checks(report: &mut Report) {
    report.stage("format", |_| check("cargo fmt", &plain_cargo(["fmt", "--all", "--check"])));
    report.stage("lint", |_| {
        let rest = ["--workspace", "--exclude", "observer-ebpf", "--all-targets", "--", "-D", "warnings"];
        check("cargo clippy", &cargo("clippy", &rest)?)?;
        // Apart from the others, because feature unification would enable std. Without std there is no unwinding.
        let abort = "profile.release.panic='abort'";
        let ebpf = ["--package", "observer-ebpf", "--config", abort, "--", "-D", "warnings"];
        check("cargo clippy for observer-ebpf", &cargo("clippy", &ebpf)?)?;
        let rest = ["--workspace", "--exclude", "observer-ebpf", "--no-deps", "--document-private-items"];
        check("cargo doc", &cargo("doc", &rest)?.env("RUSTDOCFLAGS", "-D warnings"))
    });
    report.stage("dependencies", dependencies::check);
    report.stage("manifests", |_| manifests::check());
}

fn check(what: &str, command: &Expression) -> Result<()> {
    if !command.unchecked().run()?.status.success() {
        bail!("{what} reported errors, see above");
    }
    Ok(())
}

/// All executables that tests need, built once for this machine and all guests.
struct Built {
    observer: PathBuf,
    /// The program that counts instructions.
    ledger: PathBuf,
    executables: Vec<Executable>,
    nextest: Nextest,
}

impl Built {
    fn new() -> Result<Self> {
        let executables = build("test", &["--workspace", "--exclude", "observer-ebpf", "--no-run"])?;
        let is_observer = |executable: &&Executable| executable.name == "observer" && !executable.is_test;
        let observer = executables.iter().find(is_observer).context("package observer has no binary")?;
        let ledger = executables.iter().find(|executable| executable.name == "ledger");
        let ledger = ledger.context("package bench has no example ledger")?.path.clone();
        Ok(Self {
            observer: observer.path.clone(),
            ledger,
            nextest: Nextest::build_repository()?,
            executables,
        })
    }

    fn on_host(&self, phase: &Phase, options: &Options, findings: &mut Findings) -> Result<()> {
        findings.results = self.nextest.run_with_reruns(&phase.selection(options))?;
        if findings.results.0.is_empty() && options.names.is_empty() {
            bail!("no test ran");
        }
        Ok(())
    }

    fn on_guest(&self, series: Series, options: &Options, findings: &mut Findings) -> Result<()> {
        let package = series.kernel()?.package;
        if series.pinned() != Some(&package) {
            findings.unpinned.push(package);
        }
        let label = format!("Linux {series}");
        let mut results = self.run_in_guest(series, &label, &options.expression(series), &options.names)?;
        // A new guest, so that state left by the first run cannot interfere.
        if let Some(failed) = results.to_rerun(1, 1) {
            eprintln!("{series} | rerunning failed tests in a new guest");
            results.merge_rerun(&self.run_in_guest(series, &format!("{label}, again 1"), &failed, &[])?);
        }
        if results.0.is_empty() && options.names.is_empty() {
            bail!("no test ran");
        }
        findings.results = results;
        Ok(())
    }

    /// Runs tests in a new guest.
    fn run_in_guest(
        &self,
        series: Series,
        label: &str,
        expression: &str,
        names: &[String],
    ) -> Result<Results> {
        let kernel = series.kernel()?;
        let mut image = guest::image(&self.observer, &kernel)?;
        let of_guests = |executable: &&Executable| GUEST_PACKAGES.contains(&executable.package());
        for executable in self.executables.iter().filter(of_guests) {
            image.add_program(&executable.path);
        }
        image.add_program(&self.nextest.program);
        for metadata in [&self.nextest.cargo_metadata, &self.nextest.binaries_metadata] {
            image.add(metadata);
        }
        let command_line = self.nextest.command_line("guest", expression, names);
        let command_line: Vec<_> = command_line.iter().map(|word| word.to_string_lossy()).collect();
        let run = shlex::try_join(command_line.iter().map(AsRef::as_ref))?;
        let variables = std::env::vars().filter(|(name, _)| name.starts_with(VARIABLES));
        let run = variables
            .map(|(name, value)| shlex::try_quote(&value).map(|value| format!("{name}={value} ")))
            .chain([Ok(run)])
            .collect::<Result<String, _>>()?;
        guest::set_command(&mut image, &run, Some(Path::new("target/nextest/guest/junit.xml")))?;
        let outcome = vm::run(&kernel, &image.write()?, vm::Clock::Real, &format!("{series} | "))?;
        let Some(status) = outcome.status else {
            bail!("the guest with Linux {series} crashed, hung or timed out, see above")
        };
        self.nextest.read(label, Some(status.into()), &outcome.output, &outcome.file)
    }
}

/// Repeats the tests without reruns and prints how often each failed.
fn soak(built: &Built, options: &Options, rounds: u32, findings: &mut Findings) -> Result<()> {
    let mut failures: BTreeMap<String, (u32, String)> = BTreeMap::new();
    for round in 1..=rounds {
        eprintln!("-- round {round} of {rounds}");
        let mut results = Vec::new();
        for machine in options.machines() {
            match machine {
                Machine::Host => {
                    for phase in &PHASES {
                        results.push(built.nextest.run(&phase.selection(options))?);
                    }
                }
                Machine::Guest(series) => {
                    let (label, expression) = (format!("Linux {series}"), options.expression(series));
                    results.push(built.run_in_guest(series, &label, &expression, &options.names)?);
                }
            }
        }
        for test in results.iter().flat_map(Results::failed) {
            let Verdict::Failed(output) = &test.verdict else { continue };
            failures.entry(test.to_string()).or_insert((0, output.clone())).0 += 1;
        }
        findings.results.0.extend(results.into_iter().flat_map(|results| results.0));
    }
    println!("\nfailures in {rounds} rounds");
    for (test, (count, output)) in &failures {
        println!(
            "{count} of {rounds} ({:.0} %): {test}\n    {}",
            percent(*count, rounds),
            output.replace('\n', "\n    ")
        );
    }
    if failures.is_empty() {
        println!("none");
    }
    Ok(())
}

fn percent(part: u32, whole: u32) -> f64 {
    100.0 * f64::from(part) / f64::from(whole)
}
