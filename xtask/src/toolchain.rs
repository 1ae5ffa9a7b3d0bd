//! The toolchain for eBPF: a Rust compiler with the source of `core`, and a bpf-linker with the same LLVM. It is found
//! or installed once, and recorded in a file that observer's build script reads.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use duct::cmd;

use crate::packages;
use crate::pins::{BPF_LINKER, CYCLONEDX, DEBIAN_LLVM, DENY, EBPF_RUSTC};
use crate::shell::{ask, find, is_root, limited, run_quietly};
use crate::workspace::{plain_cargo, share, target_path};

struct Toolchain {
    /// Name of a rustup toolchain, or absolute path of a sysroot.
    name: String,
    /// Whether `RUSTC_BOOTSTRAP` is needed, because the compiler is a stable one.
    bootstrap: bool,
    /// Folder of the bpf-linker that xtask built; empty if the one on PATH is used.
    path: String,
}

/// Makes sure that eBPF programs can be built. Silent and fast if they can.
pub(crate) fn setup() -> Result<()> {
    share()?;
    let record = target_path("ebpf-toolchain");
    if Toolchain::read(&record).is_some_and(|toolchain| toolchain.works()) {
        return Ok(());
    }
    let toolchain = installed().map_or_else(install, Ok)?;
    fs::create_dir_all(target_path(""))?;
    fs::write(&record, toolchain.to_string()).with_context(|| format!("cannot write {}", record.display()))
}

impl Toolchain {
    fn read(record: &Path) -> Option<Self> {
        let text = fs::read_to_string(record).ok()?;
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        Some(Self {
            name: value("toolchain")?.to_owned(),
            bootstrap: value("bootstrap")? == "1",
            path: value("path")?.to_owned(),
        })
    }

    fn works(&self) -> bool {
        let linker = if self.path.is_empty() {
            find("bpf-linker").is_some()
        } else {
            is_pinned_linker(Path::new(&self.path))
        };
        linker && has_core(&self.name)
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "toolchain={}\nbootstrap={}\npath={}", self.name, u8::from(self.bootstrap), self.path)
    }
}

/// Version of the compiler for eBPF programs.
pub(crate) fn ebpf_compiler() -> Option<String> {
    let toolchain = Toolchain::read(&target_path("ebpf-toolchain"))?;
    let rustc = sysroot(&toolchain.name)?.join("bin/rustc");
    ask(&cmd!(rustc, "--version"))
}

/// Version of the compiler for eBPF programs, if it is not the pinned one.
pub(crate) fn unpinned() -> Option<String> {
    let version = ebpf_compiler()?;
    let is_pinned = version.split(' ').nth(1).is_some_and(|version| version.starts_with(EBPF_RUSTC));
    (!is_pinned).then_some(version)
}

fn installed() -> Option<Toolchain> {
    let toolchain = Toolchain { name: "nightly".to_owned(), bootstrap: false, path: String::new() };
    toolchain.works().then_some(toolchain)
}

fn install() -> Result<Toolchain> {
    with_rustup().or_else(|rustup| {
        with_debian().map_err(|debian| {
            anyhow!(
                "no toolchain for eBPF; from rustup: {rustup:#}; from Debian: {debian:#}\n\
                 by hand: rustup toolchain install nightly --component rust-src, and put bpf-linker on PATH"
            )
        })
    })
}

fn with_rustup() -> Result<Toolchain> {
    find("rustup").context("rustup is not installed")?;
    if !has_core("nightly") {
        eprintln!("setup: asking rustup for rust-src (up to a minute)");
        let args = if sysroot("nightly").is_some() {
            "component add rust-src --toolchain nightly"
        } else {
            "toolchain install nightly --profile minimal --component rust-src --no-self-update"
        };
        ask(&limited(Duration::from_secs(60), "rustup", args.split(' ')))
            .context("rustup could not install rust-src")?;
    }
    let version = ask(&cmd!("rustup", "run", "nightly", "rustc", "-vV")).context("nightly does not run")?;
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: ")?.split('.').next());
    let path = build_linker(llvm.context("the nightly compiler does not print its LLVM version")?)?;
    Ok(Toolchain { name: "nightly".to_owned(), bootstrap: false, path })
}

