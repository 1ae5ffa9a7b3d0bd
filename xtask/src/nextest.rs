//! cargo-nextest, which runs all tests: its installation, its arguments and its results.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use duct::{Expression, cmd};

use crate::pins;
use crate::python::Packages;
use crate::results::Results;
use crate::shell::{find, show};
use crate::workspace::{FLAGS, cargo_in, flags, host, root, target_path, without_cargo_variables};

const WHEEL: Packages = Packages { folder: "nextest", modules: "", requirements: pins::NEXTEST };

/// Path of the JUnit file, relative to the workspace, as `.config/nextest.toml` configures it.
const JUNIT: &str = "target/nextest/default/junit.xml";

/// Environment variable that makes tests run their full load and all rounds.
const FULL: &str = "OBSERVER_TEST_FULL";

/// Maximum number of reruns of a failed test.
const RERUNS: u32 = 2;

/// Exit status of nextest when tests failed. Any other status except 0 means that it could not run them.
const TESTS_FAILED: i32 = 100;

/// Filter expressions of nextest. The words in brackets are defined in `observer/tests/harness.rs`.
pub(crate) const PARALLEL: &str = r"not test(/^\[[^\]]*\b(quiet|alone)\b/)";
pub(crate) const QUIET: &str = r"test(/^\[[^\]]*\bquiet\b/)";
pub(crate) const ALONE: &str = r"test(/^\[[^\]]*\balone\b/)";
pub(crate) const FULL_ONLY: &str = r"test(/^\[[^\]]*\bfull\b/)";
pub(crate) const CONTRACT: &str = r"test(/^\[[^\]]*\bcontract\b/)";
pub(crate) const USERSPACE: &str = r"test(/^\[[^\]]*\buserspace\b/)";
/// Packages whose tests depend on the kernel.
pub(crate) const KERNEL_PACKAGES: &str = "(package(observer) | package(observer-common))";

/// How many tests run concurrently.
#[derive(Clone, Copy)]
pub(crate) enum Threads {
    AsConfigured,
    One,
}

/// Which tests to run, and how.
pub(crate) struct Selection {
    /// Name of the JUnit file.
    pub(crate) label: String,
    /// Filter expression of nextest.
    pub(crate) expression: String,
    /// Substrings of the names of tests; all tests if empty.
    pub(crate) names: Vec<String>,
    pub(crate) threads: Threads,
    /// Whether tests run their full load and all rounds.
    pub(crate) is_full: bool,
}

/// The built test executables, and the nextest that runs them.
pub(crate) struct Nextest {
    pub(crate) program: PathBuf,
    /// Metadata of cargo and nextest about the build, so that it is not computed again for each run.
    pub(crate) cargo_metadata: PathBuf,
    pub(crate) binaries_metadata: PathBuf,
    workspace: PathBuf,
}

/// Finds nextest, or installs it once. Returns the path of the program.
pub(crate) fn install() -> Result<PathBuf> {
    if let Some(found) = find("cargo-nextest") {
        return Ok(found);
    }
    let folder =
        WHEEL.install().context("nextest is missing\nby hand: cargo install --locked cargo-nextest")?;
    Ok(folder.join("bin/cargo-nextest"))
}

/// Whether nextest ran all selected tests. The summary of an interrupted run counts `3/10 tests run`.
fn is_complete(output: &str) -> bool {
    let summary = output.lines().find_map(|line| line.trim_start().strip_prefix("Summary ["));
    let count = summary.and_then(|summary| summary.split_once("] ")?.1.trim_start().split(' ').next());
    count.is_some_and(|count| count.bytes().all(|byte| byte.is_ascii_digit()))
}

impl Nextest {
    /// Builds the tests of this repository.
    pub(crate) fn build_repository() -> Result<Self> {
        let build = ["--release", "--target", &host()?, "--workspace", "--exclude", "observer-ebpf"];
        Self::build(root(), target_path("nextest"), &build, |command| Ok(command.env(FLAGS, flags()?)))
    }

