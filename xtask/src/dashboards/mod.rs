//! The Grafana dashboards: described compactly here and in the files beside, written as JSON into `dashboards/`.
//! Every panel has a unit and says what it shows; every query is bound to the data source and the job of its dashboard.

mod dashboard;
mod accept_queue;
mod deferred_work;
mod fleet;
mod reactor;

use std::fs;

use self::dashboard::Dashboard;
use crate::workspace::root;
use anyhow::{Context, Result};

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
