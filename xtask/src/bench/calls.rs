//! What a system call costs more that nobody hooks: once a tracepoint of any call is attached, all calls of all processes
//! take the kernel's longer way, which looks whether theirs is meant.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use rustix::process::getppid;

use super::page::{Page, spread};
use super::part::progress;
use super::servers::Server;
use super::statistics::Spread;
use super::tools::{SLICES, Tool, settle};

const TEXT: &str = "## Any other system call

A call that no program is attached to (`getppid`), by a process that nobody observes, beside each tool on an nginx that has
nothing to do; rounds take turns. What it takes more is the price of having tracepoints of system calls at all, and every
process of the machine pays it: as soon as one is attached, the kernel sends all calls a longer way.
";

const CALLS: u32 = 2_000_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    Observer,
    Bpftrace,
}

const ALL: [(Beside, &str); 3] =
    [(Beside::Nothing, "nothing"), (Beside::Observer, "observer"), (Beside::Bpftrace, "bpftrace")];

pub(super) fn run(page: &mut Page, observer: &Path, rounds: usize) -> Result<()> {
    let idle = Server::nginx(None, false)?;
    let mut figures = ALL.map(|_| Vec::new());
    for round in 1..=rounds {
        progress(&format!("any other system call, round {round} of {rounds}"));
        for ((beside, _), figures) in ALL.iter().zip(&mut figures) {
            let _tool = match beside {
                Beside::Nothing => None,
                Beside::Observer => Some(Tool::observer(observer, &[idle.pid()])?),
                Beside::Bpftrace => Some(Tool::bpftrace(SLICES, idle.event_loop())?),
            };
            settle();
            figures.push(nanoseconds_a_call());
        }
    }
    page.text(TEXT);
    page.text(&format!(
        "Rounds: {rounds} of {CALLS} calls for each; medians, with the quartiles in brackets.\n"
    ));
    let mut rows = Vec::new();
    for ((beside, title), these) in ALL.iter().zip(&figures) {
        let pairs = || these.iter().zip(&figures[0]);
        let mut row = vec![(*title).to_owned(), spread(these.iter().copied(), 0, "ns"), String::new()];
        if *beside != Beside::Nothing {
            row[2] = spread(pairs().map(|(with, without)| with - without), 0, "ns");
            let ratio = Spread::of(pairs().map(|(with, without)| with / without));
            page.ratio(format!("any other system call, beside {title} to nothing"), ratio);
        }
        rows.push(row);
    }
    page.table(&["beside", "a call", "more"], rows);
    Ok(())
}

fn nanoseconds_a_call() -> f64 {
    let start = Instant::now();
    for _ in 0..CALLS {
        let _same = getppid();
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS)
}
