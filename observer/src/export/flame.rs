//! A flame graph of the lag: a function is as wide as its share of the mean lag, not of the time it takes. One slice of
//! 200 ms hurts as much as a hundred of 20 ms.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use inferno::flamegraph::{self, Options};

use crate::{
    failure::Failure,
    model::snapshot::{Reactor, Snapshot, Target},
    sanitize::clean,
};

/// A file for a graph.
pub(crate) struct Place {
    path: PathBuf,
    file: File,
}

/// Makes the file before anybody has waited for what goes into it, and while observer has the right to. What was there
/// stays until the graph is written.
pub(crate) fn create(path: &Path) -> Result<Place> {
    let file = File::options().write(true).create(true).truncate(false).open(path);
    file.map(|file| Place { path: path.into(), file }).map_err(|error| {
        let what = format!("cannot write the flame graph to {}: {error}", path.display());
        Failure::new(what, "give --flame a file in a folder that exists and can be written to").into()
    })
}

/// Writes the graph in place of what was there.
pub(crate) fn write(snapshot: &Snapshot, place: Place) -> Result<()> {
    let Place { path, mut file } = place;
    let lines = folded(snapshot);
    let mut options = Options::default();
    options.title = "Lag: what a random instant waits for".into();
    options.count_name = "us of mean lag".into();
    options.name_type = "Function:".into();
    // Long slices of few kinds are not a random sample: there is no noise to leave out.
    options.min_width = 0.0;
    let mut graph = Vec::new();
    if lines.is_empty() {
        graph.extend(
            b"<svg xmlns=\"http://www.w3.org/2000/svg\"><text y=\"20\">No event loop was late.</text></svg>\n",
        );
    } else {
        flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), &mut graph)?;
    }
    // A pipe or a device has no length.
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
    let emptied = if is_file { file.set_len(0) } else { Ok(()) };
    // At once: what is written bit by bit may be cut off without anybody being told.
    emptied
        .and_then(|()| file.write_all(&graph))
        .with_context(|| format!("cannot write the flame graph to {}", path.display()))
}

/// One line for each stack, outermost function first, with its share of its loop's mean lag in microseconds.
fn folded(snapshot: &Snapshot) -> Vec<String> {
    let reactors =
        snapshot.targets.iter().flat_map(|target| target.reactors.iter().map(move |r| (target, r)));
    reactors.flat_map(|(target, reactor)| of_reactor(target, reactor)).collect()
}

fn of_reactor(target: &Target, reactor: &Reactor) -> Vec<String> {
    let mean = reactor.lag.mean();
    let base = [format!("{} ({})", target.comm, target.pid), format!("{} ({})", reactor.name, reactor.tid)];
    let mut known = 0.0;
    let mut lines: Vec<_> = reactor
        .stalls
        .sites
        .iter()
        .map(|site| {
            known += site.lag_share;
            let unseen = site.look.frames.is_empty().then(|| "(not seen)".to_owned());
            let frames = site.look.frames.iter().rev().map(ToString::to_string);
            let kernel = site.look.kernel.iter().rev().map(|function| format!("{function}_[k]"));
            let cause = format!("({})", site.cause.name());
            (frames.chain(unseen).chain(kernel).chain([cause]).collect::<Vec<_>>(), site.lag_share * mean)
        })
        .collect();
    lines.push((vec!["(shorter slices and late wake-ups)".into()], (1.0 - known).max(0.0) * mean));
    let lines = lines.into_iter().map(|(frames, seconds)| (frames, (seconds * 1e6).round()));
    lines
        .filter(|(_, weight)| *weight >= 1.0)
        .map(|(frames, weight)| {
            let all =
                base.iter().chain(&frames).map(|part| clean(part).replace(';', ":")).collect::<Vec<_>>();
            format!("{} {weight}", all.join(";"))
        })
        .collect()
}
