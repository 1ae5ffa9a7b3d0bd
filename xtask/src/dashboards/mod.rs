//! The Grafana dashboards: described compactly here and in the files beside, written as JSON into `dashboards/`.
//! Every panel has a unit and says what it shows; every query is bound to the data source and the job of its dashboard.

mod accept_queue;
mod deferred_work;
mod fleet;
mod reactor;

use std::fs;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::workspace::root;

/// Marks all of them, so that each can list the others.
const TAG: &str = "observer";

/// Columns of a dashboard, and rows of a panel.
const COLUMNS: u32 = 24;
const GRAPH_ROWS: u32 = 8;
const NUMBER_ROWS: u32 = 4;

struct Dashboard {
    /// File, and identity in links.
    name: &'static str,
    title: &'static str,
    description: &'static str,
    /// What to choose from, beside data source, job and instance: labels, and a metric that has them.
    choices: &'static [(&'static str, &'static str)],
    panels: &'static [Panel],
}

struct Panel {
    title: &'static str,
    description: &'static str,
    look: Look,
    unit: Unit,
    /// Queries, each with what its lines are called. `SELECTED` stands for what the dashboard's variables select,
    /// `PROCESS` for the same without thread and kind of work.
    queries: &'static [(&'static str, &'static str)],
    /// The dashboard to go to for one line: its name, title and labels it takes over.
    more: Option<&'static (&'static str, &'static str, &'static [&'static str])>,
}

#[derive(Clone, Copy, PartialEq)]
enum Look {
    /// A number, red from the given value on.
    Number {
        red_from: f64,
    },
    Lines,
    /// Lines that add up.
    Stack,
}

/// Grafana's names for units.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Seconds,
    /// Of 1.
    Share,
    PerSecond,
    PerMinute,
    Count,
}

impl Unit {
    const fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Share => "percentunit",
            Self::PerSecond => "cps",
            Self::PerMinute => "cpm",
            Self::Count => "short",
        }
    }
}

/// All of them.
const ALL: &[&Dashboard] =
    &[&fleet::DASHBOARD, &reactor::DASHBOARD, &accept_queue::DASHBOARD, &deferred_work::DASHBOARD];

