//! The small commands: `check` and `probes`.

use std::{
    io::{Write as _, stdout},
    process::ExitCode,
};

use anyhow::Result;

use crate::{
    kernel::{features::FEATURES, preflight::REQUIREMENTS},
    probes::{Events, PROBES},
};

/// Prints what this kernel and these rights allow, each no with its reason and its cure.
pub(crate) fn check() -> ExitCode {
    let mut can_run = true;
    for requirement in REQUIREMENTS {
        if requirement.is_met() {
            println!("yes  {:<28} {}", requirement.name, requirement.purpose);
        } else {
            can_run = false;
            println!("NO   {:<28} {}", requirement.name, requirement.purpose);
            println!("     {:<28} cure: {}", "", requirement.cure);
        }
    }
    for feature in FEATURES {
        match feature.probe() {
            Ok(()) => println!("yes  {:<28} {}", feature.name, feature.purpose),
            Err(reason) => {
                can_run &= !feature.required;
                let verdict = if feature.required { "NO " } else { "no " };
                println!(
                    "{verdict}  {:<28} {} (since Linux {})",
                    feature.name, feature.purpose, feature.since
                );
                println!("     {:<28} reason: {reason}", "");
            }
        }
    }
    if can_run {
        println!("observer can do its main job here.");
        ExitCode::SUCCESS
    } else {
        println!("observer cannot do its main job here.");
        ExitCode::FAILURE
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
                Events::Btf(event) => event.to_owned(),
                Events::Plain(events) => events.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(", "),
            };
            writeln!(out, "  hook    {:<14} on {events}", hook.program)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
