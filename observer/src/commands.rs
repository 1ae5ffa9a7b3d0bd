//! Subcommands that print what observer knows about this machine, its profiles and itself.

use std::{
    io::{Write as _, stdout},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Result;
use clap::{Command, CommandFactory as _};
use clap_complete::{Shell, generate};

use crate::{
    cli::Cli,
    export::reference,
    kernel::preflight,
    manual,
    probes::{Events, PROBES},
    process::{check, runtime::Runtimes},
    profiles::{self, PROFILES, Profile, ProfileSelection},
};

/// Prints which features this kernel, these rights and, if given, this process allow; where one fails, why and how to
/// fix it.
pub(crate) fn check(pid: Option<u32>, known: &ProfileSelection) -> Result<ExitCode> {
    let profiles = profiles::selected(known)?;
    let is_asked_for =
        |profile: &Arc<Profile>| profiles::is_asked_for(profile, profiles::are_automatic(known));
    let of_process =
        |pid| check::findings(pid, Runtimes::of_profiles(profiles.clone()).asked_for(is_asked_for));
    let mut out = stdout().lock();
    let mut can_run = true;
    for finding in preflight::findings().chain(pid.into_iter().flat_map(of_process)) {
        can_run &= !finding.prevents();
        finding.write(&mut out)?;
    }
    if can_run {
        writeln!(out, "observer can run here.")?;
        Ok(ExitCode::SUCCESS)
    } else {
        writeln!(out, "observer cannot run here: see each NO above.")?;
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

/// Writes a shell's completion script.
pub(crate) fn completions(shell: Shell) -> Result<ExitCode> {
    let all = Cli::command();
    // Hidden subcommands are not completed.
    let shown = all.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()).cloned();
    let mut command =
        Command::new("observer").version("").args(all.get_arguments().cloned()).subcommands(shown);
    let mut script = Vec::new();
    generate(shell, &mut command, "observer", &mut script);
    stdout().lock().write_all(&script)?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the manual page.
pub(crate) fn manual() -> Result<ExitCode> {
    manual::write(&mut stdout().lock())?;
    Ok(ExitCode::SUCCESS)
}
