//! Resources: one for each process under observation, and one for observer itself. The attributes that identify a series must
//! not change while the series lasts. So a process's environment is read once, and again only when it runs another program, moves
//! to another container, or gets its names.

use std::{collections::HashMap, ffi::OsString, path::Path, time::SystemTime};

use nix::sys::utsname::uname;
use opentelemetry::{KeyValue, Value};
use opentelemetry_sdk::Resource;

use super::{
    settings::{Pairs, Settings, pairs},
    time::nanoseconds,
};
use crate::{
    kernel::clock,
    model::workload::Workload,
    process::{self, Process},
};

/// The resources of observer and of the processes that were pushed so far.
pub(super) struct Resources {
    known: HashMap<u32, Known>,
    own: Resource,
    /// Attributes of all resources.
    common: Pairs,
    host: String,
    /// When the programs were attached.
    started: SystemTime,
}

/// The resource of a process, and the state of the process when it was determined.
struct Known {
    ticks: Option<u64>,
    exe: String,
    workload: Workload,
    resource: Resource,
    start: SystemTime,
}

impl Known {
    /// Whether the resource is still valid.
    fn is_still(&self, target: &Process) -> bool {
        self.exe == target.exe && self.workload == target.workload
    }
}

impl Resources {
    pub(super) fn new(settings: &Settings, started: SystemTime) -> Self {
        let host = uname().map(|name| name.nodename().to_string_lossy().into_owned()).unwrap_or_default();
        let name = settings.service_name.clone();
        let given = |wanted: &str| settings.attributes.iter().find(|(name, _)| name == wanted);
        let name = name.or_else(|| Some(given("service.name")?.1.clone()));
        let mut own = Attributes::default();
        own.add("service.name", name.unwrap_or_else(|| "observer".into()));
        own.add("service.version", env!("CARGO_PKG_VERSION"));
        own.add("service.instance.id", format!("{host}:{}", std::process::id()));
        own.add("host.name", host.as_str());
        own.add_number("process.pid", std::process::id());
        own.add_missing(&settings.attributes);
        // `service.` attributes of observer's environment describe only observer.
        let common = settings.attributes.iter().filter(|(name, _)| !name.starts_with("service."));
        Self { known: HashMap::new(), own: own.into(), common: common.cloned().collect(), host, started }
    }

    /// The resource of observer itself.
    pub(super) fn own(&self) -> Resource {
        self.own.clone()
    }

    /// The start time of observer's own series, in nanoseconds since the Unix epoch.
    pub(super) fn started(&self) -> u64 {
        nanoseconds(self.started)
    }

    /// The resource of a process, and the start time of its series in nanoseconds since the Unix epoch.
    pub(super) fn of(&mut self, target: &Process) -> (Resource, u64) {
        let ticks = process::start_ticks(target.pid);
        // The environment of an exited process cannot be read, so its last resource stays.
        let last = self.known.remove(&target.pid).filter(|known| ticks.is_none() || known.ticks == ticks);
        let known = match last {
            Some(known) if ticks.is_none() || known.is_still(target) => known,
            // Its counters, and so their start time, continue.
            last => Known {
                ticks,
                exe: target.exe.clone(),
                workload: target.workload.clone(),
                resource: self.describe(target, &process::environment(target.pid)),
                start: last.map_or_else(|| self.start(ticks), |last| last.start),
            },
        };
        let answer = (known.resource.clone(), nanoseconds(known.start));
        self.known.insert(target.pid, known);
        answer
    }

    /// Removes the resources of processes for which `is_there` is false.
    pub(super) fn keep(&mut self, is_there: impl Fn(u32) -> bool) {
        self.known.retain(|&pid, _| is_there(pid));
    }

    /// When the observation of a process began: at its start, or when the programs were attached if that was later.
    fn start(&self, ticks: Option<u64>) -> SystemTime {
        let start = ticks.map(clock::wall_time_of_ticks);
        start.map_or(self.started, |start| start.max(self.started))
    }

