//! Paths of the repository, and how cargo is called: every command that compiles uses the same profile, target and
//! flags, so that all of them share one cache.

use std::ffi::OsString;
use std::fs;
use std::io::{BufReader, Read};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cargo_metadata::Message;
use duct::{Expression, cmd};

/// Root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the repository")
}

/// Path of a file or folder that xtask stores below `target`. It ignores CARGO_TARGET_DIR, because observer's build
/// script has to find it.
pub(crate) fn target_path(name: &str) -> PathBuf {
    root().join("target").join(name)
}

/// Folders in `target_path` that all clones on this machine share, because they take minutes to fill.
const SHARED: [&str; 2] = ["kernels", "tools"];

/// Links the shared folders to the user's cache.
pub(crate) fn share() -> Result<()> {
    let given = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = given.or_else(|| Some(std::env::home_dir()?.join(".cache")));
    let cache = cache.context("no home directory\nby hand: set XDG_CACHE_HOME")?.join("observer-xtask");
    fs::create_dir_all(target_path(""))?;
    for name in SHARED {
        let (place, shared) = (target_path(name), cache.join(name));
        fs::create_dir_all(&shared).with_context(|| format!("cannot create {}", shared.display()))?;
        if place.symlink_metadata().is_err() {
            symlink(&shared, &place).with_context(|| format!("cannot link {}", place.display()))?;
        }
    }
    Ok(())
}

/// An executable that cargo built.
pub(crate) struct Executable {
    /// Folder of the package, which is the current folder of its tests.
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

/// Prefixes of variables that cargo sets for the program that it runs.
const CARGO_SET_PREFIXES: [&str; 2] = ["CARGO_MANIFEST_", "CARGO_PKG_"];

/// The cargo that started this process, without profile and target: for commands that do not compile the workspace.
pub(crate) fn plain_cargo<I: IntoIterator<Item: Into<OsString>>>(args: I) -> Expression {
    cargo_in(root(), args)
}

/// Like `plain_cargo`, in another workspace.
pub(crate) fn cargo_in<I: IntoIterator<Item: Into<OsString>>>(workspace: &Path, args: I) -> Expression {
    without_cargo_variables(
        cmd(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()), args).dir(workspace),
    )
}

/// Removes variables that cargo set for xtask: build scripts that depend on variables of that name would run again.
pub(crate) fn without_cargo_variables(command: Expression) -> Expression {
    let names = std::env::vars_os().map(|(name, _)| name);
    let is_set_by_cargo = |name: &OsString| {
        name.to_str().is_some_and(|name| CARGO_SET_PREFIXES.iter().any(|own| name.starts_with(own)))
    };
    names.filter(is_set_by_cargo).fold(command, |command, name| command.env_remove(name))
}

/// cargo for the workspace: optimised, and static so that one binary runs on every distribution and in every guest.
pub(crate) fn cargo(command: &str, args: &[&str]) -> Result<Expression> {
    let target = host()?;
    let all = [command, "--release", "--target", &target].into_iter().chain(args.iter().copied());
    Ok(plain_cargo(all).env(FLAGS, flags()?))
}

/// Variable for compiler flags that may contain spaces.
pub(crate) const FLAGS: &str = "CARGO_ENCODED_RUSTFLAGS";

/// Compiler flags of every build. Local paths are remapped, so that the same sources give the same binary everywhere.
pub(crate) fn flags() -> Result<String> {
    let given = std::env::var("RUSTFLAGS").unwrap_or_default();
    let mut flags: Vec<_> = given.split_whitespace().map(str::to_owned).collect();
    flags.push("-Ctarget-feature=+crt-static".to_owned());
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".cargo")));
    let home = home.context("cannot find cargo's home\nby hand: set CARGO_HOME")?;
    for (folder, name) in [(home.as_path(), "/cargo"), (root(), "/observer")] {
        flags.push(format!("--remap-path-prefix={}={name}", folder.display()));
    }
    Ok(flags.join("\x1f"))
}

/// Builds, and returns the executables. Warnings and errors are shown as usual.
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
        bail!("cargo {command} failed\nby hand: fix the errors above");
    }
    Ok(executables)
}

/// Target triple of this machine.
pub(crate) fn host() -> Result<String> {
    let version = cmd!("rustc", "-vV").read().context("cannot run rustc")?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("`rustc -vV` prints no host")?.to_owned())
}
