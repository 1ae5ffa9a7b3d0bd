//! `xtask test`, which is also what CI runs: style, lints, then the tests here and on each kernel.
//! A stage that fails does not stop those that can do without it; the closing table tells.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use clap::builder::PossibleValue;
use duct::Expression;

use crate::kernel::Series;
use crate::nextest::{
    ALONE, BESIDE_OTHERS, CONTRACT, FULL_ONLY, Nextest, OF_THE_KERNEL, QUIET, Selection, Threads, USERSPACE,
};
use crate::python::{COLLECTOR, TRACER};
use crate::report::{Findings, Report, Work};
use crate::results::{Results, Verdict};
use crate::workspace::{Executable, build, cargo, plain_cargo};
use crate::{dependencies, documents, guest, manifests, nextest, packages, toolchain, vm};

/// Packages whose programs the tests in guests run.
const GUEST_PACKAGES: &[&str] = &["observer", "observer-common"];

/// How variables begin that tests read, and that guests get as well.
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

/// What is asked for.
pub(crate) struct Options {
    /// Everything on every kernel, the newest as well.
    pub(crate) full: bool,
    /// How often to repeat the tests, to see how often each fails.
    pub(crate) soak: Option<u32>,
    /// Where; by default here and on the kernels of the contract.
    pub(crate) machines: Vec<Machine>,
    /// Parts of names of tests; all if there are none.
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

    /// Which tests run on a kernel: the contract, or all that depend on it where all or certain ones are asked for.
    fn expression(&self, series: Series) -> String {
        if !self.full && self.names.is_empty() {
            format!("{OF_THE_KERNEL} & {CONTRACT}")
        } else if series == Series::V5_10 || !self.names.is_empty() {
            OF_THE_KERNEL.to_owned()
        } else {
            format!("{OF_THE_KERNEL} - {USERSPACE}")
        }
    }

    /// Whether this is a part of a run that somebody wants to see quickly.
    fn is_partial(&self) -> bool {
        self.soak.is_some() || !self.names.is_empty()
    }
}

/// Runs what is asked for.
pub(crate) fn run(options: &Options) -> ExitCode {
    let mut report = Report::default();
    stages(&mut report, options);
    report.finish()
}

/// Leaves early where going on makes no sense.
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
    // Guests keep the processors busy, which only some tests do not mind.
    let beside = has_host.then(|| {
        let built = &built;
        Work::new("host".to_owned(), move |findings| built.on_host(&PHASES[0], options, findings))
    });
    let guests = guests.iter().map(|&series| {
        let built = &built;
        Work::new(format!("Linux {series}"), move |findings| built.on_guest(series, options, findings))
    });
    report.at_once(beside.into_iter().chain(guests));
    if has_host {
        for phase in &PHASES[1..] {
            report.stage(phase.name, |findings| built.on_host(phase, options, findings));
        }
    }
    None
}

/// Tests here that go together.
struct Phase {
    name: &'static str,
    expression: &'static str,
    threads: Threads,
}

impl Phase {
    /// Without what takes long, unless everything or certain tests are asked for.
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

/// One after the other.
const PHASES: [Phase; 3] = [
    Phase { name: "host", expression: BESIDE_OTHERS, threads: Threads::AsConfigured },
    Phase { name: "host, quiet", expression: QUIET, threads: Threads::AsConfigured },
    Phase { name: "host, alone", expression: ALONE, threads: Threads::One },
];

/// All that is looked at without running a test.
fn checks(report: &mut Report) {
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
}

fn check(what: &str, command: &Expression) -> Result<()> {
    if !command.unchecked().run()?.status.success() {
        bail!("{what} found fault, see above");
    }
    Ok(())
}

/// All that tests run, built once for this machine and all guests.
struct Built {
    observer: PathBuf,
    executables: Vec<Executable>,
    nextest: Nextest,
}

impl Built {
    fn new() -> Result<Self> {
        let executables = build("test", &["--workspace", "--exclude", "observer-ebpf", "--no-run"])?;
        let is_observer = |executable: &&Executable| executable.name == "observer" && !executable.is_test;
        let observer = executables.iter().find(is_observer).context("package observer has no binary")?;
        Ok(Self { observer: observer.path.clone(), nextest: Nextest::of_repository()?, executables })
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
        let mut results = self.in_guest(series, &label, &options.expression(series), &options.names)?;
        // Afresh, so that nothing of the first run is in the way.
        if let Some(failed) = results.to_rerun(1, 1) {
            eprintln!("{series} | what failed runs again in another guest");
            results.merge_rerun(&self.in_guest(series, &format!("{label}, again 1"), &failed, &[])?);
        }
        if results.0.is_empty() && options.names.is_empty() {
            bail!("no test ran");
        }
        findings.results = results;
        Ok(())
    }

    /// Boots a guest for these tests.
    fn in_guest(&self, series: Series, label: &str, expression: &str, names: &[String]) -> Result<Results> {
        let kernel = series.kernel()?;
        let mut image = guest::image(&self.observer, &kernel)?;
        let of_guests = |executable: &&Executable| GUEST_PACKAGES.contains(&executable.package());
        for executable in self.executables.iter().filter(of_guests) {
            image.add_program(&executable.path);
        }
        image.add_program(&self.nextest.program);
        for about in [&self.nextest.cargo_metadata, &self.nextest.binaries_metadata] {
            image.add(about);
        }
        let words = self.nextest.words("guest", expression, names);
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        let run = shlex::try_join(words.iter().map(AsRef::as_ref))?;
        let variables = std::env::vars().filter(|(name, _)| name.starts_with(VARIABLES));
        let run = variables
            .map(|(name, value)| shlex::try_quote(&value).map(|value| format!("{name}={value} ")))
            .chain([Ok(run)])
            .collect::<Result<String, _>>()?;
        guest::set_command(&mut image, &run, Some(Path::new("target/nextest/guest/junit.xml")))?;
        let outcome = vm::run(&kernel, &image.write()?, &format!("{series} | "))?;
        let Some(status) = outcome.status else {
            bail!("the guest with Linux {series} did not come to its end, see above")
        };
        self.nextest.read(label, Some(status.into()), &outcome.output, &outcome.file)
    }
}

/// Repeats the tests and prints how often each failed; nothing is rerun.
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
                    results.push(built.in_guest(series, &label, &expression, &options.names)?);
                }
            }
        }
        for test in results.iter().flat_map(Results::failed) {
            let Verdict::Failed(said) = &test.verdict else { continue };
            failures.entry(test.to_string()).or_insert((0, said.clone())).0 += 1;
        }
        findings.results.0.extend(results.into_iter().flat_map(|results| results.0));
    }
    println!("\nfailures in {rounds} rounds");
    for (test, (count, said)) in &failures {
        println!(
            "{count} of {rounds} ({:.0} %): {test}\n    {}",
            percent(*count, rounds),
            said.replace('\n', "\n    ")
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