    /// Determines the attributes of a process. Its own `OTEL_` variables take precedence, except over facts such as its id, host
    /// and container.
    fn describe(&self, target: &Process, environment: &HashMap<OsString, OsString>) -> Resource {
        let variable = |name: &str| {
            let value = environment.get(OsString::from(name).as_os_str())?.to_string_lossy().into_owned();
            Some(value).filter(|value| !value.is_empty())
        };
        let said = variable("OTEL_RESOURCE_ATTRIBUTES").map_or_else(Vec::new, |text| pairs(&text));
        let Workload { container, kubernetes, unit } = &target.workload;
        let pod = kubernetes.clone().unwrap_or_default();
        let name = variable("OTEL_SERVICE_NAME")
            .or_else(|| said.iter().find(|(name, _)| name == "service.name").map(|(_, value)| value.clone()))
            .or_else(|| pod.name.clone())
            .or_else(|| Some(unit.as_ref()?.trim_end_matches(".service").to_owned()));
        let mut attributes = Attributes::default();
        attributes.add("service.name", name.unwrap_or_else(|| target.comm.clone()));
        // Distinguishes processes of the same service. An id that the process sets for itself is not used, because several
        // processes may inherit it.
        attributes.add("service.instance.id", format!("{}:{}", self.host, target.pid));
        attributes.add("host.name", self.host.as_str());
        attributes.add_number("process.pid", target.pid);
        if let Some(file) = Path::new(&target.exe).file_name() {
            attributes.add("process.executable.name", file.to_string_lossy());
            attributes.add("process.executable.path", target.exe.as_str());
        }
        let uid = kubernetes.as_ref().map(|pod| &pod.uid);
        let place = [
            ("container.id", container.as_ref()),
            ("k8s.namespace.name", pod.namespace.as_ref()),
            ("k8s.pod.name", pod.name.as_ref()),
            ("k8s.pod.uid", uid),
            ("k8s.container.name", pod.container.as_ref()),
            ("systemd.unit.name", unit.as_ref()),
        ];
        for (key, value) in place {
            if let Some(value) = value {
                attributes.add(key, value.as_str());
            }
        }
        attributes.add_missing(&said);
        attributes
            .add_missing(&pod.namespace.map(|name| ("service.namespace".into(), name)).into_iter().collect());
        attributes.add_missing(&self.common);
        attributes.into()
    }
}

/// Attributes, each key once.
#[derive(Default)]
struct Attributes(Vec<KeyValue>);

impl Attributes {
    fn add(&mut self, key: &str, value: impl Into<String>) {
        self.0.push(KeyValue::new(key.to_owned(), value.into()));
    }

    fn add_number(&mut self, key: &str, number: u32) {
        self.0.push(KeyValue::new(key.to_owned(), Value::I64(number.into())));
    }

    fn add_missing(&mut self, pairs: &Pairs) {
        for (name, value) in pairs {
            if !self.0.iter().any(|known| known.key.as_str() == name) {
                self.add(name, value.as_str());
            }
        }
    }
}

impl From<Attributes> for Resource {
    fn from(attributes: Attributes) -> Self {
        Self::builder_empty().with_attributes(attributes.0).build()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        export::otlp::testing::{process, settings},
        model::workload::Pod,
    };

    fn described(settings: &Settings, environment: &[(&str, &str)]) -> HashMap<String, String> {
        described_in(Workload::default(), settings, environment)
    }

    fn described_in(
        workload: Workload,
        settings: &Settings,
        environment: &[(&str, &str)],
    ) -> HashMap<String, String> {
        let resources = Resources::new(settings, SystemTime::now());
        let variables = environment.iter().map(|(name, value)| (name.into(), value.into())).collect();
        plain(resources.describe(&Process { workload, ..process(7) }, &variables))
    }

    fn in_pod() -> Workload {
        let name = |name: &str| Some(name.to_owned());
        let pod = Pod {
            namespace: name("shop"),
            name: name("web-0"),
            container: name("web"),
            uid: "8f2d0c1a-5b1e-4d0c-9a6f-0e1d2c3b4a59".into(),
        };
        Workload { container: name("0123"), kubernetes: Some(pod), unit: None }
    }

