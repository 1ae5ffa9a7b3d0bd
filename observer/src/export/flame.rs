//! Draws a flame graph in which the width of a function is its share of the mean lag, not of the time: one slice of 200 ms
//! adds as much to the lag as a hundred of 20 ms.

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

/// The open file for a graph.
pub(crate) struct Place {
    path: PathBuf,
    file: File,
}

/// Opens the file, creating it if necessary. This happens before the observation, so that an error is reported at once, and
/// while observer still has the rights to do it. The content of an existing file stays until the graph is written.
pub(crate) fn create(path: &Path) -> Result<Place> {
    let file = File::options().write(true).create(true).truncate(false).open(path);
    file.map(|file| Place { path: path.into(), file }).map_err(|error| {
        let what = format!("cannot write the flame graph to {}: {error}", path.display());
        Failure::new(what, "pass --flame a file in an existing, writable directory").into()
    })
}

/// Replaces the content of the file with the graph.
pub(crate) fn write(snapshot: &Snapshot, place: Place) -> Result<()> {
    let Place { path, mut file } = place;
    let lines = folded(snapshot);
    let mut options = Options::default();
    options.title = "Mean lag by function".into();
    options.count_name = "us of mean lag".into();
    options.name_type = "Function:".into();
    // Narrow functions are shown too: stalls are counted, not sampled, so there is no noise to hide.
    options.min_width = 0.0;
    let mut graph = Vec::new();
    if lines.is_empty() {
        graph.extend(
            b"<svg xmlns=\"http://www.w3.org/2000/svg\"><text y=\"20\">No event loop had any lag.</text></svg>\n",
        );
    } else {
        flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), &mut graph)?;
    }
    // A pipe or a device cannot be truncated.
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file());
    let truncated = if is_file { file.set_len(0) } else { Ok(()) };
    // In one call, so that an error is reported; a buffered writer would lose it when dropped.
    truncated
        .and_then(|()| file.write_all(&graph))
        .with_context(|| format!("cannot write the flame graph to {}", path.display()))
}

/// One line for each stack, outermost function first, with its share of the mean lag of its loop in microseconds.
fn folded(snapshot: &Snapshot) -> Vec<String> {
    let reactors =
        snapshot.targets.iter().flat_map(|target| target.reactors.iter().map(move |r| (target, r)));
    reactors.flat_map(|(target, reactor)| folded_reactor(target, reactor)).collect()
}

fn folded_reactor(target: &Target, reactor: &Reactor) -> Vec<String> {
    let mean = reactor.lag.mean();
    let base = [format!("{} ({})", target.comm, target.pid), format!("{} ({})", reactor.name, reactor.tid)];
    let mut accounted = 0.0;
    let mut lines: Vec<_> = reactor
        .stalls
        .sites
        .iter()
        .map(|site| {
            accounted += site.lag_share;
            let unknown = site.sample.frames.is_empty().then(|| "(stack unknown)".to_owned());
            let frames = site.sample.frames.iter().rev().map(ToString::to_string);
            let kernel = site.sample.kernel.iter().rev().map(|function| format!("{function}_[k]"));
            let cause = format!("({})", site.cause.name());
            (frames.chain(unknown).chain(kernel).chain([cause]).collect::<Vec<_>>(), site.lag_share * mean)
        })
        .collect();
    lines.push((
        vec!["(slices below the stall threshold, wake-ups)".into()],
        (1.0 - accounted).max(0.0) * mean,
    ));
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
