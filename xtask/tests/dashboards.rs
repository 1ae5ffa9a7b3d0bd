//! The Grafana dashboards in `dashboards/`, which are edited in Grafana: their metrics exist, their queries select by
//! their variables, and their panels have units and descriptions.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, iter,
    path::Path,
};

use serde_json::Value;

#[test]
fn dashboards_have_no_faults() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let read = |name: &str| fs::read_to_string(root.join(name)).unwrap();
    let metrics = metrics(&read("docs/metrics.md"), &read("dashboards/rules.yml"));
    assert!(metrics.len() > 50 && metrics["observer_gc_total"].contains("pid"), "{metrics:?}");
    let files = fs::read_dir(root.join("dashboards")).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let files: BTreeMap<_, _> = files
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(&path).unwrap())
        })
        .collect();
    assert!(!files.is_empty());
    let faults = faults(&files, &metrics);
    assert!(faults.is_empty(), "see \"A dashboard\" in CONTRIBUTING.md:\n{}", faults.join("\n"));
}

/// The names that queries may use, each with its labels.
type Metrics = BTreeMap<String, BTreeSet<String>>;

/// The metrics of `docs/metrics.md`, and the recording rules, whose labels are unknown.
fn metrics(page: &str, rules: &str) -> Metrics {
    let rows = page.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| ")?.split(" | ");
        let name = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
        let (kind, labels) = (cells.next()?, cells.next()?);
        Some((name, kind, labels.split(' ').map(|label| label.trim_matches('`').to_owned()).collect()))
    });
    let metrics = rows.flat_map(|(name, kind, labels): (_, _, BTreeSet<String>)| {
        let suffixes = if kind == "histogram" { &["_bucket", "_sum", "_count"][..] } else { &[""] };
        suffixes.iter().map(move |suffix| (format!("{name}{suffix}"), labels.clone()))
    });
    let records = rules.lines().filter_map(|line| line.trim().strip_prefix("- record: "));
    metrics.chain(records.map(|name| (name.to_owned(), BTreeSet::new()))).collect()
}

/// All faults of dashboards, by file name without extension.
fn faults(files: &BTreeMap<String, String>, metrics: &Metrics) -> Vec<String> {
    let mut faults = Vec::new();
    let mut dashboards = BTreeMap::new();
    for (name, text) in files {
        match serde_json::from_str::<Value>(text) {
            Ok(json) => drop(dashboards.insert(name.clone(), json)),
            Err(error) => faults.push(format!("{name}: not valid JSON: {error}")),
        }
    }
    let mut titles = BTreeSet::new();
    for (name, json) in &dashboards {
        if !titles.insert(text(&json["title"])) {
            faults.push(format!("{name}: another dashboard has the same title"));
        }
        let mut check = Check { dashboards: &dashboards, metrics, name, json, faults: &mut faults };
        check.dashboard();
    }
    faults
}

/// Checks a dashboard.
struct Check<'a> {
    dashboards: &'a BTreeMap<String, Value>,
    metrics: &'a Metrics,
    name: &'a str,
    json: &'a Value,
    faults: &'a mut Vec<String>,
}

