//! Fuzzes the parsers of untrusted input with libFuzzer. Besides a C++ compiler, for libFuzzer, it needs only a stable
//! Rust: stable compilers support the coverage instrumentation.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use duct::cmd;

use crate::packages;
use crate::shell::{find, show};
use crate::toolchain;
use crate::workspace::{host, plain_cargo, root, target_path};

/// Compiler flags that record code coverage and the operands of comparisons.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing";

/// Per-input limits beyond which an input is a finding: time in seconds and memory in MiB.
const LIMITS: [&str; 2] = ["-timeout=5", "-rss_limit_mb=512"];

/// Maximum size of an input, in bytes: enough for a small ELF file with its tables.
const MAX_INPUT: &str = "-max_len=65536";

/// Result of fuzzing one target.
struct Run {
    target: String,
    executions: String,
    coverage: String,
    found: bool,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, executions, coverage, found } = self;
        let outcome = if *found { "FOUND something" } else { "found nothing" };
        write!(f, "{target}: {outcome} in {executions} executions, {coverage} edges covered")
    }
}

/// Fuzzes the given targets, or all if none is given, for `seconds` each.
pub(crate) fn run(targets: &[String], seconds: u32) -> Result<ExitCode> {
    let all = target_names()?;
    if let Some(unknown) = targets.iter().find(|target| !all.contains(target)) {
        bail!("unknown fuzz target {unknown}\nby hand: choose one of {}", all.join(", "));
    }
    let fuzzer = build()?;
    let chosen = if targets.is_empty() { &all } else { targets };
    let runs = chosen.iter().map(|target| fuzz(&fuzzer, target, seconds));
    let runs = runs.collect::<Result<Vec<_>>>()?;
    runs.iter().for_each(|run| println!("{run}"));
    Ok(if runs.iter().any(|run| run.found) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Names of all targets. Each target has a corpus, which a test checks.
fn target_names() -> Result<Vec<String>> {
    let folders = fs::read_dir(root().join("fuzz/corpus")).context("cannot read fuzz/corpus")?;
    let names = folders.map(|folder| Ok(folder?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn build() -> Result<PathBuf> {
    toolchain::setup()?;
    if find("c++").is_none() {
        packages::install(&["g++".to_owned()])?;
    }
    let host = host()?;
    let target = target_path("fuzz");
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default() + " " + FLAGS;
    let args = ["build", "--release", "--locked", "--manifest-path", "fuzz/Cargo.toml", "--target", &host];
    let folder = ["--target-dir".as_ref(), target.as_os_str()];
    let all = args.into_iter().map(AsRef::as_ref).chain(folder);
    plain_cargo(all).env("RUSTFLAGS", flags.trim_start()).run().context("building the fuzzer failed")?;
    Ok(target.join(host).join("release/observer-fuzz"))
}

fn fuzz(fuzzer: &PathBuf, target: &str, seconds: u32) -> Result<Run> {
    let seeds = root().join("fuzz/corpus").join(target);
    let [corpus, findings] =
        ["corpus", "findings"].map(|folder| target_path("fuzz").join(folder).join(target).join(""));
    for folder in [&corpus, &findings] {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let run_args = [
        format!("-max_total_time={seconds}"),
        format!("-artifact_prefix={}", findings.display()),
        "-print_final_stats=1".into(),
        MAX_INPUT.into(),
    ];
    let limits = LIMITS.map(str::to_owned);
    let folders = [&corpus, &seeds].map(|folder| folder.display().to_string());
    let args = run_args.iter().chain(&limits).chain(&folders);
    let shown = show(&cmd(fuzzer, args).env("FUZZ_TARGET", target), &format!("{target}: "))?;
    let word_after = |mark: &str| {
        let (_, rest) = shown.output.rsplit_once(mark)?;
        rest.split_whitespace().next().map(str::to_owned)
    };
    let run = Run {
        target: target.to_owned(),
        executions: word_after("stat::number_of_executed_units:").unwrap_or_else(|| "unknown".into()),
        coverage: word_after(" cov: ").unwrap_or_else(|| "unknown".into()),
        found: shown.code != Some(0),
    };
    if run.found {
        eprintln!(
            "by hand: fix the bug, and add the input from {} to fuzz/corpus/{target}",
            findings.display()
        );
    }
    Ok(run)
}
