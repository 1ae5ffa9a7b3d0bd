//! The kernels of the test matrix: Debian packages, fetched from the mirror that this machine uses. apt checks their
//! signatures. Its lists and cache are kept apart from those of the machine.

use std::env::consts::ARCH;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use duct::{Expression, cmd};
use walkdir::WalkDir;

use crate::pins;
use crate::shell::{ask, run_quietly};
use crate::workspace::target_path;

/// File beside a kernel with the name and version of its package.
const PACKAGE: &str = "package";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Modules that answer sock_diag requests (of `ss` and observer) on Debian's kernels. A guest cannot load modules on
/// demand, so init loads them, in the order of their dependencies.
const MODULES: [&str; 3] = ["inet_diag.ko", "tcp_diag.ko", "unix_diag.ko"];

/// A kernel that a guest can boot.
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    pub(crate) modules: [PathBuf; MODULES.len()],
    /// Package of the kernel, as `name=version`.
    pub(crate) package: String,
}

/// A kernel series of a Debian release.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Series {
    /// The oldest kernel that observer supports.
    #[value(name = "5.10")]
    V5_10,
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
    /// The newest kernel in Debian: it changes from week to week.
    #[value(name = "newest")]
    Newest,
}

impl Series {
    fn release(self) -> &'static str {
        match self {
            Self::V5_10 => "bullseye",
            Self::V6_1 => "bookworm",
            Self::V6_12 => "trixie",
            Self::Newest => "sid",
        }
    }

    /// The pinned package, as `name=version`; `None` for the newest series.
    pub(crate) fn pinned(self) -> Option<&'static str> {
        match self {
            Self::V5_10 => Some(pins::LINUX_5_10),
            Self::V6_1 => Some(pins::LINUX_6_1),
            Self::V6_12 => Some(pins::LINUX_6_12),
            Self::Newest => None,
        }
    }

    /// Prefix of the names of its packages.
    fn prefix(self) -> String {
        if self == Self::Newest { "linux-image-".to_owned() } else { format!("linux-image-{self}.") }
    }

    /// Fetches the kernel unless the pinned one is present. If that fails, another version that is present is used.
    pub(crate) fn fetch_kernel(self) -> Result<()> {
        let folder = self.folder();
        let present = present(&folder);
        let is_right = |package: &String| self.pinned().is_none_or(|pinned| package == pinned);
        if present.as_ref().is_some_and(is_right) {
            return Ok(());
        }
        eprintln!("setup: fetching Linux {self} of Debian {}", self.release());
        match (fetch(self, &folder), present) {
            (Ok(()), _) => Ok(()),
            (Err(error), Some(package)) => {
                eprintln!("setup: {error:#}; using {package} instead");
                Ok(())
            }
            (Err(error), None) => Err(anyhow!(
                "Linux {self} could not be fetched: {error:#}\n\
                 by hand: put vmlinuz, {} of that series into {}, and NAME=VERSION of the package into {PACKAGE} there",
                MODULES.join(", "),
                folder.display()
            )),
        }
    }

    /// Returns the kernel, after fetching it if none is present.
    pub(crate) fn kernel(self) -> Result<Kernel> {
        if ARCH != "x86_64" {
            bail!(
                "guests are x86-64 and run programs of this machine, whose architecture differs\nby hand: use `--kernel host`"
            );
        }
        let folder = self.folder();
        if present(&folder).is_none() {
            self.fetch_kernel()?;
        }
        let modules = MODULES.map(|module| folder.join(module));
        let package = present(&folder).context("the fetched kernel has disappeared")?;
        Ok(Kernel { image: folder.join("vmlinuz"), modules, package })
    }

    fn folder(self) -> PathBuf {
        target_path("kernels").join(self.to_string())
    }
}

/// The package of the kernel in a folder, or `None` if there is no kernel.
fn present(folder: &Path) -> Option<String> {
    Some(fs::read_to_string(folder.join(PACKAGE)).ok()?.trim().to_owned())
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V5_10 => "5.10",
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::Newest => "newest",
        })
    }
}

