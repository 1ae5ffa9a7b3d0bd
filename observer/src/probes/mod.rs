//! The probes: what each measures, what it hooks, what that costs. [`PROBES`] is the one table; each probe's file
//! also decodes what its programs leave in their maps.

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Btf, Ebpf,
    programs::{BtfTracePoint, Iter, ProgramError, RawTracePoint, TracePoint},
};

use crate::{kernel::tracefs, model::snapshot::Missing};

pub(crate) mod accept;
pub(crate) mod listener;
pub(crate) mod process;
pub(crate) mod reactor;

/// A probe.
pub(crate) struct Probe {
    /// Name of its file, here and on the kernel side.
    pub(crate) name: &'static str,
    /// What it tells.
    pub(crate) purpose: &'static str,
    /// First kernel release it runs on.
    pub(crate) since: &'static str,
    /// Who pays, and for which events.
    pub(crate) cost: &'static str,
    /// Its programs and where they are attached.
    pub(crate) hooks: &'static [Hook],
}

/// A program and where it is attached.
pub(crate) struct Hook {
    /// Name of the program.
    pub(crate) program: &'static str,
    /// Tracepoints it serves.
    pub(crate) events: Events,
}

/// Tracepoints of one kind.
pub(crate) enum Events {
    /// One whose arguments the verifier knows the types of.
    Btf(&'static str),
    /// Plain ones, as (category, name). The first must be there; others may be missing from a kernel.
    Plain(&'static [(&'static str, &'static str)]),
    /// None: the program is run when the loader wants it, over everything of this kind.
    Iterator(&'static str),
    /// None: the program is run when the loader wants it, with arguments.
    OnDemand,
}

/// How much of the verifier's log an error shows.
const VERIFIER_LINES: usize = 5;

/// All probes, in the order in which they are attached.
pub(crate) const PROBES: &[Probe] = &[process::PROBE, listener::PROBE, accept::PROBE, reactor::PROBE];

/// Loads and attaches every probe's programs. Tells which optional tracepoints the running kernel lacks.
/// What is attached stays so until `ebpf` is dropped.
pub(crate) fn attach(ebpf: &mut Ebpf) -> Result<Vec<Missing>> {
    let btf = Btf::from_sys_fs().context("cannot read the kernel's BTF")?;
    let mut missing = Vec::new();
    for hook in PROBES.iter().flat_map(|probe| probe.hooks) {
        let program =
            ebpf.program_mut(hook.program).with_context(|| format!("no program {}", hook.program))?;
        match hook.events {
            Events::Btf(event) => {
                let program: &mut BtfTracePoint = program.try_into()?;
                program.load(event, &btf).map_err(|error| rejected(hook, error))?;
                program.attach().with_context(|| format!("cannot attach to {event}"))?;
            }
            Events::Iterator(kind) => {
                let program: &mut Iter = program.try_into()?;
                program.load(kind, &btf).map_err(|error| rejected(hook, error))?;
            }
            Events::OnDemand => {
                let program: &mut RawTracePoint = program.try_into()?;
                program.load().map_err(|error| rejected(hook, error))?;
            }
            Events::Plain(events) => {
                let program: &mut TracePoint = program.try_into()?;
                program.load().map_err(|error| rejected(hook, error))?;
                for (n, (category, name)) in events.iter().enumerate() {
                    let event = format!("{category}/{name}");
                    if n > 0 && !tracefs::has(&event) {
                        let reason = "this kernel has no such tracepoint".into();
                        missing.push(Missing { source: event, reason });
                        continue;
                    }
                    program.attach(category, name).with_context(|| format!("cannot attach to {event}"))?;
                }
            }
        }
    }
    Ok(missing)
}

/// The verifier explains itself at length; the end of it is what matters, the whole of it is for `-v`.
fn rejected(hook: &Hook, error: ProgramError) -> anyhow::Error {
    let error = match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            log::debug!("the verifier on {}:\n{log}", hook.program);
            let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
            let end = lines[lines.len().saturating_sub(VERIFIER_LINES)..].join("\n  ");
            anyhow!("{io_error}; the verifier's last words (all of them with -v):\n  {end}")
        }
        other => other.into(),
    };
    error.context(format!("the kernel rejects the program {}", hook.program))
}