impl Check<'_> {
    fn require(&mut self, holds: bool, fault: &str) {
        if !holds {
            self.faults.push(format!("{}: {fault}", self.name));
        }
    }

    fn dashboard(&mut self) {
        let json = self.json;
        // Links between dashboards have the uid, and the menu of dashboards has those with the tag.
        let uid = uid(self.name);
        self.require(json["uid"] == uid, &format!("the uid is not {uid}"));
        self.require(list(&json["tags"]).any(|tag| tag == "observer"), "the tag observer is missing");
        self.require(!text(&json["title"]).is_empty(), "the title is missing");
        self.require(!text(&json["description"]).is_empty(), "the description is missing");
        let is_shared = json.get("__inputs").is_some();
        self.require(!is_shared, "exported for sharing: export it again without that option");
        for link in list(&json["links"]) {
            self.link(link, "the dashboard");
        }
        self.variables();
        let (mut titles, mut ids) = (BTreeSet::new(), BTreeSet::new());
        for panel in list(&json["panels"]) {
            let title = format!("panel {:?}", text(&panel["title"]));
            self.require(titles.insert(text(&panel["title"])), &format!("{title}: the title is not unique"));
            self.require(ids.insert(panel["id"].as_u64()), &format!("{title}: the id is not unique"));
            self.panel(panel, &title);
        }
        self.require(!ids.is_empty(), "there are no panels");
    }

    fn variables(&mut self) {
        for variable in list(&self.json["templating"]["list"]) {
            let name = format!("variable {:?}", text(&variable["name"]));
            if variable["type"] != "query" {
                continue;
            }
            let current = &variable["current"]["value"];
            let is_all = current == "$__all" || list(current).eq(["$__all"]);
            self.require(is_all, &format!("{name}: the selected value is not All"));
            self.data_source(variable, &name);
            // Grafana exports a query as a string or as an object with it.
            let query = variable["query"].as_str().unwrap_or_else(|| text(&variable["query"]["query"]));
            self.names(query, &name);
        }
        let names: BTreeSet<_> = variables(self.json).collect();
        for name in ["datasource", "job", "instance"] {
            self.require(names.contains(name), &format!("the variable {name} is missing"));
        }
    }

    fn panel(&mut self, panel: &Value, title: &str) {
        if panel["type"] == "row" {
            let is_collapsed = list(&panel["panels"]).next().is_some();
            self.require(
                !is_collapsed,
                &format!("{title}: the row is collapsed, so its panels are not checked"),
            );
            return;
        }
        let description = text(&panel["description"]);
        self.require(!description.is_empty(), &format!("{title}: the description is missing"));
        let defaults = &panel["fieldConfig"]["defaults"];
        for link in list(&panel["links"]).chain(list(&defaults["links"])) {
            self.link(link, title);
        }
        if panel["type"] == "text" {
            return;
        }
        self.require(!text(&defaults["unit"]).is_empty(), &format!("{title}: the unit is missing"));
        self.data_source(panel, title);
        for target in list(&panel["targets"]) {
            let query = text(&target["expr"]);
            self.data_source(target, title);
            self.names(query, title);
            self.selectors(query, title);
        }
        self.require(list(&panel["targets"]).next().is_some(), &format!("{title}: there are no queries"));
    }

    fn data_source(&mut self, owner: &Value, title: &str) {
        let is_variable = owner["datasource"]["uid"] == "${datasource}";
        self.require(is_variable, &format!("{title}: the data source is not ${{datasource}}"));
    }

    /// The metrics and variables of a query exist.
    fn names(&mut self, query: &str, title: &str) {
        for metric in words(query).map(|(_, word)| word).filter(|word| is_metric(word)) {
            self.require(self.metrics.contains_key(metric), &format!("{title}: there is no metric {metric}"));
        }
        for name in used_variables(query) {
            let exists = name.starts_with("__") || variables(self.json).any(|variable| variable == name);
            self.require(exists, &format!("{title}: there is no variable {name}"));
        }
    }

    /// Each metric of a query is selected by job, instance, and all variables that are labels of the metric.
    fn selectors(&mut self, query: &str, title: &str) {
        for (start, metric) in words(query).filter(|(_, word)| is_metric(word)) {
            let rest = query[start + metric.len()..].trim_start().strip_prefix('{');
            let matchers = rest.and_then(|rest| rest.split_once('}')).map_or("", |(matchers, _)| matchers);
            let used: BTreeSet<_> = used_variables(matchers).collect();
            let labels = self.metrics.get(metric);
            let is_label = |name: &str| labels.is_some_and(|labels| labels.contains(name));
            for name in
                variables(self.json).filter(|name| matches!(*name, "job" | "instance") || is_label(name))
            {
                self.require(used.contains(name), &format!("{title}: {metric} is not selected by ${name}"));
            }
        }
    }

    /// A link to a dashboard sets variables that the dashboard has.
    fn link(&mut self, link: &Value, title: &str) {
        let Some(target) = text(&link["url"]).strip_prefix("/d/") else { return };
        let (target_uid, query) = target.split_once('?').unwrap_or((target, ""));
        let found = self
            .dashboards
            .iter()
            .find(|(name, _)| uid(name) == target_uid.split('/').next().unwrap_or_default());
        let Some((_, json)) = found else {
            self.require(false, &format!("{title}: a link leads to {target_uid}, which does not exist"));
            return;
        };
        for parameter in query.split('&').filter_map(|parameter| parameter.strip_prefix("var-")) {
            let name = parameter.split('=').next().unwrap_or_default();
            let exists = variables(json).any(|variable| variable == name);
            self.require(exists, &format!("{title}: a link sets {name}, which {target_uid} does not have"));
        }
    }
}

