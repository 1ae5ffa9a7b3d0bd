//! The harness of the tests in this folder. Each test declares its requirements and how it may be run, and is reported
//! as skipped, with the reason, if it cannot run.
//!
//! Declarations that the test runner needs are words in brackets before the name of the test, as `[alone contract]`.
//! `.config/nextest.toml` and `cargo xtask test` select tests by these words.

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    process::ExitCode,
    thread,
};

use libtest_mimic::{Arguments, Completion, Trial};

use crate::support::{
    disturbance::{CpuUse, DISTURBED, wait_until_calm},
    is_emulated,
};

inventory::collect!(Test);

/// How often a test that needs the machine alone starts, if other processes disturb it.
const ROUNDS: u32 = 3;

/// A test against real servers.
pub(crate) struct Test {
    module: &'static str,
    name: &'static str,
    run: fn(),
    alone: bool,
    quiet: bool,
    contract: bool,
    full: bool,
    userspace: bool,
    links: bool,
    machine: Option<(Machine, &'static str)>,
    programs: &'static [&'static str],
}

/// Type of machine that a test is restricted to.
#[derive(Clone, Copy, PartialEq)]
enum Machine {
    Host,
    Guest,
}

impl Test {
    pub(crate) const fn new(module: &'static str, name: &'static str, run: fn()) -> Self {
        Self {
            module,
            name,
            run,
            alone: false,
            quiet: false,
            contract: false,
            full: false,
            userspace: false,
            links: false,
            machine: None,
            programs: &[],
        }
    }

    /// Runs with no other test, because it measures times that other load would change, or inspects the whole machine.
    pub(crate) const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Runs concurrently only with other quiet tests, because it measures times that other load would change, and
    /// causes little load itself.
    pub(crate) const fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Belongs to the kernel contract: checks an exact count or time of a probe, and is short enough for emulated
    /// kernels.
    pub(crate) const fn contract(mut self) -> Self {
        self.contract = true;
        self
    }

    /// Runs only with `--full`, because it takes long.
    pub(crate) const fn full(mut self) -> Self {
        self.full = true;
        self
    }

    /// Does not depend on the kernel, so it runs on one emulated kernel only.
    pub(crate) const fn userspace(mut self) -> Self {
        self.userspace = true;
        self
    }

    /// Asserts that no link is wrong. Such a test is never rerun after a failure.
    pub(crate) const fn links(mut self) -> Self {
        self.links = true;
        self
    }

    /// Cannot run in a guest.
    pub(crate) const fn host_only(mut self, reason: &'static str) -> Self {
        self.machine = Some((Machine::Host, reason));
        self
    }

    /// Changes the whole machine, so it runs only in a guest.
    pub(crate) const fn guest_only(mut self, reason: &'static str) -> Self {
        self.machine = Some((Machine::Guest, reason));
        self
    }

    /// Needs these programs on PATH.
    pub(crate) const fn programs(mut self, programs: &'static [&'static str]) -> Self {
        self.programs = programs;
        self
    }

    /// Reason why the test cannot run here; `None` if it can.
    fn unmet_requirement(&self) -> Option<String> {
        let here = if is_emulated() { Machine::Guest } else { Machine::Host };
        if let Some((machine, reason)) = self.machine
            && machine != here
        {
            return Some(reason.to_owned());
        }
        let missing = self.programs.iter().find(|program| !is_on_path(program))?;
        Some(format!("{missing} is not installed"))
    }

    /// Runs the test. A test that needs the machine alone does not count as failed while other processes use the CPUs: it
    /// waits for them and starts again, up to [`ROUNDS`] times.
    fn run_undisturbed(&self) -> thread::Result<()> {
        let mut round = 1;
        loop {
            let before = CpuUse::now();
            let result = catch_unwind(AssertUnwindSafe(self.run));
            let failed = matches!(&result, Err(payload) if !payload.is::<Skip>());
            let disturbance = before.share_of_others();
            if !failed || !self.alone || self.links || disturbance < DISTURBED || round == ROUNDS {
                return result;
            }
            // xtask lists this line.
            eprintln!("disturbed: other processes used {:.0} % of the CPUs", 100.0 * disturbance);
            wait_until_calm();
            round += 1;
        }
    }

    fn kind(&self) -> String {
        let words = [
            (self.alone, "alone"),
            (self.quiet, "quiet"),
            (self.contract, "contract"),
            (self.full, "full"),
            (self.userspace, "userspace"),
            (self.links, "links"),
        ];
        let words: Vec<_> = words.into_iter().filter_map(|(is_so, word)| is_so.then_some(word)).collect();
        words.join(" ")
    }

    fn trial(&'static self) -> Trial {
        let module = self.module.split_once("::").map_or("", |(_, module)| module);
        Trial::ignorable_test(format!("{module}::{}", self.name), || {
            let skipped = match self.unmet_requirement() {
                Some(reason) => Skip(reason),
                None => match self.run_undisturbed() {
                    Ok(()) => return Ok(Completion::Completed),
                    Err(payload) => *payload.downcast::<Skip>().unwrap_or_else(|panic| resume_unwind(panic)),
                },
            };
            // xtask reads this line, because nextest counts a test that does not fail as passed.
            eprintln!("skipped: {}", skipped.0);
            Ok(Completion::ignored_with(skipped.0))
        })
        .with_kind(self.kind())
    }
}

/// Panic payload of a test that cannot run.
struct Skip(String);

/// Ends a test that detects at run time that it cannot run here.
pub(crate) fn skip(reason: impl Into<String>) -> ! {
    resume_unwind(Box::new(Skip(reason.into())))
}

fn is_on_path(program: &str) -> bool {
    env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|folder| folder.join(program).is_file())
}

/// Runs the tests that the command line selects.
pub(crate) fn run() -> ExitCode {
    let mut tests: Vec<_> = inventory::iter::<Test>.into_iter().map(Test::trial).collect();
    tests.sort_by(|left, right| left.name().cmp(right.name()));
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}
