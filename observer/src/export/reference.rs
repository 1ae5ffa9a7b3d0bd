//! The reference page `docs/metrics.md`, straight from the metric catalog.

use std::io::Write;

use anyhow::Result;

use super::{
    endpoint::{CONNECTIONS, GRACE, LIFE},
    series::{OTHER, SHOWN},
};
use crate::model::{
    catalog::families,
    family::{Aggregation, Kind},
    subject::Subject,
};

const HEAD: &str = "\
# Metrics

Made by `cargo xtask docs` from `observer/src/model/catalog.rs`; do not edit.

`observer --pid PID` answers scrapes at `http://127.0.0.1:9464/metrics` (`--listen ADDR` for another address) in
Prometheus' text format, compressed for those who ask for gzip. `/healthz` answers while observer is alive, `/readyz` while
figures can be read. Durations are seconds, names tell the unit.

What is pushed to OpenTelemetry collectors has the names under *pushed as*; `docs/otlp.md` tells how.

- **Lag** counts once for each millisecond observed, so `histogram_quantile(0.99, rate(observer_reactor_lag_seconds_bucket[5m]))`
  is the delay that 99 % of all instants do not exceed, and `rate(…_sum[5m]) / rate(…_count[5m])` the mean. It grows while a loop
  is stuck, too.
- Histograms have a bound at every power of two of nanoseconds from 1 us to 69 s, and up to seven in between with
  `--resolution`; their counts and sums are true.
- A series ends with its process, thread or listener: the next scrape does not have it any more.
- `container` is a container's id, `pod` the name of a pod, both empty where there is none or it is not known. The rest of
  where a process belongs is on `observer_target_info`: `… * on (job, instance, pid) group_left (namespace, container_name, unit)
  observer_target_info`. A Prometheus that gives labels `container` and `pod` to what it scrapes needs `honor_labels: true`,
  or calls these `exported_container` and `exported_pod`.
";

/// Writes the page.
pub(crate) fn write(out: &mut impl Write) -> Result<()> {
    write!(out, "{HEAD}")?;
    writeln!(
        out,
        "- The first {SHOWN} listeners, event loops and processes are told one by one. Any more are told together, with the\n  \
         label `{OTHER}`: counters and histograms added up, which goes on for those that are gone; gauges added up or the\n  \
         greatest, as stated below. A server with more loops than that is too large to be looked at loop by loop.\n\
         - Observer brings its metrics up to date once a second. A page of them is made at most ten times a second, and less often\n  \
         where that takes more than a tenth of a CPU's time; scrapes in between get the same page. With more than {CONNECTIONS}\n  \
         connections the oldest is closed; none lasts longer than {} s.\n",
        (LIFE + GRACE).as_secs()
    )?;
    writeln!(out, "| name | type | labels | pushed as | what it tells |\n| --- | --- | --- | --- | --- |")?;
    for family in families() {
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge(_) => "gauge",
            Kind::Histogram => "histogram",
        };
        let together = match family.kind {
            Kind::Gauge(together) if family.subject() != Subject::Own => match together {
                Aggregation::Sum => " Together: their sum.",
                Aggregation::Max => " Together: the greatest.",
            },
            _ => "",
        };
        let labels: Vec<_> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let unit = if family.unit.is_empty() { String::new() } else { format!(" in `{}`", family.unit) };
        writeln!(
            out,
            "| `{}` | {kind} | {} | `{}`{unit} | {}{together} |",
            family.name,
            labels.join(" "),
            family.otlp,
            family.help
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    use super::*;

    #[test]
    fn the_page_is_up_to_date() {
        let mut page = Vec::new();
        write(&mut page).unwrap();
        let kept = include_str!("../../../docs/metrics.md");
        assert_eq!(String::from_utf8(page).unwrap(), kept, "make it anew: cargo xtask docs");
    }

    /// What begins like a metric and is none.
    const OTHERS: &[&str] = &["observer_common", "observer_ebpf"];

    /// Every metric that a dashboard, a rule or a document names is in the catalog.
    #[test]
    fn only_metrics_that_exist_are_named() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let folder = |name: &str| -> Vec<PathBuf> {
            let entries = fs::read_dir(root.join(name)).unwrap().map(|entry| entry.unwrap().path());
            entries.filter(|path| path.is_file()).collect()
        };
        let mut files = [folder("dashboards"), folder("docs"), folder("docs/decisions")].concat();
        let pages = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"];
        files.extend(pages.map(|name| root.join(name)));
        let mut named = 0;
        for file in &files {
            let text = fs::read_to_string(file).unwrap();
            for name in words(&text).filter(|name| name.starts_with("observer_") && !OTHERS.contains(name)) {
                named += 1;
                assert!(exists(name), "{} names {name}, which is no metric", file.display());
            }
        }
        assert!(named > 100, "only {named} metrics are named");
    }

    /// Names as Prometheus has them, those of recording rules whole.
    fn words(text: &str) -> impl Iterator<Item = &str> {
        text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
    }

    fn exists(name: &str) -> bool {
        let is_family = |name: &str| families().any(|family| family.name == name);
        let histograms = families().filter(|family| family.kind == Kind::Histogram);
        let is_part = || {
            histograms.map(|family| family.name).any(|family| {
                let part = name.strip_prefix(family).unwrap_or_default();
                matches!(part, "_bucket" | "_sum" | "_count")
            })
        };
        is_family(name) || is_part()
    }
}
