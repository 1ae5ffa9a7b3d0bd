//! Boots a guest in QEMU and returns its exit status. Emulated if KVM is unavailable.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use duct::cmd;

use crate::kernel::{Kernel, Series};
use crate::shell::{find, limited, show};
use crate::{guest, observer, packages};

const QEMU: &str = "qemu-system-x86_64";
/// Longer than any test run takes in an emulated guest.
const LIMIT: Duration = Duration::from_secs(75 * 60);

/// How the clock of a guest advances.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clock {
    /// As fast as the clock of this machine.
    Real,
    /// By a nanosecond for each instruction that is emulated on its only CPU.
    Instructions,
}

/// Result of running a guest.
pub(crate) struct Outcome {
    /// Exit status of the command; `None` if the guest crashed, hung or timed out.
    pub(crate) status: Option<u8>,
    /// Console output.
    pub(crate) output: String,
    /// Content of the requested file; empty if the command did not write it.
    pub(crate) file: String,
}

/// `xtask vm`: runs a command, or a shell, in a guest.
pub(crate) fn enter(series: Series, command: &[String]) -> Result<ExitCode> {
    let observer = observer::build()?;
    packages::install(&packages::for_guests())?;
    let kernel = series.kernel()?;
    let mut image = guest::image(&observer, &kernel)?;
    if let Some(program) = command.first() {
        if let Some(path) = find(program) {
            image.add_program(&path);
        }
        let words = command.iter().map(String::as_str);
        let line = shlex::try_join(words).context("an argument contains a NUL byte")?;
        guest::set_command(&mut image, &line, None)?;
    }
    let image = image.write()?;
    let status = if command.is_empty() {
        eprintln!("vm: Linux {series}; leave with `exit`, or with Ctrl-A X");
        let report = tempfile::tempfile()?;
        cmd(QEMU, arguments(&kernel, &image, &report, Clock::Real, "mon:stdio")).unchecked().run()?;
        read(report).status
    } else {
        run(&kernel, &image, Clock::Real, "")?.status
    };
    match status {
        Some(status) => Ok(status.into()),
        None => bail!("the guest crashed, hung or timed out\nby hand: see the last lines of its console"),
    }
}

/// Boots a guest that runs the command in its image. Its console is shown live, with a prefix for each line.
pub(crate) fn run(kernel: &Kernel, image: &File, clock: Clock, prefix: &str) -> Result<Outcome> {
    let report = tempfile::tempfile()?;
    let shown = show(&limited(LIMIT, QEMU, arguments(kernel, image, &report, clock, "stdio")), prefix)?;
    Ok(Outcome { output: shown.output, ..read(report) })
}

/// Parses what the guest sent: the requested file, if any, then the exit status on a line of its own.
fn read(report: File) -> Outcome {
    let text = io::read_to_string(report).unwrap_or_default();
    let (file, status) = text.trim_end().rsplit_once('\n').unwrap_or(("", text.trim()));
    Outcome { status: status.trim().parse().ok(), output: String::new(), file: file.to_owned() }
}

fn arguments(kernel: &Kernel, image: &File, report: &File, clock: Clock, console: &str) -> Vec<OsString> {
    // No graphics, network card or disks, because probing each takes boot time.
    let machine = "-no-user-config -nodefaults -display none -no-reboot -M q35 -cpu max -m 2048";
    let clock_options = match clock {
        Clock::Real => " -smp 2",
        Clock::Instructions => " -smp 1 -icount shift=0,sleep=off",
    };
    let mut arguments: Vec<OsString> =
        machine.split(' ').chain(clock_options.split_whitespace()).map(Into::into).collect();
    if clock == Clock::Real && has_kvm() {
        arguments.extend(["-accel", "kvm"].map(Into::into));
    }
    // A guest that hangs panics with a stack trace instead of blocking the run until the time limit.
    let options = "console=ttyS0 quiet panic=-1 softlockup_panic=1";
    arguments.extend(["-accel", "tcg,thread=single", "-append", options].map(Into::into));
    arguments.extend(["-kernel".into(), (&kernel.image).into(), "-initrd".into(), name(image).into()]);
    arguments.extend([
        "-serial".into(),
        console.into(),
        "-serial".into(),
        format!("file:{}", name(report)).into(),
    ]);
    arguments
}

/// Path of an unnamed file. Such files disappear however this process ends.
fn name(file: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

/// KVM inside a virtual machine may appear to work and then fail at some instruction, so it is not used there.
fn has_kvm() -> bool {
    let is_usable = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    is_usable && !processors.split_whitespace().any(|flag| flag == "hypervisor")
}
