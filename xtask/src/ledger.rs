//! The instruction ledger: how many instructions observer's programs add to the operations that they are attached to. The
//! counts come from a guest whose clock advances by a nanosecond for each instruction, so they are the same on every
//! machine. `bench/ledger.json` has those of the last change; the tests fail if one has grown.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::kernel::Series;
use crate::report::Findings;
use crate::vm::Clock;
use crate::workspace::{build, root};
use crate::{guest, observer, packages, toolchain, vm};

const LEDGER: &str = "bench/ledger.json";
/// The kernel that it is measured on.
const SERIES: Series = Series::V6_1;
/// Growth that fails the tests, as a share: repeated counts differ by less than a thousandth.
const LIMIT: f64 = 0.03;

/// Instructions by state of observer and operation.
type Counts = BTreeMap<String, BTreeMap<String, f64>>;

/// `xtask ledger`: counts, and prints or writes the ledger.
pub(crate) fn run(is_update: bool) -> Result<()> {
    let observer = observer::build()?;
    packages::install(&packages::for_guests())?;
    let program = build("build", &["--package", "bench", "--example", "ledger"])?;
    let program = program.into_iter().find(|it| it.name == "ledger").context("cargo built no ledger")?;
    let (key, counts) = (key()?, count(&observer, &program.path)?);
    print(&counts);
    if is_update {
        let text = serde_json::to_string_pretty(&serde_json::json!({ key: counts }))?;
        fs::write(root().join(LEDGER), text + "\n")?;
        println!("{LEDGER} written");
    }
    Ok(())
}

/// Counts, and compares with the ledger.
pub(crate) fn check(observer: &Path, program: &Path, findings: &mut Findings) -> Result<()> {
    let counts = count(observer, program)?;
    print(&counts);
    let ledger: BTreeMap<String, Counts> =
        serde_json::from_str(&fs::read_to_string(root().join(LEDGER))?).context(LEDGER)?;
    let key = key()?;
    let Some(before) = ledger.get(&key) else {
        findings.skipped.push(format!("ledger: {LEDGER} has no counts of {key}"));
        return Ok(());
    };
    let grown = grown(before, &counts);
    if !grown.is_empty() {
        bail!(
            "more instructions than in {LEDGER}: {}\nby hand: `cargo xtask ledger --update`, if the change is worth it",
            grown.join("; ")
        );
    }
    Ok(())
}

/// The operations whose count has grown.
fn grown(before: &Counts, now: &Counts) -> Vec<String> {
    let mut grown = Vec::new();
    for (state, operations) in before {
        for (operation, before) in operations {
            let now = now.get(state).and_then(|now| now.get(operation)).copied().unwrap_or(f64::INFINITY);
            if now > before * (1.0 + LIMIT) {
                grown.push(format!("{operation} ({state}): {now:.0}, {before:.0} before"));
            }
        }
    }
    grown
}

/// Kernel and compiler of the counts.
fn key() -> Result<String> {
    let compiler = toolchain::ebpf_compiler().context("the compiler for eBPF programs has no version")?;
    Ok(format!("{}, {compiler}", SERIES.kernel()?.package))
}

fn count(observer: &Path, program: &Path) -> Result<Counts> {
    let kernel = SERIES.kernel()?;
    let mut image = guest::base(observer, &kernel)?;
    image.add_program(program);
    let output = PathBuf::from("ledger.json");
    let command = [program.to_str(), observer.to_str(), output.to_str()].map(Option::unwrap_or_default);
    guest::set_command(&mut image, &shlex::try_join(command)?, Some(&output))?;
    let outcome = vm::run(&kernel, &image.write()?, Clock::Instructions, "ledger | ")?;
    if outcome.status != Some(0) {
        bail!("the ledger's guest failed, see above");
    }
    let value: Value = serde_json::from_str(&outcome.file).context("what the guest has counted")?;
    Ok(serde_json::from_value(value)?)
}

/// A table with a row for each operation.
fn print(counts: &Counts) {
    let none = BTreeMap::new();
    let [without, other, target] =
        ["without observer", "other process", "target"].map(|state| counts.get(state).unwrap_or(&none));
    println!("{:42} {:>9} {:>14} {:>9}", "instructions", "alone", "other process", "target");
    for (operation, alone) in without {
        let extra = |state: &BTreeMap<String, f64>| {
            state.get(operation).map_or_else(String::new, |count| format!("+{:.0}", count - alone))
        };
        println!("{operation:42} {alone:>9.0} {:>14} {:>9}", extra(other), extra(target));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(look: f64, switch: f64) -> Counts {
        let operations = BTreeMap::from([("look".to_owned(), look), ("switch".to_owned(), switch)]);
        BTreeMap::from([("target".to_owned(), operations)])
    }

    #[test]
    fn growth_of_more_than_three_percent_is_reported() {
        assert_eq!(grown(&counts(1000.0, 500.0), &counts(1029.0, 100.0)), Vec::<String>::new());
        assert_eq!(
            grown(&counts(1000.0, 500.0), &counts(1031.0, 500.0)),
            ["look (target): 1031, 1000 before"]
        );
    }

    #[test]
    fn an_operation_that_was_not_counted_is_reported() {
        assert_eq!(grown(&counts(1.0, 1.0), &Counts::new()).len(), 2);
    }
}