fn uid(name: &str) -> String {
    format!("observer-{name}")
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The names of a dashboard's variables.
fn variables(dashboard: &Value) -> impl Iterator<Item = &str> {
    list(&dashboard["templating"]["list"]).map(|variable| text(&variable["name"]))
}

/// The names in a query, with their positions. Names of recording rules have colons.
fn words(query: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut rest = 0;
    iter::from_fn(move || {
        let start = rest + query[rest..].find(is_part)?;
        let end = query[start..].find(|c| !is_part(c)).map_or(query.len(), |length| start + length);
        rest = end;
        Some((start, &query[start..end]))
    })
}

fn is_metric(word: &str) -> bool {
    word.starts_with("observer_") || word.contains(":observer_")
}

/// The names in `$name` and `${name}`.
fn used_variables(query: &str) -> impl Iterator<Item = &str> {
    query.split('$').skip(1).filter_map(|text| {
        let text = text.strip_prefix('{').unwrap_or(text);
        words(text)
            .next()
            .filter(|(start, _)| *start == 0)
            .map(|(_, name)| name.split(':').next().unwrap_or(name))
    })
}

/// The faults of a dashboard without faults after one text in it is replaced.
fn faults_with(old: &str, new: &str) -> Vec<String> {
    let dashboard = r#"{
        "uid": "observer-a", "title": "A", "description": "All of it.", "tags": ["observer"], "links": [],
        "templating": { "list": [
            { "type": "datasource", "name": "datasource" },
            { "type": "query", "name": "job", "datasource": { "uid": "${datasource}" },
              "query": "label_values(observer_depth, job)", "current": { "value": "$__all" } },
            { "type": "query", "name": "instance", "datasource": { "uid": "${datasource}" },
              "query": { "query": "label_values(observer_depth{job=~\"$job\"}, instance)" },
              "current": { "value": ["$__all"] } },
            { "type": "custom", "name": "pid" },
            { "type": "custom", "name": "loop" }
        ] },
        "panels": [
            { "id": 1, "type": "row", "title": "Row", "panels": [] },
            { "id": 2, "type": "timeseries", "title": "Depth", "description": "How deep it is.",
              "datasource": { "uid": "${datasource}" },
              "fieldConfig": { "defaults": { "unit": "short", "links": [
                  { "url": "/d/observer-a?var-job=x&${__url_time_range}" }
              ] } },
              "targets": [{ "datasource": { "uid": "${datasource}" }, "expr":
                "rate(observer_wait_seconds_sum{job=~\"$job\", instance=~\"$instance\", pid=~\"$pid\"}[$__rate_interval])" }] }
        ]
    }"#;
    assert!(dashboard.contains(old), "{old}");
    let files = BTreeMap::from([("a".to_owned(), dashboard.replacen(old, new, 1))]);
    let page = "| name | type | labels |\n| `observer_depth` | gauge | `pid` |\n| `observer_wait_seconds` | histogram | `pid` |\n";
    faults(&files, &metrics(page, "      - record: listener:observer_wait_seconds:mean\n"))
}

