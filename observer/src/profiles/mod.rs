//! Profiles: what differs between runtimes, as data. A profile describes how a runtime is recognised, how its garbage
//! collector is watched, and how it defers tasks. Built-in profiles are in `observer/profiles`; users can add their
//! own. The named frames of an interpreter are code, in `stacks/interpreter.rs`.

mod expression;
mod hook;
mod profile;
pub(crate) mod generic;
mod selection;

pub(crate) use expression::{Hop, Operand, Path as Steps, Test};
pub(crate) use hook::{At, Case, Hook, Site, Table};
pub(crate) use profile::{Collector, Functions, Profile, Totals, Usdt, VersionKind};
pub(crate) use selection::{
    PROFILES, ProfileSelection, are_automatic, flag_to_force, is_asked_for, selected,
};
