//! `docs/benchmarks.md`: the machine, the goals and where the figures are. It is made of what each part has left of its
//! last run: a page, and beside it a small file with the figures that there are goals for.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum as _;
use serde_json::{Value, json};

use super::goals;
use super::machine::{Machine, rows, versions};
use super::page::Page;
use super::part::Part;
use super::repeat::Run;
use super::statistics::Spread;

const INDEX: &str = "docs/benchmarks.md";
const PARTS: &str = "docs/benchmarks";

const HEAD: &str = "# What observer costs

Written by `cargo xtask bench`, which measures every part anew, or with their names only some of them; changes by hand are
lost. Each part is one run on one machine: figures of different runs or machines cannot be compared, those of one table
can. Here is the machine of the latest run; each part tells its own.
";

const GOALS: &str = "## Goals

Medians, with the quartiles in brackets where there are rounds.
";

const LIST: &str = "## Parts
";

const BY_HAND: &str = "Two were written by hand: [the same programs on two days](benchmarks/two-days.md), and
[observer beside hud](benchmarks/beside-hud.md) on a tokio runtime that is blocked.
";

/// Keeps what a part has measured; answers where.
pub(super) fn keep(root: &Path, part: Part, machine: &Machine, page: &Page) -> Result<String> {
    let figures: BTreeMap<_, _> = page.figures.iter().map(|(key, figure)| (key, figure.record())).collect();
    let Machine { date, observer, .. } = machine;
    let run = Run { date: date.clone(), observer: observer.clone(), ratios: page.ratios.clone() };
    let before = record(root, part).and_then(|record| Run::before(&record, date));
    let mut record = run.record();
    record["figures"] = json!(figures);
    record["before"] = before.as_ref().map_or(Value::Null, Run::record);
    fs::create_dir_all(root.join(PARTS)).with_context(|| format!("cannot make {PARTS}"))?;
    save(root, &file(part, "json"), &format!("{record:#}\n"))?;
    let name = file(part, "md");
    let mut whole = Page::default();
    // The title comes before the machine, what follows after it.
    let text = page.finished();
    let (title, rest) = text.split_once('\n').context("a page has a title")?;
    whole.text(&format!(
        "{title}\n\nWritten by `cargo xtask bench {}`; changes by hand are lost.\n",
        part.name()
    ));
    whole.table(&["", ""], rows(machine, &versions()));
    whole.text(rest.trim_start());
    if let Some(before) = before {
        before.table(&run, &mut whole);
    }
    save(root, &name, &whole.finished())?;
    Ok(name)
}

/// Writes the index of what is kept; answers where.
pub(super) fn write(root: &Path, machine: &Machine) -> Result<&'static str> {
    let mut page = Page::default();
    page.text(HEAD);
    page.table(&["", ""], rows(machine, &[]));
    let records: Vec<(Part, Value)> =
        Part::value_variants().iter().filter_map(|&part| Some((part, record(root, part)?))).collect();
    page.text(GOALS);
    let figure = |key| records.iter().find_map(|(_, record)| Spread::kept(&record["figures"][key]));
    page.table(&goals::HEAD, goals::ALL.iter().map(|goal| goal.row(figure(goal.key))));
    page.text(LIST);
    let list = records.iter().map(|(part, record)| {
        let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
        let name = part.name();
        vec![
            format!("[{name}](benchmarks/{name}.md)"),
            part.about().to_owned(),
            text("date"),
            text("observer"),
            repeated(record),
        ]
    });
    page.table(&["part", "what", "date", "observer", "ratios that were the same on another day"], list);
    page.text(BY_HAND);
    save(root, INDEX, &page.finished())?;
    Ok(INDEX)
}

/// The goals as far as these pages have figures for them.
pub(super) fn goals_of(pages: &[Page]) -> Page {
    let mut goals = Page::default();
    goals.text(GOALS);
    let figure = |key| pages.iter().find_map(|page| page.figures.get(key).copied());
    goals.table(&goals::HEAD, goals::ALL.iter().map(|goal| goal.row(figure(goal.key))));
    goals
}

/// How far a part's run and the one before it agree.
fn repeated(record: &Value) -> String {
    let runs = Run::from(&record["before"]).zip(Run::from(record));
    runs.map_or_else(String::new, |(then, now)| {
        let (same, of) = then.agreement(&now);
        format!("{same} of {of}, {}", then.date)
    })
}

/// What a part has left of its last run.
fn record(root: &Path, part: Part) -> Option<Value> {
    let text = fs::read_to_string(root.join(file(part, "json"))).ok()?;
    serde_json::from_str(&text).ok()
}

fn file(part: Part, kind: &str) -> String {
    format!("{PARTS}/{}.{kind}", part.name())
}

fn save(root: &Path, name: &str, text: &str) -> Result<()> {
    fs::write(root.join(name), text).with_context(|| format!("cannot write {name}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{Machine, Page, Part, Spread, goals, keep, write};

    #[test]
    fn the_index_has_the_goals_of_parts_that_were_kept() {
        let root = tempfile::tempdir().unwrap();
        let read = |name| fs::read_to_string(root.path().join(name)).unwrap();
        let machine = Machine { date: "today".into(), observer: "observer 1".into(), others: Vec::new() };
        let mut page = Page::default();
        page.text("# Start\n\nHow it was measured.");
        page.figure(&goals::FIRST_FIGURE, Spread { low: 100.0, median: 150.0, high: 160.0 });
        keep(root.path(), Part::Start, &machine, &page).unwrap();
        write(root.path(), &machine).unwrap();

        let part = read("docs/benchmarks/start.md");
        assert!(part.starts_with("# Start\n") && part.contains("today") && part.ends_with("measured.\n"));
        let index = read("docs/benchmarks.md");
        assert!(index.contains("| 300 ms | 150 ms (100 to 160) | yes: 50 % of the limit |"), "{index}");
        assert!(index.contains("| [start](benchmarks/start.md) |"), "{index}");
        assert!(!index.contains("growth.md"), "{index}");
    }
}
