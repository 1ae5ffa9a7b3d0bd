//! The container, pod or service of a process. Only what is certain is reported, so that delays are not attributed to
//! the wrong workload.

use serde::Serialize;

/// The container, pod or service of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Workload {
    /// Id of its container, 64 hexadecimal digits; `None` if it is in none.
    pub(crate) container: Option<String>,
    /// Its pod; `None` if it is in none.
    pub(crate) kubernetes: Option<Pod>,
    /// Its systemd service; `None` if it is in a container, or in no service.
    pub(crate) unit: Option<String>,
}

/// A pod, with the container of the process in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct Pod {
    /// Namespace; `None` if it cannot be found on this node.
    pub(crate) namespace: Option<String>,
    /// Name; known if and only if the namespace is.
    #[serde(rename = "pod")]
    pub(crate) name: Option<String>,
    /// Name of the container in the pod; `None` if it cannot be found on this node.
    pub(crate) container: Option<String>,
    /// The pod's UID; for a static pod, the 32 digits of the hash of its configuration.
    pub(crate) uid: String,
}
