//! Settings and snapshots for the tests of this folder.

use std::time::Duration;

use super::settings::{Endpoint, Protocol, Settings};
use crate::{
    model::{
        snapshot::{Own, SCHEMA, Snapshot, Target},
        workload::Workload,
    },
    process::Process,
};

/// An endpoint at which nothing listens.
pub(super) fn endpoint() -> Endpoint {
    Endpoint {
        uri: "http://127.0.0.1:1/v1/metrics".parse().unwrap(),
        protocol: Protocol::HttpProtobuf,
        headers: http::HeaderMap::new(),
        timeout: Duration::from_secs(10),
        gzip: false,
        certificate: None,
        client: None,
        hint: "",
    }
}

/// Settings that push metrics to [`endpoint`].
pub(super) fn settings() -> Settings {
    Settings {
        metrics: Some(endpoint()),
        interval: Duration::from_secs(60),
        traces: None,
        delay: Duration::from_secs(1),
        attributes: Vec::new(),
        service_name: None,
    }
}

/// A process with this id.
pub(super) fn process(pid: u32) -> Process {
    Process { pid, comm: "app".into(), exe: "/usr/bin/app".into(), parent: 1, workload: Workload::default() }
}

/// A process without listeners, event loops and tasks.
pub(super) fn target(pid: u32) -> Target {
    Target {
        pid,
        comm: "app".into(),
        exe: "/usr/bin/app".into(),
        parent: 1,
        workload: Workload::default(),
        exited: false,
        listeners: Vec::new(),
        reactors: Vec::new(),
        unwatched_waits: None,
        deferred: Vec::new(),
        unmatched: 0,
        hooks: Vec::new(),
        gc: None,
    }
}

/// A snapshot with these processes.
pub(super) fn snapshot(targets: Vec<Target>) -> Snapshot {
    let own = Own { version: "0", kernel: "0".into(), ..Own::default() };
    Snapshot {
        schema: SCHEMA,
        started: String::new(),
        duration_seconds: 1.0,
        targets,
        workers: Vec::new(),
        own,
    }
}