#[test]
fn a_dashboard_without_faults_passes() {
    assert_eq!(faults_with("observer", "observer"), Vec::<String>::new());
    assert_eq!(
        faults_with("observer_wait_seconds_sum{", "listener:observer_wait_seconds:mean{"),
        Vec::<String>::new()
    );
}

#[test]
fn faults_are_found() {
    for (old, new, fault) in [
        (r#""uid": "observer-a""#, r#""uid": "b""#, "the uid is not observer-a"),
        (r#"["observer"]"#, "[]", "the tag observer is missing"),
        (r#""title": "A""#, r#""title": """#, "the title is missing"),
        ("All of it.", "", "the description is missing"),
        (
            r#""links""#,
            r#""__inputs": [], "links""#,
            "exported for sharing: export it again without that option",
        ),
        (r#""$__all""#, r#""nginx""#, r#"variable "job": the selected value is not All"#),
        (r#"["$__all"]"#, r#"["$__all", "nginx"]"#, r#"variable "instance": the selected value is not All"#),
        ("(observer_depth,", "(observer_dept,", r#"variable "job": there is no metric observer_dept"#),
        (r#"{job=~\"$job\"}"#, r#"{job=~\"$jobs\"}"#, r#"variable "instance": there is no variable jobs"#),
        (r#""name": "datasource""#, r#""name": "source""#, "the variable datasource is missing"),
        (r#""id": 2"#, r#""id": 1"#, r#"panel "Depth": the id is not unique"#),
        (r#""title": "Row""#, r#""title": "Depth""#, r#"panel "Depth": the title is not unique"#),
        (
            r#""panels": []"#,
            r#""panels": [{}]"#,
            r#"panel "Row": the row is collapsed, so its panels are not checked"#,
        ),
        ("How deep it is.", "", r#"panel "Depth": the description is missing"#),
        (r#""unit": "short", "#, "", r#"panel "Depth": the unit is missing"#),
        (
            r#"[{ "datasource": { "uid": "${datasource}" }"#,
            r#"[{ "datasource": { "uid": "P1" }"#,
            r#"panel "Depth": the data source is not ${datasource}"#,
        ),
        ("wait_seconds_sum", "wait_seconds", r#"panel "Depth": there is no metric observer_wait_seconds"#),
        (r#"[$__rate_interval]"#, r#"[$interval]"#, r#"panel "Depth": there is no variable interval"#),
        (
            r#"instance=~\"$instance\", "#,
            "",
            r#"panel "Depth": observer_wait_seconds_sum is not selected by $instance"#,
        ),
        (r#", pid=~\"$pid\""#, "", r#"panel "Depth": observer_wait_seconds_sum is not selected by $pid"#),
        (
            "/d/observer-a?",
            "/d/observer-b?",
            r#"panel "Depth": a link leads to observer-b, which does not exist"#,
        ),
        ("var-job=", "var-comm=", r#"panel "Depth": a link sets comm, which observer-a does not have"#),
    ] {
        assert_eq!(faults_with(old, new), [format!("a: {fault}")], "{new}");
    }
    let found = faults_with("{", "");
    assert!(found.len() == 1 && found[0].starts_with("a: not valid JSON: "), "{found:?}");
    let found = faults_with(r#""targets": ["#, r#""targets": [], "old": ["#);
    assert_eq!(found, [r#"a: panel "Depth": there are no queries"#]);
}

#[test]
fn titles_of_dashboards_are_unique() {
    let files =
        ["a", "b"].map(|name| (name.to_owned(), format!(r#"{{ "uid": "observer-{name}", "title": "A" }}"#)));
    let found = faults(&BTreeMap::from(files), &Metrics::new());
    assert!(found.contains(&"b: another dashboard has the same title".to_owned()), "{found:?}");
}
