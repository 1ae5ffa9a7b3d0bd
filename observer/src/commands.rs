//! The small commands: `check`, `probes`, `profiles` and `metrics`.

use std::{
    io::{Write as _, stdout},
    process::ExitCode,
};

use anyhow::Result;

use crate::{
    export::reference,
    kernel::{features::FEATURES, preflight::REQUIREMENTS},
    probes::{Events, PROBES},
    profiles::PROFILES,
};

/// Prints what this kernel and these rights allow, each no with its reason and its cure.
pub(crate) fn check() -> Result<ExitCode> {
    let mut out = stdout().lock();
    let mut can_run = true;
    for requirement in REQUIREMENTS {
        if requirement.is_met() {
            writeln!(out, "yes  {:<28} {}", requirement.name, requirement.purpose)?;
        } else {
            can_run = false;
            writeln!(out, "NO   {:<28} {}", requirement.name, requirement.purpose)?;
            writeln!(out, "     {:<28} cure: {}", "", requirement.cure)?;
        }
    }
    for feature in FEATURES {
        match feature.probe() {
            Ok(()) => writeln!(out, "yes  {:<28} {}", feature.name, feature.purpose)?,
            Err(reason) => {
                can_run &= !feature.required;
                let verdict = if feature.required { "NO " } else { "no " };
                writeln!(
                    out,
                    "{verdict}  {:<28} {} (since Linux {})",
                    feature.name, feature.purpose, feature.since
                )?;
                writeln!(out, "     {:<28} reason: {reason}", "")?;
            }
        }
    }
    if can_run {
        writeln!(out, "observer can do its main job here.")?;
        Ok(ExitCode::SUCCESS)
    } else {
        writeln!(out, "observer cannot do its main job here.")?;
        Ok(ExitCode::FAILURE)
    }
}

/// Lists the probes.
pub(crate) fn probes() -> Result<ExitCode> {
    let mut out = stdout().lock();
    for probe in PROBES {
        writeln!(out, "{}: {}", probe.name, probe.purpose)?;
        writeln!(out, "  kernel  {} or newer", probe.since)?;
        writeln!(out, "  cost    {}", probe.cost)?;
        for hook in probe.hooks {
            let events = match hook.events {
                Events::Btf(names) => names.join(" or "),
                Events::Iterator(kind) => format!("demand, for every {}", kind.replace('_', "'s ")),
                Events::OnDemand => "demand".into(),
                Events::Runtime(place) => place.to_owned(),
                Events::Waits(calls, names) => {
                    format!("{} (--reactor-calls {calls})", names.join(", "))
                }
                Events::Plain(events) => events.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", "),
            };
            writeln!(out, "  hook    {:<14} on {events}", hook.program)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Lists the profiles.
pub(crate) fn profiles() -> Result<ExitCode> {
    let mut out = stdout().lock();
    for profile in PROFILES.iter() {
        writeln!(out, "{}: {}", profile.name, profile.about)?;
        writeln!(out, "  where   a module defines {}", profile.marker.as_slice().join(" or "))?;
        if let Some(needs) = &profile.needs {
            writeln!(out, "          and {needs} is loaded")?;
        }
        if profile.gc.is_some() {
            writeln!(out, "  gc      watched")?;
        }
        for hook in &profile.hooks {
            writeln!(out, "  hook    {:<10} {}{}", hook.verb_name(), hook.place(), hook.versions())?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the reference page of all metrics.
pub(crate) fn metrics() -> Result<ExitCode> {
    reference::write(&mut stdout().lock())?;
    Ok(ExitCode::SUCCESS)
}
