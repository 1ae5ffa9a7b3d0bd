//! What a dashboard is made of, and how it is written as the JSON that Grafana imports.

use serde_json::{Value, json};

/// Marks all of them, so that each can list the others.
pub(super) const TAG: &str = "observer";

/// Columns of a dashboard, and rows of a panel.
pub(super) const COLUMNS: u32 = 24;

pub(super) const GRAPH_ROWS: u32 = 8;

pub(super) const NUMBER_ROWS: u32 = 4;

pub(super) struct Dashboard {
    /// File, and identity in links.
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    pub(super) description: &'static str,
    /// What to choose from, beside data source, job and instance: labels, and a metric that has them.
    pub(super) choices: &'static [(&'static str, &'static str)],
    pub(super) panels: &'static [Panel],
}

pub(super) struct Panel {
    pub(super) title: &'static str,
    pub(super) description: &'static str,
    pub(super) look: Look,
    pub(super) unit: Unit,
    /// Queries, each with what its lines are called. `SELECTED` stands for what the dashboard's variables select,
    /// `PROCESS` for the same without thread and kind of work.
    pub(super) queries: &'static [(&'static str, &'static str)],
    /// The dashboard to go to for one line: its name, title and labels it takes over.
    pub(super) more: Option<&'static (&'static str, &'static str, &'static [&'static str])>,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Look {
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
pub(super) enum Unit {
    Seconds,
    /// Of 1.
    Share,
    PerSecond,
    PerMinute,
    Count,
}

impl Unit {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Share => "percentunit",
            Self::PerSecond => "cps",
            Self::PerMinute => "cpm",
            Self::Count => "short",
        }
    }
}

impl Dashboard {
    pub(super) fn file(&self) -> String {
        format!("{}.json", self.name)
    }

    pub(super) fn text(&self) -> String {
        format!("{:#}\n", self.json())
    }

    pub(super) fn json(&self) -> Value {
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

    pub(super) fn variables(&self) -> Vec<Value> {
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
    pub(super) fn selected(&self) -> String {
        let labels = ["job", "instance"].into_iter().chain(self.choices.iter().map(|(label, _)| *label));
        labels.map(|label| format!("{label}=~\"${label}\"")).collect::<Vec<_>>().join(", ")
    }

    pub(super) fn panels(&self) -> Vec<Value> {
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
    pub(super) const fn size(self) -> (u32, u32) {
        match self {
            Self::Number { .. } => (COLUMNS / 4, NUMBER_ROWS),
            Self::Lines | Self::Stack => (COLUMNS / 2, GRAPH_ROWS),
        }
    }
}

impl Panel {
    pub(super) fn json(&self, id: u32, place: &Value, selected: &str) -> Value {
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

pub(super) fn filled(query: &str, selected: &str) -> String {
    let process = selected.replace(", tid=~\"$tid\"", "").replace(", task=~\"$task\"", "");
    query.replace("SELECTED", selected).replace("PROCESS", &process)
}

pub(super) fn uid(name: &str) -> String {
    format!("{TAG}-{name}")
}

/// A link to another place, or to all dashboards with a tag; Grafana's schema wants all fields of both.
pub(super) fn link(kind: &str, title: &str, tags: &[&str], url: &str) -> Value {
    let is_to_dashboards = kind == "dashboards";
    json!({
        "type": kind, "title": title, "tags": tags, "url": url, "asDropdown": false, "icon": "external link", "tooltip": "",
        "includeVars": is_to_dashboards, "keepTime": is_to_dashboards, "targetBlank": false,
    })
}

pub(super) fn data_source() -> Value {
    json!({ "type": "prometheus", "uid": "${datasource}" })
}
