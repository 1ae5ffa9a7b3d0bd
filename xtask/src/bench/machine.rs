//! What the figures are figures of: the machine, its kernel, and the versions of everything that runs.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use duct::{Expression, cmd};
use procfs::Current;
use procfs::process::Process;

use super::part::Cpus;
use crate::shell::ask;
use crate::workspace::root;

/// What all figures of a run have in common.
pub(super) struct Machine {
    pub(super) date: String,
    /// Its version and commit.
    pub(super) observer: String,
    pub(super) others: Vec<(&'static str, String)>,
}

/// A program of observer's, and the probe it belongs to.
pub(super) struct Hook {
    pub(super) probe: String,
    pub(super) program: String,
    /// The first of the events that it is attached to.
    pub(super) event: String,
}

/// Two of the CPUs that we may use, if there are two.
pub(super) fn cpus() -> Result<Cpus> {
    let allowed = Process::myself()?.status()?.cpus_allowed_list.context("the kernel lists no CPUs")?;
    let mut allowed = allowed.into_iter().flat_map(|(first, last)| first..=last);
    Ok(match (allowed.next(), allowed.next()) {
        (Some(server), Some(load)) => Cpus { server: Some(server), load: Some(load) },
        _ => Cpus { server: None, load: None },
    })
}

pub(super) fn describe(observer: &Path, cpus: Cpus) -> Result<Machine> {
    let cpu = procfs::CpuInfo::current()?;
    let model = cpu.model_name(0).unwrap_or("of unknown model").to_owned();
    let is_virtual = cpu.flags(0).is_some_and(|flags| flags.contains(&"hypervisor"));
    let gibibytes = procfs::Meminfo::current()?.mem_total as f64 / f64::from(1 << 30);
    let load = procfs::LoadAverage::current()?;
    let kind = if is_virtual { ", a virtual machine" } else { "" };
    let apart = match (cpus.server, cpus.load) {
        (Some(server), Some(load)) => format!("servers on CPU {server}, load on CPU {load}"),
        _ => "servers and load share what there is".to_owned(),
    };
    let counting = fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").unwrap_or_default();
    let counting = if counting.trim() == "0" { "off" } else { "ON: it slows all programs down" };
    let commit = version(&cmd!("git", "describe", "--always", "--dirty").dir(root()));
    let binary = fs::metadata(observer)?.len() as f64 / 1e6;
    Ok(Machine {
        date: version(&cmd!("date", "-u", "+%F %H:%M UTC")),
        observer: format!("{}, commit {commit}, {binary:.1} MB", version(&cmd!(observer, "--version"))),
        others: vec![
            ("CPU", format!("{model}, {} of them{kind}", cpu.num_cores())),
            ("memory", format!("{gibibytes:.0} GiB")),
            ("kernel", version(&cmd!("uname", "-sr"))),
            ("load before the start", format!("{} over a minute", load.one)),
            ("`kernel.bpf_stats_enabled` but while programs are counted", counting.to_owned()),
            ("CPUs", apart),
        ],
    })
}

/// A table of it, and of what else took part.
pub(super) fn rows(machine: &Machine, versions: &[(&str, String)]) -> Vec<Vec<String>> {
    let Machine { date, observer, others } = machine;
    let all = [("date", date), ("observer", observer)].into_iter();
    let all = all.chain(others.iter().chain(versions).map(|(name, value)| (*name, value)));
    all.map(|(name, value)| vec![name.to_owned(), value.clone()]).collect()
}

/// Everything that parts run beside observer.
pub(super) fn versions() -> Vec<(&'static str, String)> {
    vec![
        ("bpftrace", version(&cmd!("bpftrace", "--version"))),
        ("nginx", version(&cmd!("nginx", "-v"))),
        ("Redis", version(&cmd!("redis-server", "--version"))),
        ("Node.js", version(&cmd!("node", "--version"))),
        ("Python", version(&cmd!("/usr/bin/python3", "--version"))),
        ("Ruby", version(&cmd!("/usr/bin/ruby", "--version"))),
        ("wrk", version(&cmd!("wrk", "-v"))),
    ]
}

/// The first line that a program says of itself, some of them as if it were an error, without what it adds.
fn version(command: &Expression) -> String {
    let answer = ask(&command.stderr_to_stdout().unchecked()).unwrap_or_default();
    let line = answer.lines().next().unwrap_or("unknown");
    let ends = [" sha=", " ["].map(|added| line.find(added).unwrap_or(line.len()));
    line[..ends[0].min(ends[1])].trim().to_owned()
}

/// observer's programs in the order in which it lists them.
pub(super) fn probes(observer: &Path) -> Result<Vec<Hook>> {
    let list = ask(&cmd!(observer, "probes")).context("observer does not list its probes")?;
    let mut probe = "";
    let mut hooks = Vec::new();
    for line in list.lines() {
        if let Some(hook) = line.strip_prefix("  hook") {
            let mut words = hook.split([' ', ',']).filter(|word| !matches!(*word, "" | "on"));
            let mut word = || words.next().unwrap_or_default().to_owned();
            hooks.push(Hook { probe: probe.to_owned(), program: word(), event: word() });
        } else if let Some((name, _)) = line.split_once(':')
            && !line.starts_with(' ')
        {
            probe = name;
        }
    }
    Ok(hooks)
}