fn fetch(series: Series, to: &Path) -> Result<()> {
    fs::create_dir_all(target_path("kernels"))?;
    let scratch = tempfile::tempdir_in(target_path("kernels"))?;
    let folder = scratch.path();
    fs::create_dir_all(folder.join("lists/partial"))?;
    fs::create_dir_all(folder.join("cache/archives/partial"))?;
    fs::write(folder.join("sources.list"), sources(series.release())?)?;

    run_quietly("apt-get update", &apt("apt-get", folder, &["update", "-q"]))?;
    // The pinned package if the mirror still has it, otherwise the newest.
    let download = |package: &str| apt("apt-get", folder, &["download", "-q", package]);
    let pinned = series.pinned().filter(|pinned| ask(&download(pinned)).is_some());
    let package = match pinned {
        Some(package) => package.to_owned(),
        None => {
            let package = newest(series, folder)?;
            run_quietly("apt-get download", &download(&package))?;
            package
        }
    };

    let content = folder.join("content");
    let archive = find_file(folder, |name| name.ends_with(".deb"))?;
    run_quietly("dpkg-deb", &cmd!("dpkg-deb", "-x", archive, &content))?;
    let kept = folder.join("kept");
    fs::create_dir(&kept)?;
    fs::rename(find_file(&content, |name| name.starts_with("vmlinuz-"))?, kept.join("vmlinuz"))?;
    for module in MODULES {
        let found = find_file(&content, |name| name.trim_end_matches(".xz") == module)?;
        // Newer releases compress modules.
        run_quietly(
            "xz",
            &cmd!("xz", "--decompress", "--force", "--stdout", found).stdout_path(kept.join(module)),
        )?;
    }
    fs::write(kept.join(PACKAGE), package)?;
    // Rename last, so that a folder is always complete.
    if to.exists() {
        fs::remove_dir_all(to)?;
    }
    fs::rename(kept, to)?;
    Ok(())
}

/// The newest package of a series on the mirror, as `name=version`.
fn newest(series: Series, folder: &Path) -> Result<String> {
    let names = apt("apt-cache", folder, &["pkgnames", &series.prefix()]).read()?;
    // The suffix excludes variants (`-unsigned`, `-dbg`); the count of numbers excludes meta packages.
    let is_kernel = |name: &&str| name.ends_with("-cloud-amd64") && numbers(name).len() > 3;
    let newest = names.lines().filter(is_kernel).max_by_key(|name| numbers(name));
    let newest = newest.context("the mirror has no such kernel package")?;
    let versions = apt("apt-cache", folder, &["madison", newest]).read()?;
    let version = versions.lines().next().and_then(|line| line.split('|').nth(1));
    Ok(format!("{newest}={}", version.context("apt-cache printed no version")?.trim()))
}

fn find_file(folder: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let mut files = WalkDir::new(folder).into_iter().flatten();
    let wanted = files.find(|file| file.file_name().to_str().is_some_and(&is_wanted));
    Ok(wanted.context("a file is missing in the kernel package")?.into_path())
}

/// An apt command that uses only the sources in this folder and runs as the current user.
fn apt(program: &str, folder: &Path, args: &[&str]) -> Expression {
    let option = |name: &str, value: &Path| format!("-o{name}={}", value.display());
    let options = [
        option("Dir::Etc::SourceList", &folder.join("sources.list")),
        option("Dir::Etc::SourceParts", Path::new("/dev/null")),
        option("Dir::State::Lists", &folder.join("lists")),
        option("Dir::Cache", &folder.join("cache")),
        "-oAcquire::Languages=none".to_owned(),
        "-oAPT::Sandbox::User=".to_owned(),
    ];
    cmd(program, options.iter().map(String::as_str).chain(args.iter().copied())).dir(folder)
}

/// apt sources for a release and its security updates, from the mirrors that this machine is configured with.
fn sources(release: &str) -> Result<String> {
    let format = "$(ORIGIN) $(LABEL) $(REPO_URI)";
    let targets = ask(&cmd!("apt-get", "indextargets", "--format", format, "Created-By: Packages"))
        .context("cannot run apt-get")?;
    let source = |label: &str, suite: &str| {
        let mirror = targets.lines().find_map(|line| line.strip_prefix(&format!("Debian {label} ")))?;
        Some(format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n"))
    };
    let main = source("Debian", release)
        .context("apt is configured with no Debian mirror; `apt-get update` may help")?;
    let security = source("Debian-Security", &format!("{release}-security")).filter(|_| release != "sid");
    Ok(main + &security.unwrap_or_default())
}

/// Sort key for versions: the numbers in a name, in order.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn versions_are_ordered_as_numbers() {
        assert!(numbers("linux-image-5.10.0-46-cloud") > numbers("linux-image-5.10.0-9-cloud"));
        assert!(numbers("linux-image-6.12.117+deb13-cloud") > numbers("linux-image-6.12.99+deb13-cloud"));
    }
}