/// Writes them into their folder.
pub(crate) fn write() -> Result<()> {
    let folder = root().join("dashboards");
    fs::create_dir_all(&folder)?;
    for dashboard in ALL {
        let file = folder.join(dashboard.file());
        fs::write(&file, dashboard.text()).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

impl Dashboard {
    fn file(&self) -> String {
        format!("{}.json", self.name)
    }

    fn text(&self) -> String {
        format!("{:#}\n", self.json())
    }

    fn json(&self) -> Value {
        json!({
            "uid": uid(self.name),
            "title": self.title,
            "description": self.description,
            "tags": [TAG],
            "schemaVersion": 39,
            "editable": true,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": { "from": "now-1h", "to": "now" },
            "annotations": { "list": [] },
            "links": [link("dashboards", "observer", &[TAG], "")],
            "templating": { "list": self.variables() },
            "panels": self.panels(),
        })
    }

    fn variables(&self) -> Vec<Value> {
        let source = json!({
            "type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus",
            "description": "The Prometheus that scrapes observer.",
        });
        let mut known = String::new();
        let labels = [("job", "observer_build_info"), ("instance", "observer_build_info")];
        let labels = labels.into_iter().chain(self.choices.iter().copied()).map(|(label, metric)| {
            let query = format!("label_values({metric}{{{known}}}, {label})");
            known = format!("{known}{}{label}=~\"${label}\"", if known.is_empty() { "" } else { ", " });
            json!({
                "type": "query", "name": label, "label": label, "datasource": data_source(), "query": query,
                "refresh": 2, "sort": 1, "multi": true, "includeAll": true, "allValue": ".*",
                "current": { "text": "All", "value": "$__all" },
            })
        });
        std::iter::once(source).chain(labels).collect()
    }

    /// What all the variables select.
    fn selected(&self) -> String {
        let labels = ["job", "instance"].into_iter().chain(self.choices.iter().map(|(label, _)| *label));
        labels.map(|label| format!("{label}=~\"${label}\"")).collect::<Vec<_>>().join(", ")
    }

    fn panels(&self) -> Vec<Value> {
        let (mut x, mut y, mut height) = (0, 0, 0);
        let selected = self.selected();
        let placed = self.panels.iter().zip(1..).map(|(panel, id)| {
            let (width, rows) = panel.look.size();
            if x + width > COLUMNS {
                (x, y) = (0, y + height);
            }
            height = rows;
            let place = json!({ "x": x, "y": y, "w": width, "h": rows });
            x += width;
            panel.json(id, &place, &selected)
        });
        placed.collect()
    }
}

impl Look {
    /// Columns and rows.
    const fn size(self) -> (u32, u32) {
        match self {
            Self::Number { .. } => (COLUMNS / 4, NUMBER_ROWS),
            Self::Lines | Self::Stack => (COLUMNS / 2, GRAPH_ROWS),
        }
    }
}

impl Panel {
    fn json(&self, id: u32, place: &Value, selected: &str) -> Value {
        let is_number = matches!(self.look, Look::Number { .. });
        let queries = self.queries.iter().zip('A'..).map(|((query, legend), name)| {
            json!({
                "refId": name.to_string(), "datasource": data_source(), "expr": filled(query, selected),
                "legendFormat": legend, "range": !is_number, "instant": is_number,
            })
        });
        let mut defaults = json!({ "unit": self.unit.name(), "min": 0 });
        if self.unit == Unit::Share {
            defaults["max"] = json!(1);
        }
        if let Some((name, title, labels)) = self.more {
            let taken = labels
                .iter()
                .map(|label| format!("var-{label}=${{__field.labels.{label}}}&"))
                .collect::<String>();
            let url = format!(
                "/d/{}?{taken}var-job=${{__field.labels.job}}&var-datasource=${{datasource}}&${{__url_time_range}}",
                uid(name)
            );
            defaults["links"] = json!([link("link", title, &[], &url)]);
        }
        let (kind, options) = match self.look {
            Look::Number { red_from } => {
                defaults["color"] = json!({ "mode": "thresholds" });
                let steps =
                    json!([{ "value": null, "color": "green" }, { "value": red_from, "color": "red" }]);
                defaults["thresholds"] = json!({ "mode": "absolute", "steps": steps });
                let reduce = json!({ "calcs": ["lastNotNull"], "fields": "", "values": false });
                let options = json!({
                    "reduceOptions": reduce, "colorMode": "value", "graphMode": "none", "justifyMode": "auto",
                    "textMode": "auto", "orientation": "auto", "wideLayout": true, "showPercentChange": false,
                    "percentChangeColorMode": "standard",
                });
                ("stat", options)
            }
            Look::Lines | Look::Stack => {
                let stacking = if self.look == Look::Stack { "normal" } else { "none" };
                let fill = if self.look == Look::Stack { 40 } else { 0 };
                defaults["custom"] = json!({
                    "drawStyle": "line", "lineWidth": 1, "fillOpacity": fill, "showPoints": "never",
                    "stacking": { "mode": stacking, "group": "A" },
                });
                let legend = json!({ "displayMode": "table", "placement": "bottom", "showLegend": true, "calcs": ["max", "lastNotNull"] });
                ("timeseries", json!({ "legend": legend, "tooltip": { "mode": "multi", "sort": "desc" } }))
            }
        };
        json!({
            "id": id, "type": kind, "title": self.title, "description": self.description, "gridPos": place,
            "datasource": data_source(), "targets": queries.collect::<Vec<_>>(),
            "fieldConfig": { "defaults": defaults, "overrides": [] }, "options": options,
        })
    }
}

fn filled(query: &str, selected: &str) -> String {
    let process = selected.replace(", tid=~\"$tid\"", "").replace(", task=~\"$task\"", "");
    query.replace("SELECTED", selected).replace("PROCESS", &process)
}

fn uid(name: &str) -> String {
    format!("{TAG}-{name}")
}

/// A link to another place, or to all dashboards with a tag; Grafana's schema wants all fields of both.
fn link(kind: &str, title: &str, tags: &[&str], url: &str) -> Value {
    let is_to_dashboards = kind == "dashboards";
    json!({
        "type": kind, "title": title, "tags": tags, "url": url, "asDropdown": false, "icon": "external link", "tooltip": "",
        "includeVars": is_to_dashboards, "keepTime": is_to_dashboards, "targetBlank": false,
    })
}

fn data_source() -> Value {
    json!({ "type": "prometheus", "uid": "${datasource}" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dashboards_are_up_to_date() {
        for dashboard in ALL {
            let file = root().join("dashboards").join(dashboard.file());
            let kept = fs::read_to_string(&file).unwrap_or_default();
            assert!(kept == dashboard.text(), "{} differs; make it anew: cargo xtask docs", file.display());
        }
    }

    /// Every query selects by the variables, every link leads somewhere.
    #[test]
    fn panels_are_bound_to_their_dashboard() {
        for panel in ALL.iter().flat_map(|dashboard| dashboard.panels) {
            let selectors = |query: &str| {
                (
                    query.matches('{').count(),
                    query.matches("{SELECTED}").count() + query.matches("{PROCESS}").count(),
                )
            };
            for (query, _) in panel.queries {
                let (all, bound) = selectors(query);
                assert!(all == bound && bound == query.matches("observer_").count(), "{query}");
            }
            if let Some((name, _, labels)) = panel.more {
                let target = ALL.iter().find(|dashboard| dashboard.name == *name).expect(name);
                for label in *labels {
                    assert!(*label == "instance" || target.choices.iter().any(|(choice, _)| choice == label));
                }
            }
        }
    }
}
