//! Where a process belongs: its container, its pod, its service. Only what is certain is told, so that nobody is blamed
//! for another's delays.

use serde::Serialize;

/// Where a process belongs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Place {
    /// Id of the container it is in, 64 hexadecimal digits; `None` if it is in none.
    pub(crate) container: Option<String>,
    /// The pod it is in; `None` if it is in none.
    pub(crate) kubernetes: Option<Pod>,
    /// The service of systemd's that it is part of; `None` if it is in a container or part of none.
    pub(crate) unit: Option<String>,
}

/// A pod, and which of its containers it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Pod {
    /// Its namespace, as far as the node tells.
    pub(crate) namespace: Option<String>,
    /// Its name, known together with its namespace.
    #[serde(rename = "pod")]
    pub(crate) name: Option<String>,
    /// Name of the container within it, as far as the node tells.
    pub(crate) container: Option<String>,
    /// What its kubelet calls it: its UID, or for a static pod the 32 digits of its configuration's hash.
    pub(crate) uid: String,
}
