//! `xtask dist`: the release archive with the static binary, documents, manifests and dashboards, a bill of materials
//! (SBOM) for each program, and checksums. The build is reproducible: the same sources give the same archive.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use duct::cmd;
use object::elf::{DT_NEEDED, FileHeader64, PT_INTERP};
use object::endian::Endianness;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use walkdir::WalkDir;

use crate::shell::{ask, run_quietly};
use crate::workspace::{host, plain_cargo, root, target_path};
use crate::{observer, toolchain};

/// Files and folders of the repository that are packed beside the binary.
const PACKED: [&str; 9] = [
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

/// File with the checksums of the archive and the binary.
const CHECKSUMS: &str = "SHA256SUMS";

/// File name, without extension, under which cargo-cyclonedx writes an SBOM.
const SBOM_NAME: &str = "bill-of-materials";

/// The packages that are in the binary and get an SBOM, and all packages for which cargo-cyclonedx writes one.
const SBOM_PACKAGES: [&str; 2] = ["observer", "observer-ebpf"];
const ALL_PACKAGES: [&str; 5] = ["bench", "observer", "observer-common", "observer-ebpf", "xtask"];

/// `xtask dist`.
pub(crate) fn make() -> Result<()> {
    let binary = observer::build()?;
    ensure_static(&binary)?;
    let answer = ask(&cmd!(&binary, "--version")).context("`observer --version` failed")?;
    let version =
        answer.strip_prefix("observer ").context("`observer --version` did not print `observer VERSION`")?;
    let target = host()?;
    let architecture = target.split('-').next().unwrap_or_default();
    let name = format!("observer-{version}-{architecture}-linux");

    let out = target_path("dist");
    let folder = out.join(&name);
    if out.exists() {
        fs::remove_dir_all(&out)?;
    }
    fs::create_dir_all(&folder)?;
    fs::copy(&binary, folder.join("observer"))?;
    for path in PACKED {
        copy(Path::new(path), &folder)?;
    }
    write_sboms(&target, &folder)?;

    let archive = format!("{name}.tar.gz");
    pack(&out, &name, &archive)?;
    let sums = cmd!("sha256sum", &archive, format!("{name}/observer")).dir(&out).read()?;
    fs::write(out.join(CHECKSUMS), sums + "\n")?;
    for file in [&archive, CHECKSUMS] {
        println!("{}", out.join(file).display());
    }
    println!("aarch64: not built, because the eBPF programs read x86-64 registers; see docs/deployment.md");
    Ok(())
}

/// Fails unless a program is static: no dynamic loader, no shared libraries.
fn ensure_static(binary: &Path) -> Result<()> {
    let bytes = fs::read(binary)?;
    let header = FileHeader64::<Endianness>::parse(&*bytes)?;
    let endian = header.endian()?;
    for segment in header.program_headers(endian, &*bytes)? {
        ensure!(
            segment.p_type(endian) != PT_INTERP,
            "{} is not static: it has a program interpreter",
            binary.display()
        );
        let entries = segment.dynamic(endian, &*bytes)?.unwrap_or_default();
        let needs = entries.iter().any(|entry| entry.d_tag(endian) == DT_NEEDED);
        ensure!(!needs, "{} is not static: it needs shared libraries", binary.display());
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

/// Writes an SBOM in CycloneDX format for observer and for the eBPF programs: each crate with version, licence and
/// checksum.
fn write_sboms(target: &str, folder: &Path) -> Result<()> {
    let path = format!("{}:{}", toolchain::cyclonedx()?, std::env::var("PATH")?);
    // cargo-cyclonedx always writes beside the manifest of each package of the workspace.
    let sbom_path = |package: &str| root().join(package).join(SBOM_NAME).with_extension("json");
    let what =
        format!("cyclonedx --format json --spec-version 1.5 --no-build-deps --override-filename {SBOM_NAME}");
    let command = plain_cargo(what.split(' ').chain(["--target", target])).env("PATH", path);
    let outcome = run_quietly("cargo cyclonedx", &command.env("SOURCE_DATE_EPOCH", commit_time()?));
    let copied = outcome.and_then(|()| {
        for package in SBOM_PACKAGES {
            // Local paths would leak into the archive and break reproducibility.
            let sbom = fs::read_to_string(sbom_path(package))?
                .replace(&format!("file://{}", root().display()), "file://");
            fs::write(folder.join(package).with_extension("cdx.json"), sbom)?;
        }
        Ok(())
    });
    for package in ALL_PACKAGES {
        let _ignored = fs::remove_file(sbom_path(package));
    }
    copied
}

/// Packs a folder reproducibly.
fn pack(out: &Path, name: &str, archive: &str) -> Result<()> {
    let time = format!("--mtime=@{}", commit_time()?);
    let how = ["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mode=go-w", &time];
    let what = ["--use-compress-program=gzip -n -9", "-cf", archive, name];
    run_quietly("tar", &cmd("tar", how.into_iter().chain(what)).dir(out))
}

/// Time of the last commit, in seconds since the Unix epoch.
fn commit_time() -> Result<String> {
    let time = ask(&cmd!("git", "log", "-1", "--format=%ct").dir(root()));
    time.context("cannot read the time of the last commit\nby hand: run this in a clone of the repository")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamically_linked_program_is_rejected() {
        assert!(ensure_static(Path::new("/bin/busybox")).is_ok(), "the tests' busybox is static");
        assert!(ensure_static(Path::new("/usr/bin/python3")).is_err());
    }
}