fn with_debian() -> Result<Toolchain> {
    if !packages::is_debian() || !is_root() {
        bail!("this requires Debian and root");
    }
    packages::install(&packages::for_ebpf())?;
    let path = build_linker(&DEBIAN_LLVM.to_string())?;
    Ok(Toolchain { name: "/usr".to_owned(), bootstrap: true, path })
}

/// Builds bpf-linker with the LLVM of the compiler whose output it has to read. Returns the folder.
fn build_linker(llvm: &str) -> Result<String> {
    let bin = target_path("tools/bin");
    if !is_pinned_linker(&bin) {
        let prefix = format!("/usr/lib/llvm-{llvm}");
        if !Path::new(&prefix).join("bin/llvm-config").exists() {
            bail!("the development files of LLVM {llvm} are not installed");
        }
        eprintln!("setup: building bpf-linker {BPF_LINKER} (about a minute)");
        let path = format!("{prefix}/bin:{}", std::env::var("PATH")?);
        let what = format!("install bpf-linker --version {BPF_LINKER} --locked --force");
        let how = format!("--no-default-features --features llvm-{llvm} --root target/tools");
        let install = plain_cargo(what.split(' ').chain(how.split(' ')));
        // Flags for observer, such as a static C library, would break the search for LLVM.
        let install = install.env("PATH", path).env("LLVM_PREFIX", prefix).env_remove("RUSTFLAGS");
        run_quietly("building bpf-linker", &install)?;
    }
    bin.into_os_string().into_string().map_err(|bin| anyhow!("{} is not UTF-8", bin.display()))
}

/// Installs cargo-cyclonedx unless it is installed. Returns the folder.
pub(crate) fn cyclonedx() -> Result<String> {
    subcommand("cyclonedx", CYCLONEDX)
}

/// Installs cargo-deny unless it is installed. Returns the folder.
pub(crate) fn deny() -> Result<String> {
    subcommand("deny", DENY)
}

fn subcommand(name: &str, version: &str) -> Result<String> {
    let bin = target_path("tools/bin");
    let installed = ask(&cmd!(bin.join(format!("cargo-{name}")), name, "--version"));
    if installed.is_none_or(|output| output.rsplit(' ').next() != Some(version)) {
        eprintln!("setup: building cargo-{name} {version} (about two minutes)");
        let what = format!("install cargo-{name} --version {version} --locked --force --root target/tools");
        // Optimised for a short build: the tool itself runs only briefly.
        let install =
            plain_cargo(what.split(' ')).env_remove("RUSTFLAGS").env("CARGO_PROFILE_RELEASE_LTO", "off");
        let install =
            install.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0").env("CARGO_PROFILE_RELEASE_DEBUG", "0");
        let install = install.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
        run_quietly(&format!("building cargo-{name}"), &install)?;
    }
    bin.into_os_string().into_string().map_err(|bin| anyhow!("{} is not UTF-8", bin.display()))
}

fn is_pinned_linker(folder: &Path) -> bool {
    let version = ask(&cmd!(folder.join("bpf-linker"), "--version"));
    version.is_some_and(|version| version == format!("bpf-linker {BPF_LINKER}"))
}

fn has_core(toolchain: &str) -> bool {
    sysroot(toolchain).is_some_and(|root| {
        root.join("bin/rustc").exists() && root.join("lib/rustlib/src/rust/library/core").exists()
    })
}

fn sysroot(toolchain: &str) -> Option<PathBuf> {
    if toolchain.starts_with('/') {
        return Some(toolchain.into());
    }
    ask(&cmd!("rustup", "run", toolchain, "rustc", "--print", "sysroot")).map(PathBuf::from)
}
