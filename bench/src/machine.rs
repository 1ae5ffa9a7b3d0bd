//! Describes the machine, its kernel, and the versions of all programs that take part.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use procfs::Current;
use procfs::process::Process;

use crate::part::Cpus;
use crate::process::output;

pub(crate) struct Machine {
    pub(crate) date: String,
    /// Version, commit and size of observer.
    pub(crate) observer: String,
    pub(crate) others: Vec<(&'static str, String)>,
}

/// An eBPF program of observer, and its probe.
pub(crate) struct Hook {
    pub(crate) probe: String,
    pub(crate) program: String,
    /// The first event that the program is attached to.
    pub(crate) event: String,
}

/// The first two CPUs that this process may use, if there are two.
pub(crate) fn cpus() -> Result<Cpus> {
    let allowed = Process::myself()?.status()?.cpus_allowed_list.context("the kernel lists no CPUs")?;
    let mut allowed = allowed.into_iter().flat_map(|(first, last)| first..=last);
    Ok(match (allowed.next(), allowed.next()) {
        (Some(server), Some(load)) => Cpus { server: Some(server), load: Some(load) },
        _ => Cpus { server: None, load: None },
    })
}

pub(crate) fn describe(observer: &Path, cpus: Cpus) -> Result<Machine> {
    let cpu = procfs::CpuInfo::current()?;
    let model = cpu.model_name(0).unwrap_or("unknown model").to_owned();
    let is_virtual = cpu.flags(0).is_some_and(|flags| flags.contains(&"hypervisor"));
    let gibibytes = procfs::Meminfo::current()?.mem_total as f64 / f64::from(1 << 30);
    let load = procfs::LoadAverage::current()?;
    let kind = if is_virtual { ", virtual machine" } else { "" };
    let pinning = match (cpus.server, cpus.load) {
        (Some(server), Some(load)) => format!("servers on CPU {server}, load generators on CPU {load}"),
        _ => "servers and load generators share all CPUs".to_owned(),
    };
    let counting = fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled").unwrap_or_default();
    let counting = if counting.trim() == "0" { "off" } else { "ON: it slows all programs down" };
    let commit = version("git", &["describe", "--always", "--dirty"]);
    let binary = fs::metadata(observer).with_context(|| format!("cannot read {}", observer.display()))?;
    let megabytes = binary.len() as f64 / 1e6;
    let observer = version(observer.to_str().context("the path of observer is not UTF-8")?, &["--version"]);
    Ok(Machine {
        date: version("date", &["-u", "+%F %H:%M UTC"]),
        observer: format!("{observer}, commit {commit}, {megabytes:.1} MB"),
        others: vec![
            ("CPU", format!("{model}, {} CPUs{kind}", cpu.num_cores())),
            ("memory", format!("{gibibytes:.0} GiB")),
            ("kernel", version("uname", &["-sr"])),
            ("load average before the start", format!("{} over 1 minute", load.one)),
            ("`kernel.bpf_stats_enabled`, except while run times are counted", counting.to_owned()),
            ("CPU pinning", pinning),
        ],
    })
}

/// The rows of a table with the machine and these versions.
pub(crate) fn rows(machine: &Machine, versions: &[(&str, String)]) -> Vec<Vec<String>> {
    let Machine { date, observer, others } = machine;
    let all = [("date", date), ("observer", observer)].into_iter();
    let all = all.chain(others.iter().chain(versions).map(|(name, value)| (*name, value)));
    all.map(|(name, value)| vec![name.to_owned(), value.clone()]).collect()
}

/// Versions of the programs that the benchmark runs, except observer.
pub(crate) fn versions() -> Vec<(&'static str, String)> {
    vec![
        ("bpftrace", version("bpftrace", &["--version"])),
        ("nginx", version("nginx", &["-v"])),
        ("Redis", version("redis-server", &["--version"])),
        ("Node.js", version("node", &["--version"])),
        ("Python", version("/usr/bin/python3", &["--version"])),
        ("Ruby", version("/usr/bin/ruby", &["--version"])),
        ("wrk", version("wrk", &["-v"])),
    ]
}

/// The first line that a program prints, without build details. Some programs print their version to stderr and fail.
fn version(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output();
    let text = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().next().unwrap_or("unknown");
    let ends = [" sha=", " ["].map(|detail| line.find(detail).unwrap_or(line.len()));
    line[..ends[0].min(ends[1])].trim().to_owned()
}

/// The eBPF programs of observer, in the order in which `observer probes` lists them.
pub(crate) fn hooks(observer: &Path) -> Result<Vec<Hook>> {
    let list = output(Command::new(observer).arg("probes")).context("observer does not list its probes")?;
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
