//! What the tests of this folder share.

use std::time::Duration;

use super::settings::{Endpoint, Settings};
use crate::{
    cli::Protocol,
    model::snapshot::{Own, SCHEMA, Snapshot, Target},
};

/// A collector that nobody asks.
pub(super) fn settings() -> Settings {
    Settings {
        metrics: Endpoint {
            uri: "http://127.0.0.1:1/v1/metrics".parse().unwrap(),
            protocol: Protocol::HttpProtobuf,
            headers: http::HeaderMap::new(),
            timeout: Duration::from_secs(10),
            gzip: false,
            certificate: None,
            client: None,
            hint: "",
        },
        interval: Duration::from_secs(60),
        attributes: Vec::new(),
        service_name: None,
    }
}

/// A process without anything to tell.
pub(super) fn target(pid: u32) -> Target {
    Target {
        pid,
        comm: "app".into(),
        exe: "/usr/bin/app".into(),
        container: None,
        exited: false,
        listeners: Vec::new(),
        reactors: Vec::new(),
        deferred: Vec::new(),
        unmatched: 0,
        hooks: Vec::new(),
        gc: None,
    }
}

/// A moment with these processes.
pub(super) fn snapshot(targets: Vec<Target>) -> Snapshot {
    let own =
        Own { version: "0", kernel: "0".into(), lost: Vec::new(), missing: Vec::new(), otlp: Vec::new() };
    Snapshot { schema: SCHEMA, started: String::new(), duration_seconds: 1.0, targets, own }
}
