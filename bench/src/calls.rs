//! The extra cost of a system call that no program is attached to. Once any tracepoint of a system call is attached,
//! the kernel takes its slow path for all system calls of all processes.

use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use rustix::process::getppid;

use crate::page::{Page, spread};
use crate::part::progress;
use crate::servers::Server;
use crate::statistics::Spread;
use crate::tools::{SLICES, Tool, settle};

const TEXT: &str = "## Unhooked system calls

The cost of a system call that no program is attached to (`getppid`), in a process that is not observed, while each
tool observes an idle nginx. Rounds alternate between the tools. As soon as a tracepoint of any system call is
attached, the kernel takes a slower path for all system calls of all processes. *Extra* is the cost of that path.
";

const CALLS: u32 = 2_000_000;

/// The tool that runs meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Arm {
    NoTool,
    Observer,
    Bpftrace,
}

const ALL: [(Arm, &str); 3] =
    [(Arm::NoTool, "no tool"), (Arm::Observer, "observer"), (Arm::Bpftrace, "bpftrace")];

pub(crate) fn run(page: &mut Page, observer: &Path, rounds: usize) -> Result<()> {
    let idle = Server::nginx(None, false)?;
    let mut costs = ALL.map(|_| Vec::new());
    for round in 1..=rounds {
        progress(&format!("unhooked system calls, round {round} of {rounds}"));
        for ((arm, _), costs) in ALL.iter().zip(&mut costs) {
            let _tool = match arm {
                Arm::NoTool => None,
                Arm::Observer => Some(Tool::observer(observer, &[idle.pid()])?),
                Arm::Bpftrace => Some(Tool::bpftrace(SLICES, idle.event_loop())?),
            };
            settle();
            costs.push(nanoseconds_per_call());
        }
    }
    page.text(TEXT);
    page.text(&format!(
        "{rounds} rounds of {CALLS} calls for each tool; medians, with the quartiles in brackets.\n"
    ));
    let mut rows = Vec::new();
    for ((arm, title), these) in ALL.iter().zip(&costs) {
        let pairs = || these.iter().zip(&costs[0]);
        let mut row = vec![(*title).to_owned(), spread(these.iter().copied(), 0, "ns"), String::new()];
        if *arm != Arm::NoTool {
            row[2] = spread(pairs().map(|(with, without)| with - without), 0, "ns");
            let ratio = Spread::of(pairs().map(|(with, without)| with / without));
            page.ratio(format!("unhooked system call with {title}, relative to no tool"), ratio);
        }
        rows.push(row);
    }
    page.table(&["tool", "per call", "extra"], rows);
    Ok(())
}

fn nanoseconds_per_call() -> f64 {
    let start = Instant::now();
    for _ in 0..CALLS {
        let _parent = getppid();
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS)
}