    /// Builds the tests of a workspace with the arguments `build`, and writes nextest's metadata to files in `folder`.
    fn build(
        workspace: &Path,
        folder: PathBuf,
        build: &[&str],
        with_flags: impl FnOnce(Expression) -> Result<Expression>,
    ) -> Result<Self> {
        let program = install()?;
        fs::create_dir_all(&folder)?;
        let binaries_metadata = folder.join("binaries-metadata.json");
        let args = ["nextest", "list", "--list-type", "binaries-only", "--message-format", "json"];
        let list = without_cargo_variables(cmd(&program, args.iter().chain(build)).dir(workspace));
        with_flags(list)?
            .stdin_null()
            .stdout_path(&binaries_metadata)
            .run()
            .context("the tests do not build")?;
        let cargo_metadata = folder.join("cargo-metadata.json");
        let metadata = cargo_in(workspace, ["metadata", "--format-version", "1"]);
        metadata.stdout_path(&cargo_metadata).run().context("cargo metadata failed")?;
        Ok(Self { program, cargo_metadata, binaries_metadata, workspace: workspace.to_owned() })
    }

    /// Command line that runs the tests that match the expression and, if there are any, the names.
    pub(crate) fn command_line(&self, profile: &str, expression: &str, names: &[String]) -> Vec<OsString> {
        let mut command_line: Vec<OsString> = vec![(&self.program).into(), "nextest".into(), "run".into()];
        command_line.extend(["--binaries-metadata".into(), (&self.binaries_metadata).into()]);
        command_line.extend(["--cargo-metadata".into(), (&self.cargo_metadata).into()]);
        // A filter may leave no test on a kernel. The callers check that a full run has tests.
        command_line.extend(["--no-tests", "pass", "--profile", profile, "-E", expression].map(Into::into));
        command_line.extend(["--color", "never", "--show-progress", "none"].map(Into::into));
        // Overrides the environment.
        command_line.extend(["--no-fail-fast", "--retries", "0"].map(Into::into));
        if !names.is_empty() {
            // A run of selected tests prints their output, which contains measured values.
            command_line.extend(["--success-output", "immediate"].map(Into::into));
            command_line.extend(names.iter().map(Into::into));
        }
        command_line
    }

    /// Runs tests on this machine. A copy of nextest's JUnit file is stored under the label.
    pub(crate) fn run(&self, tests: &Selection) -> Result<Results> {
        let junit = self.workspace.join(JUNIT);
        match fs::remove_file(&junit) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let mut command_line = self.command_line("default", &tests.expression, &tests.names).into_iter();
        let program = command_line.next().context("the command line is empty")?;
        let threads = match tests.threads {
            Threads::AsConfigured => vec![],
            Threads::One => vec!["--test-threads=1".into()],
        };
        let mut command = cmd(program, command_line.chain(threads)).dir(&self.workspace);
        if tests.is_full {
            command = command.env(FULL, "1");
        }
        let shown = show(&command, "")?;
        // nextest writes no JUnit file if it ran no test.
        let junit = fs::read_to_string(junit).unwrap_or_default();
        self.read(&tests.label, shown.code, &shown.output, &junit)
    }

    /// Evaluates a run from its exit status, its output and its JUnit file, of which a copy is stored under the label.
    /// An interrupted run is an error, because the tests that did not run are missing from the file.
    pub(crate) fn read(&self, label: &str, code: Option<i32>, output: &str, junit: &str) -> Result<Results> {
        let Some(0 | TESTS_FAILED) = code else { bail!("nextest could not run the tests (status {code:?})") };
        if !is_complete(output) {
            bail!("nextest was interrupted before all tests had run");
        }
        let results = if junit.is_empty() { Results::default() } else { self.store_junit(junit, label)? };
        let has_failures = results.failed().next().is_some();
        if has_failures != (code == Some(TESTS_FAILED)) {
            bail!("nextest exited with status {code:?}, which contradicts its JUnit file");
        }
        Ok(results)
    }

