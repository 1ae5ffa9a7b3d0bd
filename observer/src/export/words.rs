//! Words and numbers as people read them, in the report and in the live view alike.

use observer_common::block::Block;

use crate::model::{busy::Cause, place::Place, request::Request, snapshot::Reactor};

/// Digits of a container's id that are enough for people, as `docker ps` shows it.
const SHORT_ID: usize = 12;

/// `reactor (thread 16451)`.
pub(crate) fn reactor_name(reactor: &Reactor) -> String {
    if reactor.name.is_empty() {
        format!("in thread {}", reactor.tid)
    } else {
        format!("{} (thread {})", reactor.name, reactor.tid)
    }
}

/// `, container 0123456789ab`, `, container web (0123456789ab) of pod shop/web-0`, `, nginx.service`; empty if it belongs
/// nowhere.
pub(crate) fn place(place: &Place) -> String {
    let Place { container, kubernetes, unit } = place;
    let id = container.as_deref().map(|id| format!("{id:.SHORT_ID$}"));
    let Some(pod) = kubernetes else {
        let container = id.map(|id| format!(", container {id}"));
        return container.or_else(|| Some(format!(", {}", unit.as_ref()?))).unwrap_or_default();
    };
    let pod_name = match (&pod.namespace, &pod.name) {
        (Some(namespace), Some(name)) => format!("pod {namespace}/{name}"),
        _ => format!("pod {}", pod.uid),
    };
    match (&pod.container, id) {
        (Some(name), Some(id)) => format!(", container {name} ({id}) of {pod_name}"),
        (None, Some(id)) => format!(", container {id} of {pod_name}"),
        (_, None) => format!(", {pod_name}"),
    }
}

/// `GET /job/7`, or when it came, if nothing else is known.
pub(crate) fn request_name(request: &Request) -> String {
    match (&request.method, &request.path) {
        (Some(method), Some(path)) => format!("{method} {path}"),
        _ => format!("a request at {}", request.time),
    }
}

/// ` for GET /job/7, GET /job/3 and others`, the latest of some requests first; empty if there is none.
pub(crate) fn due_to(requests: &[&Request]) -> String {
    /// Of different ones so many are named.
    const NAMED: usize = 3;
    let mut names = Vec::new();
    for name in requests.iter().rev().map(|request| request_name(request)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    if names.is_empty() {
        return String::new();
    }
    let others = if names.len() > NAMED { " and others" } else { "" };
    names.truncate(NAMED);
    format!(" for {}{others}", names.join(", "))
}

/// What people call it.
pub(crate) const fn named(cause: Cause) -> &'static str {
    match cause {
        Cause::Cpu => "on a CPU",
        Cause::Runqueue => "waiting for a CPU",
        Cause::Blocked(Block::Lock) => "blocked by a lock",
        Cause::Blocked(Block::Disk) => "blocked by files",
        Cause::Blocked(Block::Network) => "blocked by the network",
        Cause::Blocked(Block::Sleep) => "asleep",
        Cause::Blocked(Block::PageFault) => "blocked by page faults",
        Cause::Blocked(Block::Other) => "blocked by something else",
        Cause::Gc => "collecting garbage",
    }
}

/// A share with its sign.
pub(crate) fn percent(ratio: f64) -> String {
    format!("{:.1} %", ratio * 100.0)
}

/// A duration with three significant digits in the unit that suits it.
pub(crate) fn span(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s => (s * 1e6, "us"),
    };
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::place::Pod;

    #[test]
    fn requests_are_told_by_the_latest() {
        let request = |path: &str| Request {
            method: Some("GET".into()),
            path: Some(path.into()),
            ..Request::default()
        };
        let (one, other, more, last) = (request("/1"), request("/2"), request("/3"), request("/4"));
        assert_eq!(due_to(&[]), "");
        assert_eq!(due_to(&[&one, &one]), " for GET /1");
        assert_eq!(due_to(&[&one, &other, &one]), " for GET /1, GET /2");
        assert_eq!(due_to(&[&one, &other, &more, &last]), " for GET /4, GET /3, GET /2 and others");
        let unknown = Request { time: "2026-11-24T12:00:00Z".into(), ..Request::default() };
        assert_eq!(due_to(&[&unknown]), " for a request at 2026-11-24T12:00:00Z");
    }

    #[test]
    fn places_are_told_by_name_as_far_as_they_have_one() {
        assert_eq!(place(&Place::default()), "");
        let unit = Place { unit: Some("nginx.service".into()), ..Place::default() };
        assert_eq!(place(&unit), ", nginx.service");
        let mut container = Place { container: Some("0123456789abcdef".into()), ..Place::default() };
        assert_eq!(place(&container), ", container 0123456789ab");
        let mut pod = Pod { uid: "8f2d".into(), ..Pod::default() };
        container.kubernetes = Some(pod.clone());
        assert_eq!(place(&container), ", container 0123456789ab of pod 8f2d");
        (pod.namespace, pod.name) = (Some("shop".into()), Some("web-0".into()));
        container.kubernetes = Some(pod.clone());
        assert_eq!(place(&container), ", container 0123456789ab of pod shop/web-0");
        pod.container = Some("web".into());
        container.kubernetes = Some(pod);
        assert_eq!(place(&container), ", container web (0123456789ab) of pod shop/web-0");
        container.container = None;
        assert_eq!(place(&container), ", pod shop/web-0");
    }

    #[test]
    fn durations_are_short_and_have_a_unit() {
        assert_eq!(span(0.0), "0.00 us");
        assert_eq!(span(0.000_001_5), "1.50 us");
        assert_eq!(span(0.012_34), "12.3 ms");
        assert_eq!(span(0.120_4), "120 ms");
        assert_eq!(span(15.02), "15.0 s");
        assert_eq!(span(900.0), "900 s");
    }
}
