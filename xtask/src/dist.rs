//! `xtask dist`: what is handed out. An archive with the static program and all that is read or applied beside it, a bill of
//! materials, and checksums. The same sources make the same archive.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use duct::cmd;
use object::elf::{DT_NEEDED, FileHeader64, PT_INTERP};
use object::endian::Endianness;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use walkdir::WalkDir;

use crate::shell::{ask, quietly};
use crate::workspace::{host, kept, plain_cargo, root};
use crate::{observer, toolchain};

/// What goes along with the program, as it is in the repository.
const ALONG: [&str; 9] = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "SECURITY.md",
    "dashboards",
    "deploy",
    "docs",
];

/// Checksums of what is handed out.
const SUMS: &str = "SHA256SUMS";

/// Name of a bill of materials while it is made.
const BILL: &str = "bill-of-materials";

/// The packages whose code is in the program, and all that a bill is made of along with them.
const DESCRIBED: [&str; 2] = ["observer", "observer-ebpf"];
const PACKAGES: [&str; 4] = ["observer", "observer-common", "observer-ebpf", "xtask"];

/// `xtask dist`.
pub(crate) fn make() -> Result<()> {
    let binary = observer::build()?;
    ensure_static(&binary)?;
    let answer = ask(&cmd!(&binary, "--version")).context("the program does not tell its version")?;
    let version = answer.strip_prefix("observer ").context("the program has another name")?;
    let target = host()?;
    let architecture = target.split('-').next().unwrap_or_default();
    let name = format!("observer-{version}-{architecture}-linux");

    let out = kept("dist");
    let folder = out.join(&name);
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    fs::create_dir_all(&folder)?;
    fs::copy(&binary, folder.join("observer"))?;
    for path in ALONG {
        copy(Path::new(path), &folder)?;
    }
    bills_of_materials(&target, &folder)?;

    let archive = format!("{name}.tar.gz");
    pack(&out, &name, &archive)?;
    let sums = cmd!("sha256sum", &archive, format!("{name}/observer")).dir(&out).read()?;
    fs::write(out.join(SUMS), sums + "\n")?;
    for file in [&archive, SUMS] {
        println!("{}", out.join(file).display());
    }
    println!(
        "aarch64: not built, for the programs in the kernel read x86-64 registers; see docs/deployment.md"
    );
    Ok(())
}

/// A program that needs nothing of the machine it is taken to.
fn ensure_static(binary: &Path) -> Result<()> {
    let bytes = fs::read(binary)?;
    let header = FileHeader64::<Endianness>::parse(&*bytes)?;
    let endian = header.endian()?;
    for segment in header.program_headers(endian, &*bytes)? {
        ensure!(segment.p_type(endian) != PT_INTERP, "{} asks for a dynamic loader", binary.display());
        let entries = segment.dynamic(endian, &*bytes)?.unwrap_or_default();
        let needs = entries.iter().any(|entry| entry.d_tag(endian) == DT_NEEDED);
        ensure!(!needs, "{} asks for libraries", binary.display());
    }
    Ok(())
}

/// Copies a file or folder of the repository to the same place under a folder.
fn copy(path: &Path, folder: &Path) -> Result<()> {
    for entry in WalkDir::new(root().join(path)) {
        let entry = entry?;
        let place = folder.join(entry.path().strip_prefix(root())?);
        if entry.file_type().is_dir() {
            fs::create_dir_all(place)?;
        } else {
            fs::copy(entry.path(), place)?;
        }
    }
    Ok(())
}

/// What the program and the programs in the kernel are made of, in CycloneDX: each crate, with version, licence and checksum.
fn bills_of_materials(target: &str, folder: &Path) -> Result<()> {
    let path = format!("{}:{}", toolchain::cyclonedx()?, std::env::var("PATH")?);
    // It writes beside the manifest of each package of the workspace, and nowhere else.
    let made = |package: &str| root().join(package).join(BILL).with_extension("json");
    let what =
        format!("cyclonedx --format json --spec-version 1.5 --no-build-deps --override-filename {BILL}");
    let command = plain_cargo(what.split(' ').chain(["--target", target])).env("PATH", path);
    let outcome = quietly("cargo cyclonedx", &command.env("SOURCE_DATE_EPOCH", commit_time()?));
    let copied = outcome.and_then(|()| {
        for package in DESCRIBED {
            // Where it was made is nobody's business, and would make each one different.
            let bill = fs::read_to_string(made(package))?
                .replace(&format!("file://{}", root().display()), "file://");
            fs::write(folder.join(package).with_extension("cdx.json"), bill)?;
        }
        Ok(())
    });
    for package in PACKAGES {
        let _not_made = fs::remove_file(made(package));
    }
    copied
}

/// Packs a folder, reproducibly.
fn pack(out: &Path, name: &str, archive: &str) -> Result<()> {
    let time = format!("--mtime=@{}", commit_time()?);
    let how = ["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mode=go-w", &time];
    let what = ["--use-compress-program=gzip -n -9", "-cf", archive, name];
    quietly("tar", &cmd("tar", how.into_iter().chain(what)).dir(out))
}

/// When the sources were committed, in seconds since 1970.
fn commit_time() -> Result<String> {
    let time = ask(&cmd!("git", "log", "-1", "--format=%ct").dir(root()));
    time.context("git does not tell when this was committed\nby hand: make it in a clone of the repository")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_a_loader_is_not_static() {
        assert!(ensure_static(Path::new("/bin/busybox")).is_ok(), "the tests' busybox is static");
        assert!(ensure_static(Path::new("/usr/bin/python3")).is_err());
    }
}