    fn plain(resource: Resource) -> HashMap<String, String> {
        resource.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    #[test]
    fn a_process_is_called_what_it_calls_itself() {
        let name = |environment: &[(&str, &str)]| described(&settings(), environment)["service.name"].clone();
        assert_eq!(name(&[]), "app");
        let attributes = ("OTEL_RESOURCE_ATTRIBUTES", "service.name=shop,k8s.pod.name=shop-0");
        assert_eq!(name(&[attributes]), "shop");
        assert_eq!(name(&[attributes, ("OTEL_SERVICE_NAME", "till")]), "till");
        assert_eq!(described(&settings(), &[attributes])["k8s.pod.name"], "shop-0");
    }

    #[test]
    fn a_process_that_says_nothing_is_called_after_its_pod_or_its_service() {
        let resource = described_in(in_pod(), &settings(), &[]);
        for (attribute, value) in [
            ("service.name", "web-0"),
            ("service.namespace", "shop"),
            ("container.id", "0123"),
            ("k8s.namespace.name", "shop"),
            ("k8s.pod.name", "web-0"),
            ("k8s.pod.uid", "8f2d0c1a-5b1e-4d0c-9a6f-0e1d2c3b4a59"),
            ("k8s.container.name", "web"),
        ] {
            assert_eq!(resource[attribute], value, "{attribute}");
        }
        let said = ("OTEL_RESOURCE_ATTRIBUTES", "service.name=till,service.namespace=ours,k8s.pod.name=x");
        let resource = described_in(in_pod(), &settings(), &[said]);
        assert_eq!(resource["service.name"], "till");
        assert_eq!(resource["service.namespace"], "ours");
        assert_eq!(resource["k8s.pod.name"], "web-0");
        let unit = Workload { unit: Some("nginx.service".into()), ..Workload::default() };
        let resource = described_in(unit, &settings(), &[]);
        assert_eq!(
            (resource["service.name"].as_str(), resource["systemd.unit.name"].as_str()),
            ("nginx", "nginx.service")
        );
        assert!(!resource.keys().any(|key| key.starts_with("k8s.")), "{resource:?}");
    }

    #[test]
    fn names_that_come_late_are_told() {
        let me = process(std::process::id());
        let mut resources = Resources::new(&settings(), SystemTime::now());
        let (_, start) = resources.of(&me);
        let (resource, later) = resources.of(&Process { workload: in_pod(), ..me });
        assert_eq!(plain(resource)["k8s.pod.name"], "web-0");
        assert_eq!(start, later);
    }

    #[test]
    fn what_is_certain_cannot_be_denied() {
        let lies = [("OTEL_RESOURCE_ATTRIBUTES", "process.pid=1,service.instance.id=x")];
        let resource = described(&settings(), &lies);
        assert_eq!(resource["process.pid"], "7");
        assert!(resource["service.instance.id"].ends_with(":7"));
        assert_eq!(resource["process.executable.name"], "app");
        assert_eq!(resource["process.executable.path"], "/usr/bin/app");
    }

    #[test]
    fn attributes_of_the_surroundings_are_everybodys() {
        let given = pairs("deployment.environment.name=test,service.name=mine,service.namespace=ours");
        let settings = Settings { attributes: given, ..settings() };
        let resource = described(&settings, &[]);
        assert_eq!(resource["deployment.environment.name"], "test");
        assert_eq!(resource["service.name"], "app");
        assert!(!resource.contains_key("service.namespace"));
        let own = plain(Resources::new(&settings, SystemTime::now()).own());
        assert_eq!((own["service.name"].as_str(), own["service.namespace"].as_str()), ("mine", "ours"));
        assert_eq!(own["deployment.environment.name"], "test");
    }

    #[test]
    fn a_series_starts_with_observer_or_with_its_process() {
        let me = process(std::process::id());
        let now = SystemTime::now();
        let mut resources = Resources::new(&settings(), now);
        assert_eq!(resources.of(&me).1, nanoseconds(now));
        let long_ago = now - Duration::from_secs(1 << 30);
        let mut resources = Resources::new(&settings(), long_ago);
        let start = resources.of(&me).1;
        assert!(start > nanoseconds(long_ago) && start <= nanoseconds(SystemTime::now()));
        assert_eq!(resources.of(&me).1, start);
    }

    #[test]
    fn a_process_that_is_gone_is_what_it_was() {
        let mut child = std::process::Command::new("/bin/cat")
            .env("OTEL_SERVICE_NAME", "till")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let it = process(child.id());
        let mut resources = Resources::new(&settings(), SystemTime::now());
        // The variables are those of the program once that has been started.
        let is_started =
            |pid| process::environment(pid).contains_key(OsString::from("OTEL_SERVICE_NAME").as_os_str());
        while !is_started(it.pid) {
            std::thread::yield_now();
        }
        let before = plain(resources.of(&it).0);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(before["service.name"], "till");
        assert_eq!(plain(resources.of(&it).0), before);
        resources.keep(|_| false);
        assert_eq!(plain(resources.of(&it).0)["service.name"], "app");
    }
}
