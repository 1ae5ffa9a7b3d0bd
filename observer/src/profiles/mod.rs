//! What differs between runtimes, as data: one file for each in `observer/profiles`, all of which are embedded, and
//! users' own. How a runtime is recognised, where its garbage collector can be watched, and how it puts work off.

mod expression;
mod hook;
mod profile;
pub(crate) mod generic;
mod selection;

pub(crate) use expression::{Hop, Operand, Path as Steps, Test};
pub(crate) use hook::{At, Case, Hook, Site, Table};
pub(crate) use profile::{Collector, Functions, Profile, Totals, Usdt, VersionKind};
pub(crate) use selection::{PROFILES, ProfileSelection, are_automatic, insistence, is_asked_for, selected};