    /// Runs tests on this machine, then reruns failed tests one at a time, as often as each may be rerun.
    pub(crate) fn run_with_reruns(&self, tests: &Selection) -> Result<Results> {
        let mut results = self.run(tests)?;
        for time in 1..=RERUNS {
            let Some(expression) = results.to_rerun(time, RERUNS) else { break };
            eprintln!("rerunning failed tests one at a time");
            let label = format!("{}, again {time}", tests.label);
            let again =
                Selection { label, expression, names: vec![], threads: Threads::One, is_full: tests.is_full };
            results.merge_rerun(&self.run(&again)?);
        }
        Ok(results)
    }

    /// Copies a JUnit file to `target/junit` and parses it.
    fn store_junit(&self, junit: &str, label: &str) -> Result<Results> {
        let folder = self.workspace.join("target/junit");
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(label.replace(", ", "-").replace(' ', "-") + ".xml"), junit)?;
        Results::from_junit(junit)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{Nextest, PARALLEL, Selection, Threads, is_complete};
    use crate::results::{Counts, Verdict};

    /// A test for each kind of result, in a package of its own.
    const TESTS: &str = r#"
        #[test] fn passes() {}
        #[test] fn broken() { panic!("broken on purpose") }
        #[test] fn cannot_run() { eprintln!("skipped: there is no such thing here") }
        #[test] fn fails_once() {
            assert!(std::fs::exists("marker").unwrap() || std::fs::write("marker", "").is_err(), "the first time");
        }
        #[test] fn hangs() { std::thread::sleep(std::time::Duration::from_secs(600)) }
    "#;

    const CONFIG: &str = "
[profile.default]
fail-fast = false
slow-timeout = { period = '1s', terminate-after = 1, grace-period = '1s' }
[profile.default.junit]
path = 'junit.xml'
store-success-output = true
";

    #[test]
    fn interrupted_run_is_not_complete() {
        assert!(is_complete(
            "Starting\n     Summary [ 343.270s] 430 tests run: 430 passed (4 slow), 75 skipped\n"
        ));
        assert!(is_complete("     Summary [   0.002s] 0 tests run: 0 passed, 505 skipped\n"));
        assert!(!is_complete("     Summary [   3.270s] 12/430 tests run: 12 passed, 75 skipped\n"));
        assert!(!is_complete("Starting 430 tests\n"));
    }

    #[test]
    fn failing_test_fails_and_test_that_passes_on_rerun_is_flaky() {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("Cargo.toml", "[package]\nname = 'sample'\nedition = '2024'\n[workspace]\n");
        write("src/lib.rs", "");
        write("tests/real.rs", TESTS);
        write(".config/nextest.toml", CONFIG);
        let nextest = Nextest::build(folder.path(), folder.path().join("about"), &[], Ok).unwrap();
        let threads = Threads::AsConfigured;
        let expression = PARALLEL.to_owned();
        let all =
            Selection { label: "sample".to_owned(), expression, names: vec![], threads, is_full: false };
        let results = nextest.run_with_reruns(&all).unwrap();
        assert_eq!(results.counts(), Counts { passed: 1, failed: 2, skipped: 1, flaky: 1 }, "{results:#?}");
        let verdict = |name: &str| &results.0.iter().find(|test| test.name == name).unwrap().verdict;
        let contains = |text: &str, part: &str| text.contains(part);
        assert!(matches!(verdict("broken"), Verdict::Failed(text) if contains(text, "broken on purpose")));
        assert!(matches!(verdict("hangs"), Verdict::Failed(_)));
        assert!(matches!(verdict("fails_once"), Verdict::Flaky(text) if contains(text, "the first time")));
        assert_eq!(*verdict("cannot_run"), Verdict::Skipped("there is no such thing here".to_owned()));
    }
}
