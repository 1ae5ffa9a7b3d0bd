//! Where things are, and the one way cargo is called: every command that compiles uses the same
//! profile, target and flags, so that all of them share one cache.

use std::ffi::OsString;
use std::fs;
use std::io::{BufReader, Read};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cargo_metadata::Message;
use duct::{Expression, cmd};

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the repository")
}

/// What xtask keeps for itself. Always here, wherever CARGO_TARGET_DIR points: observer's build script
/// must find it.
pub(crate) fn kept(name: &str) -> PathBuf {
    root().join("target").join(name)
}

/// Folders of `kept` that are the same for all clones on this machine, and outlive them: they take minutes to fill.
const SHARED: [&str; 2] = ["kernels", "tools"];

/// Puts the shared folders in their places, as links to the user's cache.
pub(crate) fn share() -> Result<()> {
    let given = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = given.or_else(|| Some(std::env::home_dir()?.join(".cache")));
    let cache =
        cache.context("there is no home directory\nby hand: set XDG_CACHE_HOME")?.join("observer-xtask");
    fs::create_dir_all(kept(""))?;
    for name in SHARED {
        let (place, shared) = (kept(name), cache.join(name));
        fs::create_dir_all(&shared).with_context(|| format!("cannot make {}", shared.display()))?;
        if place.symlink_metadata().is_err() {
            symlink(&shared, &place).with_context(|| format!("cannot link {}", place.display()))?;
        }
    }
    Ok(())
}

/// A program that cargo built.
pub(crate) struct Executable {
    /// The package's folder, which cargo makes the current one for tests.
    pub(crate) folder: PathBuf,
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) is_test: bool,
}

impl Executable {
    pub(crate) fn package(&self) -> &str {
        self.folder.file_name().and_then(|name| name.to_str()).unwrap_or_default()
    }
}

/// How variables begin that cargo sets for the program it runs.
const OWN: [&str; 2] = ["CARGO_MANIFEST_", "CARGO_PKG_"];

/// The cargo that started us, without a profile or target of ours: for what does not compile the workspace.
pub(crate) fn plain_cargo<I: IntoIterator<Item: Into<OsString>>>(args: I) -> Expression {
    cargo_in(root(), args)
}

/// The same in another workspace.
pub(crate) fn cargo_in<I: IntoIterator<Item: Into<OsString>>>(workspace: &Path, args: I) -> Expression {
    without_own(cmd(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()), args).dir(workspace))
}

/// Without what cargo says of xtask to xtask: build scripts that look at their own variables of that kind would run again.
pub(crate) fn without_own(command: Expression) -> Expression {
    let names = std::env::vars_os().map(|(name, _)| name);
    let is_own =
        |name: &OsString| name.to_str().is_some_and(|name| OWN.iter().any(|own| name.starts_with(own)));
    names.filter(is_own).fold(command, |command, name| command.env_remove(name))
}

/// Cargo on the workspace: optimised, and static so that one binary runs on every distribution and guest.
pub(crate) fn cargo(command: &str, args: &[&str]) -> Result<Expression> {
    let target = host()?;
    let all = [command, "--release", "--target", &target].into_iter().chain(args.iter().copied());
    Ok(plain_cargo(all).env(FLAGS, flags()?))
}

/// The variable that cargo takes flags from which may have spaces in them.
pub(crate) const FLAGS: &str = "CARGO_ENCODED_RUSTFLAGS";

/// What every build is told. Where the sources are is not in it, so that they make the same program everywhere.
pub(crate) fn flags() -> Result<String> {
    let given = std::env::var("RUSTFLAGS").unwrap_or_default();
    let mut flags: Vec<_> = given.split_whitespace().map(str::to_owned).collect();
    flags.push("-Ctarget-feature=+crt-static".to_owned());
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".cargo")));
    let home = home.context("cargo has no home\nby hand: set CARGO_HOME")?;
    for (folder, name) in [(home.as_path(), "/cargo"), (root(), "/observer")] {
        flags.push(format!("--remap-path-prefix={}={name}", folder.display()));
    }
    Ok(flags.join("\x1f"))
}

/// Builds, and names the programs that came out. Warnings and errors are shown as usual.
pub(crate) fn build(command: &str, args: &[&str]) -> Result<Vec<Executable>> {
    let json = ["--message-format=json-render-diagnostics"];
    let mut reader = cargo(command, &[&json, args].concat())?.unchecked().reader()?;
    let mut executables = Vec::new();
    for message in Message::parse_stream(BufReader::new(reader.by_ref())) {
        if let Message::CompilerArtifact(artifact) = message?
            && let Some(path) = artifact.executable
            && let Some(folder) = artifact.manifest_path.parent()
        {
            executables.push(Executable {
                folder: folder.into(),
                name: artifact.target.name,
                path: path.into(),
                is_test: artifact.profile.test,
            });
        }
    }
    if !reader.try_wait()?.is_some_and(|finished| finished.status.success()) {
        bail!("cargo {command} failed\nby hand: mend what the compiler says above");
    }
    Ok(executables)
}

/// The target that this machine builds for.
pub(crate) fn host() -> Result<String> {
    let version = cmd!("rustc", "-vV").read().context("rustc cannot be run")?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("`rustc -vV` names no host")?.to_owned())
}
