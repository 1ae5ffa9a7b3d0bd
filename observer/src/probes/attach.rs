//! Loads and attaches the programs that observe the whole machine. Functions of a target are attached to by
//! `observation/runtimes.rs`.

use std::{
    collections::HashMap,
    fs::File,
    panic::resume_unwind,
    sync::{Mutex, OnceLock, PoisonError},
    thread,
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Btf, BtfError, Ebpf,
    programs::{BtfTracePoint, Iter, Program, ProgramError, RawTracePoint, TracePoint, UProbe},
};
use nix::libc;

use super::probe::{Events, Hook, Probe};
use crate::{kernel::tracefs, model::snapshot::Missing, process::wait_call::WaitCall};

/// Number of lines at the end of the verifier's log that an error shows.
const VERIFIER_LINES: usize = 5;

/// Maximum number of programs loaded in parallel: the verifier needs a CPU for each.
const MAX_LOADERS: usize = 4;

/// The kernel's BTF, read at most once, and only if a program needs it: that takes tens of megabytes and of
/// milliseconds. The lock makes other loaders wait while it is read.
#[derive(Default)]
pub(crate) struct Types(OnceLock<Btf>, Mutex<()>);

impl Types {
    fn get(&self) -> Result<&Btf, ProgramError> {
        let _guard = self.1.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(btf) = self.0.get() {
            return Ok(btf);
        }
        let btf = Btf::from_sys_fs()?;
        Ok(self.0.get_or_init(|| btf))
    }
}

/// Loads and attaches the programs of these probes; of waits for events, only those for `calls`. Returns the optional
/// tracepoints that the running kernel lacks. Programs stay attached until `ebpf` is dropped.
pub(crate) fn attach<'p>(
    ebpf: &mut Ebpf,
    types: &Types,
    probes: impl Iterator<Item = &'p Probe> + Clone,
    calls: &[WaitCall],
) -> Result<Vec<Missing>> {
    let hooks = probes.flat_map(|probe| probe.hooks);
    let wanted = hooks.filter(|hook| !matches!(hook.events, Events::Waits(of, _) if !calls.contains(&of)));
    // All programs are loaded before any is attached, so that they start at nearly the same time.
    load_all(ebpf, wanted.clone().collect(), types)?;
    let mut missing = Vec::new();
    for hook in wanted {
        let program = program(ebpf, hook)?;
        match hook.events {
            Events::Btf(names) => {
                let program: &mut BtfTracePoint = program.try_into()?;
                program.attach().with_context(|| format!("cannot attach to {}", names[0]))?;
            }
            Events::Plain(events) => {
                for (n, (category, name)) in events.iter().enumerate() {
                    attach_plain(program.try_into()?, category, name, n > 0, &mut missing)?;
                }
            }
            Events::Waits(_, names) => {
                for name in names {
                    attach_plain(program.try_into()?, "syscalls", name, true, &mut missing)?;
                }
            }
            Events::Iterator(_) | Events::OnDemand | Events::Runtime(_) => {}
        }
    }
    Ok(missing)
}

/// Loads the programs of these hooks in parallel: the verifier takes nearly all of the start-up time.
fn load_all(ebpf: &mut Ebpf, hooks: Vec<&Hook>, types: &Types) -> Result<()> {
    let mut programs: HashMap<&str, &mut Program> = ebpf.programs_mut().collect();
    let pairs = hooks.into_iter().map(|hook| {
        let program = programs.remove(hook.program);
        Ok((hook, program.with_context(|| format!("the eBPF object has no program {}", hook.program))?))
    });
    let pairs: Vec<_> = pairs.collect::<Result<_>>()?;
    let loaders =
        thread::available_parallelism().map_or(1, |cpus| cpus.get().min(MAX_LOADERS)).min(pairs.len());
    let pairs = Mutex::new(pairs.into_iter());
    let next = || pairs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let load_some = || {
        while let Some((hook, program)) = next() {
            load(program, hook, types).map_err(|error| load_error(hook, error))?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let loaders: Vec<_> = (0..loaders).map(|_| scope.spawn(load_some)).collect();
        let loaded =
            loaders.into_iter().map(|loader| loader.join().unwrap_or_else(|panic| resume_unwind(panic)));
        loaded.collect()
    })
}

/// Loads a program for the first name of the tracepoint that this kernel has.
fn load_for_first(
    program: &mut BtfTracePoint,
    names: &[&'static str],
    btf: &Btf,
) -> Result<(), ProgramError> {
    let (last, newer) = names.split_last().expect("a tracepoint has a name");
    for name in newer {
        match program.load(name, btf) {
            Err(ProgramError::Btf(BtfError::UnknownBtfTypeName { .. })) => {}
            loaded => return loaded,
        }
    }
    program.load(last, btf)
}

fn program<'e>(ebpf: &'e mut Ebpf, hook: &Hook) -> Result<&'e mut Program> {
    ebpf.program_mut(hook.program).with_context(|| format!("the eBPF object has no program {}", hook.program))
}

fn load(program: &mut Program, hook: &Hook, types: &Types) -> Result<(), ProgramError> {
    match hook.events {
        Events::Btf(names) => load_for_first(program.try_into()?, names, types.get()?),
        Events::Iterator(kind) => TryInto::<&mut Iter>::try_into(program)?.load(kind, types.get()?),
        Events::OnDemand => TryInto::<&mut RawTracePoint>::try_into(program)?.load(),
        Events::Runtime(_) => TryInto::<&mut UProbe>::try_into(program)?.load(),
        Events::Plain(_) | Events::Waits(..) => TryInto::<&mut TracePoint>::try_into(program)?.load(),
    }
}

/// Attaches to a plain tracepoint. If it is optional and the running kernel lacks it, adds it to `missing`.
fn attach_plain(
    program: &mut TracePoint,
    category: &str,
    name: &str,
    is_optional: bool,
    missing: &mut Vec<Missing>,
) -> Result<()> {
    let event = format!("{category}/{name}");
    if is_optional && !tracefs::has(&event) {
        missing.push(Missing { source: event, reason: "this kernel has no such tracepoint".into() });
        return Ok(());
    }
    let attached = program.attach(category, name).map_err(|error| {
        // aya searches tracefs on each call, and reports it as missing if no file can be opened any more.
        File::open("/dev/null").map_or_else(anyhow::Error::new, |_| error.into())
    });
    attached.with_context(|| format!("cannot attach to {event}")).map(drop)
}

/// Describes a failure to load. The verifier's log is long: the error shows its end, and `-v` all of it.
fn load_error(hook: &Hook, error: ProgramError) -> anyhow::Error {
    let error = match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            // With other error codes, the verifier has accepted the program.
            let is_verifier_error = !matches!(
                io_error.raw_os_error(),
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EINTR)
            );
            if log.trim().is_empty() || !is_verifier_error {
                return anyhow::Error::new(io_error)
                    .context(format!("the kernel cannot load the program {}", hook.program));
            }
            log::debug!("verifier log of {}:\n{log}", hook.program);
            let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
            let end = lines[lines.len().saturating_sub(VERIFIER_LINES)..].join("\n  ");
            anyhow!("{io_error}; end of the verifier log (-v shows all of it):\n  {end}")
        }
        other => other.into(),
    };
    error.context(format!("the kernel rejects the program {}", hook.program))
}
